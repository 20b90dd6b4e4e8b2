"""L2 for trees: texts of the real loop and the engine have the target's law; planted bugs show."""

from dataclasses import replace
from typing import Any

import pytest
import samples
import torch
from samples import DENOISER, TARGET, compare, law
from torch import Tensor

from specdiff import decode, engine, sampling, verify, verify_tree
from specdiff.drafters.base import Drafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.tree import TreeDrafter
from specdiff.errors import UsageError
from specdiff.noise import Noise, Purpose
from specdiff.sampling import distribution, draw
from specdiff.targets.table import TableCache, TableTarget
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetOutput, Verification
from specdiff.verify import VERIFIERS

OPTIONS = {
    "T=1": SamplingParams(max_tokens=4),
    "T=0.7": SamplingParams(max_tokens=3, temperature=0.7),
    "filters": SamplingParams(max_tokens=3, top_k=2, top_p=0.9),
    "counts": SamplingParams(max_tokens=4, presence_penalty=0.5, frequency_penalty=1.5),
    "repetition": SamplingParams(max_tokens=4, repetition_penalty=2.5),
    "bias": SamplingParams(max_tokens=3, logit_bias=((0, 1.5), (2, -0.5))),
    "allowed": SamplingParams(max_tokens=4, allowed_token_ids=(0, 2)),
    "stop": SamplingParams(max_tokens=5, stop_token_ids=(2,)),
}
PLAIN = OPTIONS["T=1"]
RULES = ("token", "match", "match-gumbel")
COUNT = 40_000
PASSES = 1e-3 / 100
CAUGHT = 1e-6
FORM = torch.tensor([-1, -1, 0, 0, 1, 1, 2])  # sampled trees


class SampledTree(Drafter[None]):
    """One list of candidates a depth, shared by all parents, drawn with or without replacement.

    ragged: a random number of nodes counts in each row.
    """

    trees = True

    def __init__(self, *, replacement: bool = False, ragged: bool = False) -> None:
        self.replacement = replacement
        self.ragged = ragged
        self.draft_len = len(FORM)

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        batch = context.batch
        rows = len(batch.length)
        canvas = torch.full((rows, 3), DENOISER.mask_id)
        logits = DENOISER.denoise(context, None, canvas, canvas < 0)
        q = distribution(logits, batch, batch.ids[:, :0])
        lists = []
        laws = []
        for rank in range(2):
            uniform = noise.uniform(Purpose.DRAFT, 3, index=rank)
            tokens = draw(q, uniform)
            lists.append(tokens)
            laws.append(q)
            if not self.replacement:
                left = q.scatter(2, tokens[..., None], 0)
                total = left.sum(-1, keepdim=True)
                # a law of one token: its second candidate is never reached
                point = torch.zeros_like(q).scatter(2, ((tokens + 1) % 3)[..., None], 1)
                q = torch.where(total > 0, left / total.masked_fill(total == 0, 1), point)
        depth = torch.tensor([0, 0, 1, 1, 1, 1, 2])
        rank = torch.tensor([0, 1, 0, 1, 0, 1, 0])
        tokens = torch.stack(lists)[rank, :, depth].T
        probs = torch.stack(laws)[rank, :, depth].transpose(0, 1)
        size = None
        cut = min(draft_len, len(FORM))
        if self.ragged:
            size = (noise.uniform(Purpose.DRAFT, 1, index=9)[:, 0] * (cut + 1)).long()
        return Draft(tokens[:, :cut], probs[:, :cut], size, FORM.expand(rows, -1)[:, :cut])


DRAFTERS: dict[str, Drafter[Any]] = {
    "best-first": TreeDrafter(DENOISER, 6),
    "small": TreeDrafter(DENOISER, 2, draft_temperature=0.5),
    "without replacement": SampledTree(),
    "with replacement": SampledTree(replacement=True),
    "ragged": SampledTree(ragged=True),
    "cascade": CascadeDrafter(TARGET.info, TreeDrafter(DENOISER, 6), shortest=1, lookup_len=4),
    "cascade of sampled trees": CascadeDrafter(TARGET.info, SampledTree(), shortest=1, longest=2),
}


