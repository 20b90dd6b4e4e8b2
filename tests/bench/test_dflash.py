"""transformers' DFlash generator runs our block drafters as its assistant."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

import blocks
import tiny
from specdiff import decode
from specdiff.bench import dflash
from specdiff.bench.baselines import TransformersDecoder
from specdiff.bench.settings import DFLASH, BenchSettings, Cell, baselines
from specdiff.bench.timing import Workload
from specdiff.drafters.block import block
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.types import Batch, SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "dflash": {"sample_from_anchor": False},
    "from the anchor": {},
    "direct": {"direct": True, "window": 5},
    "sliding and causal": {"window": 5, "full_layers": (1,), "causal_layers": (0,)},
    "draft vocabulary and Markov head": {"draft_vocab_size": 20, "markov_rank": 4},
}


def cell() -> Cell:
    return Cell("main", DFLASH, None, None, None, 0.0, 1)


def work(prompts: list[list[int]], temperature: float = 0.0) -> Workload:
    n = len(prompts)
    return Workload(tuple(map(tuple, prompts)), (40,) * n, temperature, (), tuple(range(n)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_drafts_from_our_states_and_answers_as_plain_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model: Any = blocks.target("llama")
    info = CausalTarget(model, name="tiny").info
    ours = blocks.network(**KINDS[kind])
    ours.save_pretrained(tmp_path, targets=["tiny"], draft_len=ours.config.draft_len)
    assert info.embedding is not None and info.head is not None
    ours.borrow(info.embedding, info.head)
    rounds: list[tuple[int, Tensor]] = []
    original = DFlashTokenCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Tensor, **options: Any) -> Any:
        ids, logits = original(self, input_ids, **options)
        if logits is not None:
            rounds.append((input_ids.shape[1] - 1, logits[0]))
        return ids, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recorded)
    (prompt,) = tiny.prompts(1)
    decoder = TransformersDecoder(model, DFLASH, dflash.assistant(str(tmp_path), info))
    (tokens,) = decoder.run(cell(), work([prompt])).tokens
    text = tiny.plain(model, prompt, 40)
    assert tokens == text[len(prompt) :]
    with torch.no_grad():
        states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
    features = torch.cat([states[tap + 1][0] for tap in ours.config.taps], dim=-1)
    assert len(rounds) > 5
    for anchor, logits in rounds:
        own = blocks.block_states(ours, features, torch.tensor(text), anchor)
        with torch.no_grad():
            expected = own[ours.config.first_slot :] @ info.head.T
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if "Markov" not in k])
def test_it_accepts_what_our_drafter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same accepted lengths, round by round, where nothing of the drafter is left aside."""
    model: Any = blocks.target("llama")
    with torch.no_grad():
        model.lm_head.weight[4:] *= 0.01  # few tokens are likely, so that some are accepted
    target = CausalTarget(model, name="tiny")
    network = blocks.network(**KINDS[kind])
    network.save_pretrained(tmp_path, targets=["tiny"], draft_len=network.config.draft_len)
    anchors: list[int] = []
    original = DFlashTokenCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Tensor, **options: Any) -> Any:
        ids, logits = original(self, input_ids, **options)
        if logits is not None:
            anchors.append(input_ids.shape[1] - 1)
        return ids, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recorded)
    decoder = TransformersDecoder(model, DFLASH, dflash.assistant(str(tmp_path), target.info))
    lengths: list[int] = []
    for prompt in tiny.prompts(4):
        anchors.clear()
        decoder.run(cell(), work([prompt]))
        theirs = [b - a for a, b in itertools.pairwise(anchors)]
        # the generator's first token is not drafted
        start = tiny.plain(model, prompt, 1)
        batch = Batch.of([start], [SamplingParams(max_tokens=60, temperature=0.0)], [0])
        drafter = block(target.info, tmp_path)
        rounds = decode.decode(target, drafter, batch, draft_len=network.config.draft_len)
        ours = [int(r.emitted[0]) for r in rounds]
        assert anchors[0] == len(prompt) and len(theirs) > 4
        assert ours[: len(theirs)] == theirs
        lengths += theirs
    assert max(lengths) > 2, "something must be accepted"


def test_it_takes_one_row_and_block_drafters_only(tmp_path: Path) -> None:
    model: Any = blocks.target("llama")
    info = CausalTarget(model, name="tiny").info
    blocks.network().save_pretrained(tmp_path)
    decoder = TransformersDecoder(model, DFLASH, dflash.assistant(str(tmp_path), info))
    with pytest.raises(UsageError, match="batch 1 only"):
        decoder.run(cell(), work(tiny.prompts(2)))
    for spec in ("ngram", "block", "module:Class"):
        with pytest.raises(UnsupportedModelError, match="no block drafter that transformers"):
            dflash.assistant(spec, info)


@pytest.mark.parametrize(("extra", "spec"), [((), "block"), (("block=./folder",), "./folder")])
def test_it_is_measured_with_the_block_drafter(extra: tuple[str, ...], spec: str) -> None:
    settings = BenchSettings(suite="embedded", model="tiny", drafters=extra)
    (baseline,) = (b for b in baselines(settings) if b.name == DFLASH)
    assert (baseline.kind, baseline.spec, baseline.required) == (DFLASH, spec, False)
