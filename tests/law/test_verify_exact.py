"""L1: with every draft and outcome enumerated, a verifier emits exactly the target's law."""

import itertools

import numpy as np
import pytest
import torch
from enumeration import SHAPES, Cases, emitted_law, error, first_failure, worst

from doubles import Grid, early_bonus, no_residual, swapped
from specdiff import verify
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw
from specdiff.types import Batch, Draft, SamplingParams

COUNT = 60  # cases of each size; twelve sizes a shape
SIZES = list(itertools.product((2, 3, 4), (0, 1, 2, 3)))  # V, K
ALMOST_ONE = float(np.nextafter(1, 0))


def cases_of(shape: str, *, ragged: bool) -> list[Cases]:
    return [Cases.random(shape, V, K, COUNT, ragged=ragged, seed=100 * V + K) for V, K in SIZES]


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["token", "block", "match"])
def test_emits_exactly_the_targets_law(name: str, shape: str, ragged: bool) -> None:
    for cases in cases_of(shape, ragged=ragged):
        assert error(verify.PLANS[name], cases, longest=name == "block") <= 1e-12


@pytest.mark.parametrize("name", ["token", "block", "match"])
def test_in_float32_only_rounding_is_lost(name: str) -> None:
    for cases in cases_of("left-to-right", ragged=True):
        draft, p = cases.rows()
        assert draft.probs is not None
        plan = verify.PLANS[name](Draft(draft.tokens, draft.probs.float(), draft.size), p.float())
        assert worst(emitted_law(cases, plan, longest=name == "block")[0], cases) <= 1e-5


def test_one_plan_serves_both_ways_of_matching() -> None:
    assert verify.PLANS["match-gumbel"] is verify.PLANS["match"]


