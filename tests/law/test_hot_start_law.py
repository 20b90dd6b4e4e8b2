"""Hot starts: the law of texts, the same text in any batch, and bugs that must show."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, cycle
from typing import Any

import pytest
import torch
from samples import DENOISER, TARGET, V, compare, fit, last, law, texts, written
from test_block_law import NEW, drafter, target  # noqa: F401 - a fixture
from test_block_law import law as block_law
from test_cascade_law import Subset, over
from test_reproducible import DENOISER as WIDE
from test_reproducible import REQUESTS, decoded, served
from test_reproducible import TARGET as WIDE_TARGET

from specdiff import decode, engine
from specdiff.drafters import cascade
from specdiff.drafters.base import Drafter, DrafterWrapper, NoDrafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter, HotState
from specdiff.drafters.hot_start import DraftHistory, Tail
from specdiff.engine import Request
from specdiff.noise import Noise, row_seed
from specdiff.targets.causal import CausalTarget
from specdiff.types import Batch, Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

RATIO_TESTS = ("token", "block")
PARAMS = SamplingParams(max_tokens=5)
COUNT = 20_000
CAUGHT = 1e-6
HOT: dict[str, DenoisingDrafter[Any]] = {
    "one pass": DenoisingDrafter(DENOISER, hot_start=0.5),
    "3 passes": DenoisingDrafter(DENOISER, steps=3, hot_start=0.8),
    "canvas, one pass": DenoisingDrafter(DENOISER, hot_start="canvas"),
    "canvas, 3 passes": DenoisingDrafter(DENOISER, steps=3, hot_start="canvas"),
    "columns": DenoisingDrafter(Subset(V, seed=5), steps=2, hot_start=0.5),
    "canvas, columns": DenoisingDrafter(Subset(V, seed=5), hot_start="canvas"),
    "greedy drafts": DenoisingDrafter(DENOISER, draft_temperature=0.0, hot_start=0.5),
    "canvas, sharpened": DenoisingDrafter(DENOISER, draft_temperature=0.5, hot_start="canvas"),
}
PASSES = 1e-3 / (2 * len(HOT) * len(VERIFIERS))
CANVAS = HOT["canvas, 3 passes"]
MIXED = HOT["3 passes"]


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("name", HOT)
def test_texts_have_the_targets_law(name: str, verifier: str) -> None:
    assert fit(TARGET, HOT[name], VERIFIERS[verifier], PARAMS, COUNT) > PASSES


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("name", ["one pass", "canvas, columns"])
def test_texts_have_the_targets_law_behind_lookup(name: str, verifier: str) -> None:
    assert fit(TARGET, over(HOT[name]), VERIFIERS[verifier], PARAMS, COUNT) > PASSES


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_texts_have_the_targets_law_with_a_block_drafter(
    target: CausalTarget,
    verifier: str,
) -> None:
    params = SamplingParams(max_tokens=NEW)
    built = drafter(target, hot_start=0.5)
    sample = texts(target, built, VERIFIERS[verifier], params, count=COUNT, rows=10_000)
    assert compare(sample, block_law(target, params)) > 1e-3 / len(VERIFIERS)


def tails(drafter: DenoisingDrafter[Any], rows: int = 200) -> list[Tail]:
    """What the drafts of one batch began with."""
    seen: list[Tail] = []
    inner = DraftHistory.tail

    def recorded(history: DraftHistory, context: Context, draft_len: int) -> Tail | None:
        tail = inner(history, context, draft_len)
        seen.extend([] if tail is None else [tail])
        return tail

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftHistory, "tail", recorded)
        texts(TARGET, drafter, VERIFIERS["token"], PARAMS, count=rows, rows=rows)
    return seen


def test_drafts_begin_with_what_was_rejected() -> None:
    """Else the tests above would say little."""
    assert all(int(tail.valid.sum()) > 20 for tail in tails(MIXED)[:2])
    kept = torch.cat([tail.mask for tail in tails(CANVAS)])
    assert int(kept[:, 0].sum()) > 20 and int(kept[:, 1].sum()) > 5
    assert not any(bool(tail.mask.any()) for tail in tails(MIXED))


class Recording(DenoisingDrafter[Any]):
    """Keeps the text that each draft followed."""

    def open(self, rows: int, slots: int) -> HotState:
        self.drafts: list[tuple[Batch, Draft]] = []
        return super().open(rows, slots)

    def propose(self, context: Context, state: HotState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        self.drafts.append((context.batch, draft))
        return draft


def test_a_kept_token_stays_at_its_position() -> None:
    recorder = Recording(DENOISER, hot_start="canvas")
    kept = 0
    seen = tails(recorder)
    for (before, old), (after, new), tail in zip(
        recorder.drafts, recorder.drafts[1:], seen, strict=False
    ):
        assert new.probs is not None
        for row, k in tail.mask.nonzero().tolist():
            if bool(after.done[row]):
                continue
            position = int(after.length[row]) + k
            assert new.tokens[row, k] == old.tokens[row, position - int(before.length[row])]
            assert new.probs[row, k, new.tokens[row, k]] == 1
            kept += 1
    assert kept > 20


# ---- bugs ----


def soft(self: Tail, tokens: Any, q: Any, positions: Any, columns: Any) -> Any:
    """BUG: kept tokens with the network's probabilities."""
    mask = self.mask[:, positions]
    return torch.where(mask, self.tokens[:, positions], tokens), q


