"""The law of texts drafted by SEDD over its target's hidden states, through the real loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import compare, texts
from test_block_law import CAUGHT, NEW, RATIO_TESTS, V, law, target  # noqa: F401 - a fixture

import tiny
from doubles import one_stream
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.noise import Noise
from specdiff.targets.causal import CausalTarget
from specdiff.types import Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

COUNT = 20_000
PASSES = 1e-3 / 30
PARAMS = SamplingParams(max_tokens=NEW)
TAPPED: dict[str, Any] = {**tiny.CACHED, "taps": (0,), "context_window": 9, "draft_vocab_size": 4}


def denoiser(target: CausalTarget) -> SEDDDenoiser:
    """One word is not in its draft vocabulary."""
    network = tiny.sedd(tiny.sedd_config(V, **TAPPED), seed=2)
    with torch.no_grad():
        network.direct.weight.mul_(3)  # so that the features matter
    return SEDDDenoiser(network, target.info, draft_len=3)


def fit(
    target: CausalTarget, drafter: Any, verifier: str, params: SamplingParams = PARAMS
) -> float:
    sample = texts(target, drafter, VERIFIERS[verifier], params, count=COUNT, rows=10_000)
    return float(compare(sample, law(target, params)))


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_texts_have_the_targets_law(target: CausalTarget, steps: int, verifier: str) -> None:
    assert fit(target, DenoisingDrafter(denoiser(target), steps=steps), verifier) > PASSES


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("hot_start", [0.5, "canvas"])
def test_texts_have_the_targets_law_after_a_hot_start(
    target: CausalTarget, hot_start: float | str, verifier: str
) -> None:
    drafter = DenoisingDrafter(denoiser(target), steps=2, hot_start=hot_start)
    assert fit(target, drafter, verifier) > PASSES


@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_texts_have_the_targets_law_in_any_order(target: CausalTarget, verifier: str) -> None:
    assert fit(target, AnyOrderDrafter(denoiser(target), steps=2), verifier) > PASSES


@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_texts_have_the_targets_law_at_a_temperature(target: CausalTarget, verifier: str) -> None:
    cool = SamplingParams(max_tokens=NEW, temperature=0.7)
    assert fit(target, DenoisingDrafter(denoiser(target)), verifier, cool) > PASSES


class Recording(DenoisingDrafter[Any]):
    drafts: list[Draft]

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        self.drafts.append(draft)
        return draft


def test_drafts_are_soft_and_follow_the_context(target: CausalTarget) -> None:
    """Else the tests above would say little."""
    recording = Recording(denoiser(target))
    recording.drafts = []
    texts(target, recording, VERIFIERS["token"], PARAMS, count=64, rows=64)
    probs = torch.cat([draft.probs for draft in recording.drafts if draft.probs is not None])
    assert float(probs.amax(-1).mean()) < 0.95
    assert float(probs[:, 0].std(dim=0).max()) > 0.01


class Stale(DenoisingDrafter[Any]):
    """BUG: reports the probabilities that follow from the features of the round before."""

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        return _reported(super().propose, state.tapped.last, context, state, noise, draft_len)


class OtherRow(DenoisingDrafter[Any]):
    """BUG: reports the probabilities that follow from the features of another row."""

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        other = state.tapped.last.roll(1, dims=0)
        wrong = _reported(super().propose, other, context, state, noise, draft_len)
        return replace(draft, probs=wrong.probs)


def _reported(propose: Any, last: torch.Tensor, *arguments: Any) -> Draft:
    """A draft with the probabilities after another last context state."""
    state = arguments[1]
    draft: Draft = propose(*arguments)
    own = state.tapped.last
    state.tapped.last = last
    probs = propose(*arguments).probs
    state.tapped.last = own
    return replace(draft, probs=probs)


class SharedNoise(DenoisingDrafter[Any]):
    """BUG: draws from the verifier's own uniforms."""

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        return super().propose(context, state, one_stream(noise), draft_len)


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("bug", [Stale, OtherRow, SharedNoise])
def test_bugs_are_caught(
    target: CausalTarget, verifier: str, bug: type[DenoisingDrafter[Any]]
) -> None:
    assert fit(target, bug(denoiser(target)), verifier) < CAUGHT