def test_match_is_exact_for_drafts_whose_probabilities_are_wrong() -> None:
    for V, K in SIZES:
        stated, real = (
            Cases.random(shape, V, K, COUNT, seed=V + K) for shape in ("left-to-right", "point")
        )
        plan = verify.match_plan(stated.rows()[0], real.rows()[1])
        assert worst(emitted_law(real, plan, longest=False)[0], real) <= 1e-12
        if K:  # the ratio tests do depend on them, so the line above says something
            assert (
                worst(
                    emitted_law(
                        real, verify.token_plan(stated.rows()[0], real.rows()[1]), longest=False
                    )[0],
                    real,
                )
                > 1e-3
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_block_never_accepts_fewer_than_token(shape: str) -> None:
    gain = 0.0
    for cases in cases_of(shape, ragged=False):
        draft, p = cases.rows()
        token = emitted_law(cases, verify.token_plan(draft, p), longest=False)[1]
        block = emitted_law(cases, verify.block_plan(draft, p), longest=True)[1]
        assert float((block - token).min()) >= -1e-12
        gain = max(gain, float((block - token).max()))
    if shape in ("point", "disjoint", "equal", "columns disjoint"):
        assert gain <= 1e-12  # nothing to gain there
    else:
        assert gain > 0.01


def test_token_accepts_as_often_as_one_minus_total_variation() -> None:
    cases = Cases.random("factorised", 4, 1, COUNT)
    draft, p = cases.rows()
    assert cases.q is not None
    overlap = torch.minimum(cases.p[0], cases.q[0]).sum(-1)[:, 0]
    assert torch.allclose(
        emitted_law(cases, verify.token_plan(draft, p), longest=False)[1], overlap, atol=1e-12
    )


@pytest.mark.parametrize("bug", [swapped, no_residual, early_bonus])
@pytest.mark.parametrize("name", ["token", "block"])
def test_a_planted_bug_breaks_the_law(name: str, bug: object) -> None:
    for shape in ("factorised", "left-to-right", "two groups", "zeros"):
        for V, K in [(2, 1), (3, 2), (4, 3)]:
            cases = Cases.random(shape, V, K, COUNT, seed=7)
            assert error(bug(verify.PLANS[name]), cases, longest=name == "block") > 1e-3  # type: ignore[operator]


def test_what_lies_behind_the_size_is_never_looked_at() -> None:
    cases = Cases.random("left-to-right", 3, 3, COUNT, ragged=True)
    draft, p = cases.rows()
    assert draft.size is not None and draft.probs is not None
    beyond = torch.arange(3) >= draft.size[:, None]
    other = Draft(
        draft.tokens.masked_fill(beyond, 2),
        draft.probs.masked_fill(beyond[..., None], 0),
        draft.size,
    )
    for name, plan in verify.PLANS.items():
        one = plan(draft, p)
        two = plan(other, p.clone())
        assert torch.equal(one.thresholds, two.thresholds), name
        for n in range(4):
            reached = draft.size >= n
            rows = torch.full((len(p),), n)
            assert torch.equal(one.residual(rows)[reached], two.residual(rows)[reached]), name


# ---- the draws follow their plans ----


def some_rows(K: int, rows: int, seed: int) -> tuple[Draft, torch.Tensor, torch.Generator]:
    """Random rows with their draft drawn at random, some tokens impossible under p, ragged."""
    generator = torch.Generator().manual_seed(seed)
    cases = Cases.random(
        "zeros" if seed % 2 else "left-to-right", 4, K, 1 + rows // 4**K, ragged=True, seed=seed
    )
    draft, p = cases.rows()
    assert draft.size is not None
    index = torch.randint(len(p), (rows,), generator=generator)
    index = index[cases.chance.flatten()[index] > 0]
    assert draft.probs is not None
    return (
        Draft(draft.tokens[index], draft.probs[index], draft.size[index]),
        p[index],
        generator,
    )


def uniforms_around(thresholds: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """On, just below and just above each threshold, at the ends of [0, 1) and between."""
    zero = torch.zeros_like(thresholds)
    one = torch.ones_like(thresholds)
    random = torch.rand(thresholds.shape, dtype=torch.float64, generator=generator)
    choices = [
        thresholds,
        thresholds.nextafter(zero),
        thresholds.nextafter(one * 2),
        zero,
        one,
        random,
    ]
    choices = [choice.clamp(0, ALMOST_ONE) for choice in choices]
    picked = torch.randint(len(choices), thresholds.shape, generator=generator)
    return torch.stack(choices).gather(0, picked[None])[0]


def inverse_cdf(law: np.ndarray, u: float) -> int:
    cdf = np.cumsum(law.astype(np.float64))
    return int(np.searchsorted(cdf, min(u * cdf[-1], np.nextafter(cdf[-1], 0)), side="right"))


@pytest.mark.parametrize("K", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["token", "block"])
def test_the_draw_does_what_the_plan_says(name: str, K: int) -> None:
    outcomes = set()
    for seed in range(4):
        draft, p, generator = some_rows(K, 600, seed)
        plan = verify.PLANS[name](draft, p)
        ratio = uniforms_around(plan.thresholds, generator)
        residual = torch.rand(len(p), 1, dtype=torch.float64, generator=generator)
        result = verify.VERIFIERS[name](
            draft, p, Grid.holding(len(p), ratio=ratio, residual=residual)
        )
        laws = torch.stack(
            [plan.residual(torch.full((len(p),), n)) for n in range(K + 1)], dim=1
        ).numpy()
        for row in range(len(p)):
            passed = [bool(ratio[row, k] < plan.thresholds[row, k]) for k in range(K)]
            n = (
                max((k + 1 for k in range(K) if passed[k]), default=0)
                if name == "block"
                else [*passed, False].index(False)
            )
            expected = [
                *draft.tokens[row, :n].tolist(),
                inverse_cdf(laws[row, n], float(residual[row, 0])),
            ]
            assert int(result.accepted[row]) == n
            assert result.tokens[row].tolist() == expected + [0] * (K - n)
            outcomes.add(n)
    assert outcomes == set(range(K + 1))


@pytest.mark.parametrize("name", list(verify.VERIFIERS))
@pytest.mark.parametrize("probs", [False, True], ids=["point", "soft"])
def test_a_token_the_target_never_says_is_never_accepted(name: str, probs: bool) -> None:
    p = torch.tensor(
        [[0.0, 0.5, 0.5], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    ).expand(4, 3, 3)
    q = (
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).expand(4, 2, 3)
        if probs
        else None
    )
    ends = torch.tensor([0.0, 0.0, ALMOST_ONE, 0.5], dtype=torch.float64)[:, None].expand(4, 3)
    noise = Grid.holding(
        4, gumbels=torch.full((4, 3, 3), 30.0), ratio=ends * 0, residual=ends[:, :1], target=ends
    )
    result = verify.VERIFIERS[name](Draft(torch.tensor([[0, 2]]).expand(4, 2), q), p, noise)
    assert result.accepted.tolist() == [0, 0, 0, 0]
    assert set(result.tokens[:, 0].tolist()) <= {1, 2}


@pytest.mark.parametrize("name", ["token", "block"])
def test_a_draft_that_is_the_target_is_always_accepted(name: str) -> None:
    cases = Cases.random("equal", 4, 3, 10)
    draft, p = cases.rows()
    assert torch.allclose(
        verify.PLANS[name](draft, p).thresholds,
        torch.ones(len(p), 3, dtype=torch.float64),
        atol=1e-12,
    )
    top = torch.full((len(p), 3), ALMOST_ONE, dtype=torch.float64)
    result = verify.VERIFIERS[name](draft, p, Grid.holding(len(p), ratio=top, residual=top))
    assert bool((result.accepted == 3).all()) and torch.equal(result.tokens[:, :3], draft.tokens)


def test_matching_draws_have_the_plans_law() -> None:
    """With p in eighths, the midpoints of an 8 x 8 x 8 grid of uniforms give the law exactly."""
    p = torch.tensor([[1, 2, 5], [4, 0, 4], [3, 3, 2]], dtype=torch.float64) / 8
    grid = (
        torch.tensor(list(itertools.product(range(8), repeat=3)), dtype=torch.float64) + 0.5
    ) / 8
    for x in itertools.product(range(3), repeat=2):
        for size in (0, 1, 2):
            one = Draft(torch.tensor([x]), None, torch.tensor([size]))
            plan = verify.match_plan(one, p[None])
            expected = first_failure(plan.thresholds)[0, :, None] * torch.stack(
                [plan.residual(torch.tensor([n]))[0] for n in range(3)]
            )
            draft = Draft(one.tokens.expand(512, 2), None, torch.full((512,), size))
            result = verify.match(draft, p.expand(512, 3, 3), Grid.holding(512, target=grid))
            mass = torch.zeros(3, 3, dtype=torch.float64)
            following = result.tokens.gather(1, result.accepted[:, None])[:, 0]
            mass.index_put_(
                (result.accepted, following),
                torch.tensor(1 / 512, dtype=torch.float64),
                accumulate=True,
            )
            assert float((mass - expected).abs().max()) <= 1e-15


def test_matching_by_gumbel_is_the_argmax_of_shifted_logs() -> None:
    draft, p, generator = some_rows(3, 400, seed=1)
    gumbels = torch.randn(len(p), 4, 4, dtype=torch.float64, generator=generator)
    result = verify.match_gumbel(draft, p, Grid.holding(len(p), gumbels=gumbels))
    with np.errstate(divide="ignore"):
        own = (np.log(p.numpy()) + gumbels.numpy()).argmax(-1)
    assert draft.size is not None
    for row in range(len(p)):
        n = 0
        while n < int(draft.size[row]) and int(draft.tokens[row, n]) == own[row, n]:
            n += 1
        assert int(result.accepted[row]) == n
        assert result.tokens[row].tolist() == [*own[row, : n + 1].tolist(), *[0] * (3 - n)]


@pytest.mark.parametrize("name", list(verify.VERIFIERS))
def test_the_tokens_behind_are_zero_and_the_path_is_the_chain(name: str) -> None:
    draft, p, _ = some_rows(3, 200, seed=2)
    noise = Noise(
        torch.arange(len(p)),
        torch.zeros(len(p), dtype=torch.long),
        torch.ones(len(p), dtype=torch.long),
    )
    result = verify.VERIFIERS[name](draft, p, noise)
    index = torch.arange(4)
    assert draft.size is not None and bool((result.accepted <= draft.size).all())
    assert bool((result.tokens[index > result.accepted[:, None]] == 0).all())
    assert torch.equal(result.path, index.expand(len(p), 4))


def test_block_never_accepts_behind_an_impossible_token() -> None:
    """q(x) = 0 at the second token, where the first already has p = 0.

    0 times infinity must not become acceptance.
    """
    draft = Draft(torch.tensor([[0, 1]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    assert verify.block_plan(draft, p).thresholds.tolist() == [[0, 0]]


def test_matching_draws_with_the_targets_own_uniform_and_gumbel_noise_is_another_method() -> None:
    """The two methods have one law, but not one text.

    A seed's text under `match` must not change with what a drafter shares.
    """
    rows = 400
    batch = Batch.of([[1]] * rows, [SamplingParams()] * rows, range(rows))
    noise = Noise.of(batch)
    p = torch.softmax(
        torch.randn(rows, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), -1
    )
    plain = verify.match(Draft.empty(batch), p, noise).tokens[:, 0]
    gumbel = verify.match_gumbel(Draft.empty(batch), p, noise).tokens[:, 0]
    assert torch.equal(plain, draw(p[:, 0], noise.uniform(Purpose.TARGET, 1)[:, 0]))
    assert torch.equal(gumbel, (p[:, 0].log() + noise.shared(1, 4)[:, 0]).argmax(-1))
    assert 0.2 < (plain == gumbel).double().mean() < 0.8
