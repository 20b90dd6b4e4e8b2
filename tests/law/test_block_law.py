"""The law of texts drafted by the block drafter, through the real loop with a target's features.

Every text's chance is enumerated from the target's forwards over whole prefixes.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import compare, texts

import tiny
from doubles import one_stream
from specdiff.drafters.block import BlockDrafter, BlockState
from specdiff.noise import Noise
from specdiff.targets.causal import CausalTarget
from specdiff.types import Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

V, NEW, PROMPT = 5, 4, 1
COUNT = 20_000  # texts
PASSES = 1e-3 / (4 * len(VERIFIERS))
CAUGHT = 1e-6
RATIO_TESTS = ("token", "block")


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    """Every text has a chance."""
    model = tiny.model("llama", vocab=V, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.dim() > 1 else 1)
    return CausalTarget(model.double(), "tiny")


@torch.inference_mode()
def law(target: CausalTarget, params: SamplingParams) -> dict[tuple[int, ...], float]:
    every = list(itertools.product(range(V), repeat=NEW))
    ids = torch.tensor([[PROMPT, *text[:-1]] for text in every])
    logits = target.model(ids, use_cache=False).logits.double()
    steps = (logits / params.temperature).softmax(-1)
    chances = {}
    for text, rows in zip(every, steps, strict=True):
        chances[text] = float(rows[range(NEW), list(text)].prod())
    return chances


def drafter(
    target: CausalTarget, kind: type[BlockDrafter] = BlockDrafter, **options: Any
) -> BlockDrafter:
    """One word is not in its draft vocabulary, and it cuts drafts of 3."""
    network = tiny.block(V, columns=4, seed=2)
    assert network.markov_head is not None
    with torch.no_grad():
        network.markov_head.w2.weight.mul_(3)  # so that the token before matters
    built = kind(network, target.info, **options)
    built.draft_len = 3
    return built


def fit(
    target: CausalTarget,
    built: Any,
    verifier: str,
    params: SamplingParams = SamplingParams(max_tokens=NEW),  # noqa: B008 - it is frozen
) -> float:
    sample = texts(target, built, VERIFIERS[verifier], params, count=COUNT, rows=10_000)
    return float(compare(sample, law(target, params)))


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_texts_have_the_targets_law(target: CausalTarget, verifier: str) -> None:
    assert fit(target, drafter(target), verifier) > PASSES


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_texts_have_the_targets_law_at_a_temperature(target: CausalTarget, verifier: str) -> None:
    cool = SamplingParams(max_tokens=NEW, temperature=0.7)
    assert fit(target, drafter(target), verifier, cool) > PASSES


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("verifier", RATIO_TESTS)
def test_texts_have_the_targets_law_at_a_draft_temperature(
    target: CausalTarget, verifier: str, temperature: float
) -> None:
    assert fit(target, drafter(target, draft_temperature=temperature), verifier) > PASSES


def test_drafts_are_soft_and_follow_the_context(target: CausalTarget) -> None:
    """Else the tests above would say little."""
    recorded: list[Draft] = []

    class Recording(BlockDrafter):
        def propose(
            self, context: Context, state: BlockState, noise: Noise, draft_len: int
        ) -> Draft:
            recorded.append(super().propose(context, state, noise, draft_len))
            return recorded[-1]

    texts(
        target,
        drafter(target, Recording),
        VERIFIERS["token"],
        SamplingParams(max_tokens=NEW),
        count=64,
        rows=64,
    )
    probs = torch.cat([draft.probs for draft in recorded if draft.probs is not None])
    assert float(probs.amax(-1).mean()) < 0.95
    assert float(probs[:, 0].std(dim=0).max()) > 0.01


class WrongParent(BlockDrafter):
    """BUG: reports each token's probabilities as if it followed the anchor."""

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        assert draft.probs is not None
        honest = self.network.markov
        parents = torch.cat([context.batch.anchor[:, None], draft.tokens[:, :-1]], dim=1)
        own = honest(parents)
        anchors = honest(context.batch.anchor[:, None])
        assert own is not None and anchors is not None
        probs = (draft.probs.log() - own + anchors).softmax(-1)
        return replace(draft, probs=probs)


class OffByOne(BlockDrafter):
    """BUG: reports each slot's probabilities one slot later."""

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        assert draft.probs is not None
        return replace(draft, probs=draft.probs.roll(1, dims=1))


class StaleProbabilities(BlockDrafter):
    """BUG: reports the probabilities of its previous draft."""

    earlier: torch.Tensor | None = None

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        probs = draft.probs if self.earlier is None else self.earlier
        self.earlier = draft.probs
        assert probs is not None
        return replace(draft, probs=probs if probs.shape == draft.probs.shape else draft.probs)


class SharedNoise(BlockDrafter):
    """BUG: draws from the verifier's own uniforms."""

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        return super().propose(context, state, one_stream(noise), draft_len)


@pytest.mark.parametrize("verifier", RATIO_TESTS)
@pytest.mark.parametrize("bug", [WrongParent, OffByOne, StaleProbabilities, SharedNoise])
def test_bugs_are_caught(target: CausalTarget, verifier: str, bug: type[BlockDrafter]) -> None:
    assert fit(target, drafter(target, bug), verifier) < CAUGHT
