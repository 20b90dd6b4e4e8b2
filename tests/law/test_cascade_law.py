"""The law of texts drafted by the cascade: rows by lookup and by an inner drafter in one round."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from samples import DENOISER, TARGET, V, causal_drafter, compare, fit, texts
from test_block_law import NEW, drafter, law, target  # noqa: F401 - a fixture

from doubles import ToyDenoiser
from specdiff.drafters import cascade
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.cascade import CascadeDrafter, CascadeState
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.noise import Noise
from specdiff.targets.causal import CausalTarget
from specdiff.types import Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

RATIO_TESTS = ("token", "block")
PARAMS = SamplingParams(max_tokens=5)
COUNT = 40_000
COLUMNS = torch.tensor([0, 2])


class Subset(ToyDenoiser):
    """Of a draft vocabulary, so that a token looked up may be in no column."""

    columns = COLUMNS

    def denoise(self, context: Any, state: None, canvas: Any, revealed: Any) -> torch.Tensor:
        return super().denoise(context, state, canvas, revealed)[..., COLUMNS]


INNER: dict[str, Drafter[Any]] = {
    "one-shot": DenoisingDrafter(DENOISER),
    "left-to-right": DenoisingDrafter(DENOISER, steps=2),
    "columns": DenoisingDrafter(Subset(V, seed=5)),
    "greedy drafts": DenoisingDrafter(DENOISER, draft_temperature=0.0),
    "autoregressive": causal_drafter(TARGET.info, seed=6),
}


def over(inner: Drafter[Any], kind: type[CascadeDrafter] = CascadeDrafter) -> CascadeDrafter:
    return kind(TARGET.info, inner, shortest=2, lookup_len=4)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("inner", INNER)
def test_texts_have_the_targets_law(inner: str, verifier: str) -> None:
    p = fit(TARGET, over(INNER[inner]), VERIFIERS[verifier], PARAMS, COUNT)
    assert p > 1e-3 / (len(INNER) * len(VERIFIERS))


@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_texts_have_the_targets_law_with_a_block_drafter(
    target: CausalTarget,
    verifier: str,
) -> None:
    """Its draft vocabulary lacks a word, and it is skipped in rounds where all rows repeat."""
    built = CascadeDrafter(target.info, drafter(target), shortest=1, lookup_len=3)
    params = SamplingParams(max_tokens=NEW)
    for rows in (10_000, 1):
        count = 20_000 if rows > 1 else 1500
        sample = texts(target, built, VERIFIERS[verifier], params, count=count, rows=rows)
        assert compare(sample, law(target, params)) > 1e-3 / 4


def test_both_branches_and_mixed_rounds_occur() -> None:
    """Else the tests above would say little."""
    rounds: list[tuple[bool, int, int]] = []

    class Watched(CascadeDrafter):
        def propose(
            self, context: Context, state: CascadeState, noise: Noise, draft_len: int
        ) -> Draft:
            draft = super().propose(context, state, noise, draft_len)
            width = 0 if draft.columns is None else len(draft.columns)
            certain = 0
            if draft.probs is not None:
                certain = int((draft.probs[:, 0].amax(-1) == 1).sum())
            rounds.append((state.skipped, certain, width))
            return draft

    for rows in (1, 500):
        texts(
            TARGET,
            over(INNER["columns"], Watched),
            VERIFIERS["token"],
            PARAMS,
            count=500,
            rows=rows,
        )
    assert any(skipped for skipped, _, _ in rounds)
    assert any(not skipped and not certain for skipped, certain, _ in rounds)
    assert any(certain and width == 3 for _, certain, width in rounds)  # one column more


class FromTheDraft(CascadeDrafter):
    """BUG: takes lookup's tokens where the inner draft begins with a certain token."""

    def propose(self, context: Context, state: CascadeState, noise: Noise, draft_len: int) -> Draft:
        draft = self.inner.propose(context, state.inner, noise, min(draft_len, 3))
        continued = [[1, 1] if first == 0 else [] for first in draft.tokens[:, 0].tolist()]
        return cascade._joined(draft, continued, context.batch, state)


class SoftLookup(CascadeDrafter):
    """BUG: reports the inner drafter's probabilities for the tokens looked up."""

    def propose(self, context: Context, state: CascadeState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        if draft.probs is None:
            return draft
        inner = self.inner.propose(context, state.inner, noise, 3)
        assert inner.probs is not None
        K = inner.probs.shape[1]
        size = torch.minimum(draft.sizes, torch.tensor(K))
        return replace(draft, tokens=draft.tokens[:, :K], probs=inner.probs, size=size)


class WrongRows(CascadeDrafter):
    """BUG: the point masses are those of another row."""

    def propose(self, context: Context, state: CascadeState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        return draft if draft.probs is None else replace(draft, probs=draft.probs.roll(1, dims=0))


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("bug", [FromTheDraft, SoftLookup, WrongRows])
def test_bugs_are_caught(verifier: str, bug: type[CascadeDrafter]) -> None:
    drafter_ = over(INNER["one-shot"], bug)
    assert fit(TARGET, drafter_, VERIFIERS[verifier], PARAMS, COUNT) < 1e-6


@dataclass(slots=True)
class Tokens:
    """What a drafter with a cache has read of each row, a token a slot."""

    slots: torch.Tensor
    read: torch.Tensor


class Cached(Drafter[Tokens]):
    """A drafter that reads each committed token once, from its features, and checks them."""

    taps = (0,)
    draft_len = 2
    faults = 0

    def open(self, rows: int, slots: int) -> Tokens:
        return Tokens(torch.full((rows, slots), -1), torch.zeros(rows, dtype=torch.long))

    def admit(self, state: Tokens, context: Context, rows: torch.Tensor) -> None:
        state.read[rows] = 0
        state.slots[rows] = -1

    def propose(self, context: Context, state: Tokens, noise: Noise, draft_len: int) -> Draft:
        assert context.features is not None
        batch = context.batch
        for row in (~batch.done).nonzero()[:, 0].tolist():
            size = int(context.feature_size[row])
            start = int(state.read[row])
            new = context.features[row, :size].argmax(-1)
            state.slots[row, start : start + size] = new
            state.read[row] += size
            text = batch.ids[row, : int(batch.length[row]) - 1]
            self.faults += not torch.equal(state.slots[row, : len(text)], text)
        return Draft(batch.anchor[:, None].repeat(1, draft_len))


class Stale(CascadeDrafter):
    """BUG: the features of rounds that skip the inner drafter are taken for read."""

    def consumed(self, state: CascadeState) -> bool:
        return True


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("kind", "sound"), [(CascadeDrafter, True), (Stale, False)])
def test_a_skipped_drafter_sees_every_feature_later(
    kind: type[CascadeDrafter], sound: bool, rows: int
) -> None:
    inner = Cached()
    texts(
        TARGET,
        over(inner, kind),
        VERIFIERS["token"],
        replace(PARAMS, max_tokens=40),
        count=20,
        rows=rows,
    )
    assert (inner.faults == 0) is sound


def test_an_inner_drafter_that_never_drafts() -> None:
    built = CascadeDrafter(TARGET.info, NoDrafter(), shortest=1)
    assert built.draft_len == 8
    assert fit(TARGET, built, VERIFIERS["token"], PARAMS, 5000) > 1e-4