@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_soft_probabilities_of_kept_tokens_are_caught(
    verifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tail, "keep", soft)
    sample = texts(TARGET, CANVAS, VERIFIERS[verifier], PARAMS, count=COUNT)
    assert compare(sample, law(PARAMS)) < CAUGHT


class Unmixed(DenoisingDrafter[Any]):
    """BUG: draws from the mixture, reports the new probabilities alone."""

    def propose(self, context: Context, state: HotState, noise: Noise, draft_len: int) -> Draft:
        cold = DenoisingDrafter(self.denoiser).propose(context, state.inner, noise, draft_len)
        return replace(cold, tokens=super().propose(context, state, noise, draft_len).tokens)


class OwnRound(DenoisingDrafter[Any]):
    """BUG: reads the tail one off, among this round's draws, and keeps or drops them by their
    probability."""

    def propose(self, context: Context, state: HotState, noise: Noise, draft_len: int) -> Draft:
        super().propose(context, state, noise, draft_len)
        assert state.history is not None and state.history.last is not None
        last = state.history.last
        state.history.last = replace(last, round=last.round - 1)
        return super().propose(context, state, noise, draft_len)


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize(
    "bug", [Unmixed(DENOISER, hot_start=0.8), OwnRound(DENOISER, hot_start="canvas")]
)
def test_bugs_are_caught(bug: DenoisingDrafter[Any], verifier: str) -> None:
    assert fit(TARGET, bug, VERIFIERS[verifier], PARAMS, 40_000) < CAUGHT


# ---- the same text in any batch ----


def hot(option: float | str, **options: Any) -> DenoisingDrafter[Any]:
    return DenoisingDrafter(WIDE, hot_start=option, **options)


MANY = [Request([i % 6], SamplingParams(max_tokens=20), row_seed(5, i)) for i in range(40)]


def alone(built: Drafter[Any], requests: Sequence[Request]) -> list[list[int]]:
    return [decoded([request], built, "block")[0] for request in requests]


def arrived(built: Drafter[Any]) -> list[list[int]]:
    """The texts of MANY, which come one after the other: rows are opened while others run."""
    answers = defaultdict[int, list[int]](list)
    steps = engine.serve(
        WIDE_TARGET,
        built,
        chain.from_iterable((request, None) for request in MANY),
        verifier=VERIFIERS["block"],
        draft_len=built.draft_len,
        rows=32,
        slots=21,
    )
    for step in steps:
        for output in step.outputs():
            answers[output.request] += output.tokens
    return [answers[i] for i in range(len(MANY))]