def texts(drafter: Drafter[Any], verifier: verify.Verifier, *arguments: Any, **options: Any) -> Any:
    target = options.pop("target", TARGET)
    return samples.texts(
        target, drafter, verifier, *arguments, draft_len=drafter.draft_len, **options
    )


def p_value(
    drafter: Drafter[Any],
    rule: str,
    params: SamplingParams,
    target: TableTarget = TARGET,
    count: int = COUNT,
) -> float:
    return compare(texts(drafter, VERIFIERS[rule], params, target=target, count=count), law(params))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_texts_have_the_targets_law(drafter: str, option: str) -> None:
    assert p_value(DRAFTERS[drafter], "token", OPTIONS[option]) > PASSES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_rule_has_the_targets_law(drafter: str, rule: str) -> None:
    assert p_value(DRAFTERS[drafter], rule, OPTIONS["counts"]) > PASSES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_texts_are_the_argmax_path(drafter: str, rule: str) -> None:
    params = SamplingParams(max_tokens=12, temperature=0)
    (path,) = law(params)
    sample = texts(DRAFTERS[drafter], VERIFIERS[rule], params, count=500, rows=500)
    assert sample.tolist() == [list(path)] * 500


@pytest.mark.parametrize("drafter", ["best-first", "ragged"])
def test_requests_that_join_and_leave_have_the_targets_law(drafter: str) -> None:
    """Rows of all lengths, reused prefixes among them: each text is that of a row alone."""
    params = [SamplingParams(max_tokens=1 + i % 7, temperature=(i % 3) / 2) for i in range(60)]
    requests = [
        engine.Request([i % 3] * (1 + i % 5), p, seed)
        for seed, (i, p) in enumerate(enumerate(params))
    ]

    def answers(rows: int, drafter: Drafter[Any], rule: str) -> list[list[int]]:
        results: dict[int, list[int]] = {}
        steps = engine.serve(
            TARGET,
            drafter,
            requests,
            verifier=VERIFIERS[rule],
            draft_len=drafter.draft_len,
            rows=rows,
        )
        for step in steps:
            for index, ids, _ in step.finished():
                results[index] = ids.tolist()
        return [results[i] for i in range(len(requests))]

    assert answers(7, DRAFTERS[drafter], "token") == answers(1, DRAFTERS[drafter], "token")
    chain = TreeDrafter(DENOISER, 2)
    assert answers(7, DRAFTERS[drafter], "match") == answers(3, chain, "match")


def test_a_tree_is_accepted_more_often_than_a_chain() -> None:
    counts = {}
    for budget in (2, 6, 12):
        batch = Batch.of([[1]] * 2000, [PLAIN] * 2000, range(2000))
        state = decode.start(TARGET, TreeDrafter(DENOISER, budget), batch)
        decode.admit(state, torch.arange(2000))
        counts[budget] = float(decode.step(state, budget).verification.accepted.double().mean())
    assert counts[2] < counts[6] < counts[12]


def test_logprobs_follow_the_path() -> None:
    params = SamplingParams(max_tokens=4, logprobs=1)
    batch = Batch.of([[1]] * 300, [params] * 300, range(300))
    score = TARGET.table.log_softmax(-1)
    rounds = decode.decode(TARGET, DRAFTERS["without replacement"], batch)
    seen = 0
    for last in rounds:
        logprobs = last.verification.logprobs
        assert logprobs is not None
        for row, count in enumerate(last.emitted.tolist()):
            end = int(last.batch.length[row])
            for k in range(count):
                at = end - count + k
                before = [0, *last.batch.ids[row, :at].tolist()][-2:]
                token = int(last.batch.ids[row, at])
                assert float(logprobs.tokens[row, k]) == pytest.approx(float(score[*before, token]))
                seen += int(last.verification.path[row, k] != k)
    assert seen > 100


