"""At temperature 0 every verifier accepts while the draft is the argmax, then emits the argmax."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from enumeration import Cases
from torch import Tensor

import tiny
from doubles import Grid
from specdiff import decode
from specdiff.check.doubles import TableDrafter
from specdiff.logits_processors import process_logits
from specdiff.noise import Noise
from specdiff.sampling import distribution, most_likely
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Draft, SamplingParams, Verification
from specdiff.verify import VERIFIERS, Verifier, agree

ALMOST_ONE = 1 - 1e-9  # block's thresholds of 1 are subject to rounding
SHAPES = ("left-to-right", "zeros", "point", "columns", "columns zeros")
Agree = Callable[[Draft, Tensor], Verification]


def greedy_rows(shape: str, V: int, K: int) -> tuple[Draft, Tensor]:
    """Every draft that q can draw, against random argmaxes."""
    cases = Cases.random(shape, V, K, 40, ragged=True, seed=V + K)
    draft, p = cases.rows()
    possible = cases.chance.flatten() > 0
    probs = None if draft.probs is None else draft.probs[possible]
    assert draft.size is not None
    kept = Draft(draft.tokens[possible], probs, draft.size[possible], columns=draft.columns)
    return kept, p[possible].argmax(-1)


def disagreements(name: str, greedy: Agree) -> int:
    """In how many rows the rule differs from the verifier with one-hot p, whatever the noise."""
    count = 0
    for shape, V, K in itertools.product(SHAPES, (2, 3, 4), (0, 1, 2, 3)):
        draft, best = greedy_rows(shape, V, K)
        own = greedy(draft, best)
        p = F.one_hot(best, V).double()
        for u in (0.0, 0.5, ALMOST_ONE):
            grid = torch.full((len(best), K + 1), u, dtype=torch.float64)
            gumbels = torch.full((len(best), K + 1, V), 30 * u, dtype=torch.float64)
            noise = Grid.holding(
                len(best), gumbels=gumbels, ratio=grid[:, :K], residual=grid[:, :1], target=grid
            )
            whole = VERIFIERS[name](draft, p, noise)
            wrong = (whole.tokens != own.tokens).any(1) | (whole.accepted != own.accepted)
            count += int(wrong.sum())
    return count


@pytest.mark.parametrize("name", list(VERIFIERS))
def test_agreeing_with_the_argmax_is_every_verifier_with_one_hot_targets(name: str) -> None:
    assert disagreements(name, agree) == 0


def off_by_one(draft: Draft, best: Tensor) -> Verification:
    return agree(draft, best.roll(-1, dims=1))


def blind_to_size(draft: Draft, best: Tensor) -> Verification:
    return agree(Draft(draft.tokens), best)


@pytest.mark.parametrize("bug", [off_by_one, blind_to_size])
@pytest.mark.parametrize("name", list(VERIFIERS))
def test_a_planted_bug_disagrees(name: str, bug: Agree) -> None:
    assert disagreements(name, bug) > 100


OPTIONS = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.7, "presence_penalty": 0.9, "frequency_penalty": -0.8},
    "bias": {"logit_bias": {1: 2.5, 3: -4.0}},
    "allowed": {"allowed_token_ids": [1, 2, 4]},
    "filters": {"top_k": 2, "top_p": 0.5, "min_p": 0.2},
}


@pytest.mark.parametrize("options", list(OPTIONS))
def test_the_argmax_is_the_one_hot_distributions_ties_included(options: str) -> None:
    generator = torch.Generator().manual_seed(3)
    params = [SamplingParams(temperature=0, **OPTIONS[options])] * 6
    prompts = [torch.randint(6, (5,), generator=generator).tolist() for _ in range(6)]
    batch = Batch.of(prompts, params, range(6))
    assert batch.params.all_greedy
    logits = torch.randint(-2, 3, (6, 4, 6), generator=generator).to(torch.bfloat16)
    draft = Draft(torch.randint(6, (6, 3), generator=generator))
    best = most_likely(process_logits(logits, batch, draft))
    assert torch.equal(F.one_hot(best, 6).float(), distribution(logits, batch, draft))


@pytest.mark.parametrize("name", list(VERIFIERS))
@pytest.mark.parametrize("options", list(OPTIONS))
def test_a_round_is_that_of_a_verifier_that_takes_p(name: str, options: str) -> None:
    """A verifier of the user's own gets p, and the texts are the same."""
    calls = 0

    def own(draft: Draft, p: Tensor, noise: Noise) -> Verification:
        nonlocal calls
        calls += 1
        assert torch.equal(p.sum(-1), torch.ones_like(p[..., 0]))
        return VERIFIERS[name](draft, p, noise)

    def texts(verifier: Verifier) -> list[list[int]]:
        batch = Batch.of(
            [[1, 2], [3], [0, 4, 4]],
            [SamplingParams(max_tokens=12, temperature=0, **OPTIONS[options])] * 3,
            range(3),
        )
        target = TableTarget.random(6, seed=1)
        rounds = list(decode.decode(target, TableDrafter(6), batch, verifier=verifier, draft_len=3))
        return tiny.rows_of(rounds[-1].batch)

    assert texts(own) == texts(VERIFIERS[name]) and calls > 0
