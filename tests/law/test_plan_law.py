"""Plans that change from round to round keep the target's law: lengths, temperature, confidence."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from samples import DENOISER, DRAFTERS, TARGET, compare, law, written

from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.noise import Noise
from specdiff.types import Batch, Context, Draft, DraftPlan, SamplingParams
from specdiff.verify import VERIFIERS, Verifier

PARAMS = SamplingParams(max_tokens=4)
COUNT = 20_000
CONFIDENCE = 0.6  # of three words: some positions are sure, others not
RATIO_TESTS = ("token", "block")
PLANS = {
    "temperature": [DraftPlan((3,), t) for t in (1.0, 0.0, 0.5, 2.5)],
    "confidence": [DraftPlan((3,), 1.0, CONFIDENCE)],
    "all": [
        DraftPlan((3,), 0.7, CONFIDENCE),
        DraftPlan((2,), 1.0, 0.5),
        DraftPlan((0,)),
        DraftPlan((3,), 0.0, 0.9),
    ],
}
BRANCHES = [DraftPlan((3, 1)), DraftPlan((0, 4)), DraftPlan((2, 0), 0.5), DraftPlan((1, 3), 0.0)]
CHAINS = ("one-shot", "left-to-right", "autoregressive")
PASSES = 1e-3 / (len(PLANS) * len(CHAINS) * 2 + 4)
CAUGHT = 1e-6


def sample(drafter: Drafter[Any], verifier: Verifier, plans: list[DraftPlan]) -> torch.Tensor:
    batch = Batch.of([[1]] * COUNT, [PARAMS] * COUNT, range(COUNT))
    run = decode.start(TARGET, drafter, batch, verifier=verifier, slots=16)
    run.drafter.admit(run.state, run.context, torch.arange(COUNT))
    for plan in cycle(plans):
        decode.step(run, plan)
        if bool(run.batch.done.all()):
            return written(run.batch)
    raise AssertionError


def fit(drafter: Drafter[Any], verifier: str, plans: list[DraftPlan]) -> float:
    return compare(sample(drafter, VERIFIERS[verifier], plans), law(PARAMS))


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("plans", PLANS)
def test_texts_have_the_targets_law(plans: str, name: str, verifier: str) -> None:
    assert fit(DRAFTERS[name], verifier, PLANS[plans]) > PASSES


@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_a_length_for_each_branch(verifier: str) -> None:
    drafter = CascadeDrafter(TARGET.info, DRAFTERS["one-shot"], shortest=1, lookup_len=4)
    assert fit(drafter, verifier, BRANCHES) > PASSES


@pytest.mark.parametrize("name", CHAINS)
def test_matching_gives_one_text_whatever_the_plans(name: str) -> None:
    match = VERIFIERS["match"]
    plain = sample(DRAFTERS["none"], match, [DraftPlan((0,))])
    assert torch.equal(sample(DRAFTERS[name], match, PLANS["all"]), plain)


def test_confidence_cuts_some_drafts_and_not_others() -> None:
    """Else the tests above would say little; a round no row of which is sure is a plain one."""
    batch = Batch.of([[0], [1], [2]] * 10, [PARAMS] * 30, range(30))
    run = decode.start(TARGET, DRAFTERS["one-shot"], batch)
    run.drafter.admit(run.state, run.context, torch.arange(30))
    sizes = decode.step(run, DraftPlan((3,), 1.0, CONFIDENCE)).draft.sizes
    assert {0, 3} & set(sizes.tolist()) and len(set(sizes.tolist())) > 1
    assert decode.step(run, DraftPlan((3,), 1.0, 1.0)).draft.tokens.shape[1] == 0


# ---- planted bugs ----


def cut_at_the_token(draft: Draft, confidence: float) -> Draft:
    """BUG: a draft ends before the first token that is itself unlikely, which is dropped for it."""
    chance = draft.token_probs()
    if chance is None or not draft.tokens.shape[1]:
        return draft
    sure = (chance >= confidence).long().cumprod(1).sum(1)
    return replace(draft, size=torch.minimum(draft.sizes, sure))


def cut_by_the_last(draft: Draft, confidence: float) -> Draft:
    """BUG: a whole draft goes where its last position, to which its tokens led, is unsure."""
    if draft.probs is None or not draft.tokens.shape[1]:
        return draft
    sure = draft.probs[:, -1].amax(-1) >= confidence
    return replace(draft, size=torch.where(sure, draft.sizes, 0))


class UntemperedReport(DenoisingDrafter[None]):
    """BUG: draws at the round's draft temperature, and reports the probabilities without it."""

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        plain = replace(context, batch=replace(context.batch, params=self.params(context)))
        return replace(draft, probs=super().propose(plain, state, noise, draft_len).probs)

    def params(self, context: Context) -> Any:
        rows = len(context.batch.length)
        return Batch.of([[1]] * rows, [PARAMS] * rows, range(rows)).params


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize(
    ("bug", "name"), [(cut_at_the_token, "one-shot"), (cut_by_the_last, "autoregressive")]
)
def test_a_length_rule_that_looks_at_drawn_tokens_is_caught(
    bug: Callable[..., Draft], name: str, verifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_confident", bug)
    assert fit(DRAFTERS[name], verifier, PLANS["confidence"]) < CAUGHT


@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_a_temperature_missing_in_the_report_is_caught(verifier: str) -> None:
    plans = [DraftPlan((3,), 0.4)]
    assert fit(UntemperedReport(DENOISER), verifier, plans) < CAUGHT