# ---- refusals ----


class Chains(TableTarget):
    trees = False


def test_a_target_of_chains_refuses_a_drafter_of_trees() -> None:
    with pytest.raises(UsageError, match="scores no trees") as error:
        texts(DRAFTERS["small"], verify.token, PLAIN, target=Chains(TARGET.table), count=10)
    assert error.value.param == "tree"


def test_block_refuses_a_drafter_of_trees() -> None:
    with pytest.raises(UsageError, match="'block' takes no trees") as error:
        texts(DRAFTERS["small"], verify.block, PLAIN, count=10)
    assert error.value.param == "verifier"


# ---- planted bugs ----


class StalePath(TableTarget):
    """BUG: the accepted path stays where it was scored."""

    def keep(self, cache: TableCache, batch: Batch, verification: Verification) -> None:
        return None


class HalfMoved(TableTarget):
    """BUG: all of the accepted path is moved but its last node."""

    def keep(self, cache: TableCache, batch: Batch, verification: Verification) -> None:
        index = torch.arange(verification.path.shape[1])
        last = index == verification.accepted[:, None]
        path = torch.where(last, index, verification.path)
        super().keep(cache, batch, replace(verification, path=path))


class NeighborAbove(TableTarget):
    """BUG: a node sees the slot before its own instead of its parent's."""

    def score(self, cache: TableCache, batch: Batch, draft: Draft) -> TargetOutput:
        output = super().score(cache, batch, replace(draft, parents=None))
        cache.tree = True
        return output


@pytest.mark.parametrize("bug", [StalePath, HalfMoved, NeighborAbove])
def test_a_planted_target_is_caught(bug: type[TableTarget]) -> None:
    assert p_value(DRAFTERS["best-first"], "match", PLAIN, TableTarget(TARGET.table)) > PASSES
    assert p_value(DRAFTERS["best-first"], "match", PLAIN, bug(TARGET.table)) < CAUGHT


class OneForSiblings(Noise):
    """BUG: siblings share a uniform."""

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Tensor:
        uniform = Noise.uniform(self, purpose, n, index)
        if purpose is not Purpose.RATIO:
            return uniform
        return uniform[:, (FORM + 1)[:n]]


def shared_uniform(draft: Draft, p: Tensor, noise: Noise) -> Verification:
    shared = OneForSiblings(noise.seed, noise.round, noise.position)
    return verify_tree.rejection(draft, p, shared)


def wrong_row(draft: Draft, p: Tensor, noise: Noise) -> Verification:
    """BUG: the token after the path is drawn at the row of its length, as in a chain."""
    result = verify.token(draft, p, noise)
    at = p[torch.arange(len(p)), result.accepted]
    following = draw(at, noise.uniform(Purpose.RESIDUAL, 1)[:, 0])
    index = torch.arange(p.shape[1])
    tokens = torch.where(index == result.accepted[:, None], following[:, None], result.tokens)
    return replace(result, tokens=tokens)


@pytest.mark.parametrize("bug", [shared_uniform, wrong_row])
def test_a_planted_verifier_is_caught(bug: verify.Verifier) -> None:
    drafter = DRAFTERS["without replacement"]
    assert p_value(drafter, "token", PLAIN) > PASSES
    assert compare(texts(drafter, bug, PLAIN, count=COUNT), law(PLAIN)) < CAUGHT


def test_a_penalty_that_counts_siblings_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decode,
        "distribution",
        lambda logits, batch, draft: sampling.distribution(
            logits, batch, replace(draft, parents=None)
        ),
    )
    assert p_value(DRAFTERS["without replacement"], "match", OPTIONS["counts"]) < CAUGHT