@pytest.mark.parametrize("option", [0.5, "canvas"])
def test_rows_that_are_opened_again_go_on(
    option: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a state that is opened again starts cold."""
    built = hot(option)
    expected = alone(built, MANY)
    assert arrived(built) == arrived(DrafterWrapper(built)) == expected
    monkeypatch.setattr(DraftHistory, "resume", lambda *arguments: None)
    assert arrived(built) != expected


class Alternating(DrafterWrapper[Any]):
    """`inner` drafts in the first round of a batch of row 0 with an even token, else in the later
    ones."""

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        first = int(context.batch.round[0]) == 0
        if first == (int(context.batch.ids[0, 0]) % 2 == 0):
            return super().propose(context, state, noise, draft_len)
        return Draft(context.batch.anchor[:, None].repeat(1, draft_len))


@pytest.mark.parametrize("option", [0.5, "canvas"])
def test_a_new_request_starts_cold(option: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a row keeps what its earlier request drafted."""
    built = Alternating(hot(option))
    requests = [
        replace(request, params=SamplingParams(max_tokens=9 if i % 2 else 1))
        for i, request in enumerate(MANY)
    ]
    expected = alone(built, requests)
    assert served(requests, built, "block", 1) == expected
    monkeypatch.setattr(DraftHistory, "forget", lambda *arguments: None)
    assert served(requests, built, "block", 1) != expected


@pytest.mark.parametrize("option", [0.5, "canvas"])
def test_positions_beyond_a_requests_own_limit_are_not_used(
    option: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a draft that was computed for a neighbor's sake."""
    built = hot(option)
    requests = [replace(r, draft_len=(None, 0, 1, 2)[i % 4]) for i, r in enumerate(MANY)]
    expected = [served([request], built, "block", 1)[0] for request in requests]
    assert served(requests, built, "block", 8) == expected
    inner = DraftHistory.tail

    def whole(history: DraftHistory, context: Context, draft_len: int) -> Tail | None:
        previous = context.previous
        if previous is not None:
            previous = replace(previous, draft=replace(previous.draft, size=None))
        return inner(history, replace(context, previous=previous), draft_len)

    monkeypatch.setattr(DraftHistory, "tail", whole)
    assert served(requests, built, "block", 8) != expected


@pytest.mark.parametrize("option", [0.5, "canvas"])
def test_behind_lookup_a_text_does_not_depend_on_its_neighbors(
    option: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inner drafter is skipped in some batches, and drafts in vain in others.

    Planted: it goes on from drafts made in vain, or starts cold where rows are opened again.
    """
    built = CascadeDrafter(WIDE_TARGET.info, hot(option), shortest=2, lookup_len=3)
    expected = alone(built, MANY)
    assert served(MANY, built, "block", 8) == arrived(built) == expected
    with monkeypatch.context() as patch:
        patch.setattr(cascade, "_own_rounds", lambda context, looked_up: context)
        assert served(MANY, built, "block", 8) != expected
    monkeypatch.setattr(DraftHistory, "resume", lambda *arguments: None)
    assert arrived(built) != expected


@pytest.mark.parametrize("lengths", [(3,), (2, 0, 3, 1), (1, 3)])
@pytest.mark.parametrize("option", [0.5, "canvas"])
def test_any_lengths_match_plain_decoding(option: float | str, lengths: tuple[int, ...]) -> None:
    """Plain rounds come between, and drafts grow and shrink."""
    expected = alone(NoDrafter(), REQUESTS)
    assert expected != alone(hot(option), REQUESTS)
    batch = Batch.of(
        [r.prompt for r in REQUESTS], [r.params for r in REQUESTS], [r.seed for r in REQUESTS]
    )
    rule = cycle(lengths)
    rounds = decode.decode(
        WIDE_TARGET,
        hot(option, steps=2),
        batch,
        verifier=VERIFIERS["match"],
        draft_len=lambda _: next(rule),
    )
    batch = last(rounds)
    answers = [
        ids[start:end].tolist()
        for ids, start, end in zip(batch.ids, batch.prompt_length, batch.length, strict=True)
    ]
    assert answers == [decoded([request], NoDrafter(), "match")[0] for request in REQUESTS]


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("name", ["3 passes", "canvas, 3 passes"])
def test_lengths_that_change_keep_the_law(name: str, verifier: str) -> None:
    lengths = cycle([3, 1, 0, 2])
    batch = Batch.of([[1]] * COUNT, [PARAMS] * COUNT, range(COUNT))
    rounds = decode.decode(
        TARGET,
        HOT[name],
        batch,
        verifier=VERIFIERS[verifier],
        draft_len=lambda _: next(lengths),
    )
    assert compare(written(last(rounds)), law(PARAMS)) > PASSES
