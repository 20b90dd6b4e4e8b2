"""Trees at every door: generate, serve, transformers' generate, check; and faulty trees."""

from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

import tiny
from doubles import PointMasses, ToyDenoiser
from specdiff import SpeculativeLM, decode, verify
from specdiff.check.drafters import Subject, check_drafter
from specdiff.cli.params import drafter_options
from specdiff.drafters.base import Drafter
from specdiff.drafters.tree import TreeDrafter
from specdiff.errors import UsageError
from specdiff.hf.processed_target import ProcessedTarget
from specdiff.noise import Noise
from specdiff.serve.live import LiveEngine
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetInfo

VOCAB = 32
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3]]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> SpeculativeLM:
    folder = tmp_path_factory.mktemp("drafter")
    tiny.sedd(tiny.sedd_config(VOCAB)).save_pretrained(folder, draft_len=5)
    return SpeculativeLM(tiny.target("llama", vocab=VOCAB), str(folder), None, 128)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seed_gives_the_same_text_with_trees_and_with_chains(
    lm: SpeculativeLM, temperature: float
) -> None:
    texts = []
    for options in ({}, {"tree": 2}, {"tree": 12}):
        answers = lm.generate(
            PROMPTS,
            max_tokens=20,
            temperature=temperature,
            seed=4,
            verifier="match",
            drafter_options=options,
        )
        texts.append([answer.token_ids for answer in answers])
        assert all(answer.stats.rounds for answer in answers)
    assert texts[0] == texts[1] == texts[2]


def test_generate_refuses_block_with_a_tree(lm: SpeculativeLM) -> None:
    with pytest.raises(UsageError, match="'block' takes no trees") as error:
        lm.generate([3, 1], max_tokens=4, verifier="block", drafter_options={"tree": 4})
    assert error.value.param == "verifier"


def test_a_server_refuses_block_with_a_tree_before_it_starts() -> None:
    target = TableTarget.random(5)
    drafter = TreeDrafter(ToyDenoiser(5), 4)
    with pytest.raises(UsageError, match="'block' takes no trees"):
        LiveEngine(target, drafter, verify.block, 4)


def test_a_target_under_transformers_processors_refuses_trees() -> None:
    target = tiny.target("llama", vocab=VOCAB)
    batch = Batch.of([[3, 1]], [SamplingParams(max_tokens=4)], [0])
    scorer = ProcessedTarget(target, LogitsProcessorList(), torch.tensor([[3, 1]]), 0, drafted=True)
    with pytest.raises(UsageError, match=r"\(ProcessedTarget\) scores no trees") as error:
        decode.start(scorer, TreeDrafter(ToyDenoiser(VOCAB), 4), batch)
    assert error.value.param == "tree"


def test_the_command_line_passes_the_budget() -> None:
    assert drafter_options(None, None, None, None, 8) == {"tree": 8}
    assert drafter_options(2, None, None, None, None) == {"steps": 2}


def test_a_tree_of_point_masses_passes_the_check() -> None:
    def build(info: TargetInfo) -> Drafter[None]:
        return TreeDrafter(ToyDenoiser(info.vocab_size, seed=2), 6)

    rules = {"token": verify.token, "match": verify.match}
    findings = list(check_drafter(Subject(build), rules, quick=True))
    assert [f.name for f in findings if not f.passed] == []
    assert {"law under token", "law under match", "greedy", "faults"} <= {f.name for f in findings}


# ---- faulty trees ----


class Faulty(PointMasses):
    trees = True

    def __init__(self, **changes: object) -> None:
        super().__init__(5)
        self.changes = changes

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        tokens = super().propose(context, state, noise, draft_len).tokens
        parents = torch.tensor([[-1, -1, 0]]).expand(len(tokens), -1)
        return replace(Draft(tokens, parents=parents), **self.changes)


FAULTS = {
    "itself": (torch.tensor([[-1, 1, 0]]), "a parent that does not come before it"),
    "later": (torch.tensor([[-1, 2, 0]]), "a parent that does not come before it"),
    "below": (torch.tensor([[-1, -2, 0]]), "a parent that does not come before it"),
    "shape": (torch.tensor([[-1, -1]]), r"gave parents of shape \[1, 2\]"),
    "type": (torch.tensor([[-1.0, -1.0, 0.0]]), "and type torch.float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_tree_costs_a_draft_and_not_the_text(fault: str) -> None:
    parents, message = FAULTS[fault]
    target = TableTarget.random(5, seed=2)
    batch = Batch.of([[1]], [SamplingParams(max_tokens=12)], [3])
    plain = list(decode.decode(target, PointMasses(5), batch, verifier=verify.match))
    with pytest.warns(RuntimeWarning, match=message):
        rounds = list(decode.decode(target, Faulty(parents=parents), batch, verifier=verify.match))
    assert tiny.rows_of(rounds[-1].batch) == tiny.rows_of(plain[-1].batch)
    assert bool(rounds[-1].disabled.all())
