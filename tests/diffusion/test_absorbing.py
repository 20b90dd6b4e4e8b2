"""The absorbing process against its definition: loops, matrix exponentials, SEDD's identities."""

import math

import pytest
import torch

from specdiff.diffusion import reverse
from specdiff.diffusion.process import Absorbing
from specdiff.diffusion.schedule import Geometric, Loglinear

TOKENS = 5
PROCESS = Absorbing(TOKENS)
MASK = PROCESS.mask_id
X = torch.tensor([[0, MASK, 3, MASK]])
X0 = torch.tensor([[0, 2, 3, 4]])


def rate_matrix() -> torch.Tensor:
    """Q[i, j]: the rate at which j turns into i (columns sum to zero)."""
    q = torch.zeros(TOKENS + 1, TOKENS + 1, dtype=torch.float64)
    q[MASK, :TOKENS] = 1
    q[range(TOKENS), range(TOKENS)] = -1
    return q


def random_score(seed: int = 0) -> torch.Tensor:
    score = (
        torch.rand(
            1, 4, TOKENS + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        + 0.1
    )
    return score.scatter(-1, X[..., None], 1.0)


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0, 6.9])
def test_transition_is_the_matrix_exponential_of_the_rate(sigma: float) -> None:
    exact = torch.matrix_exp(sigma * rate_matrix())
    got = PROCESS.transp_transition(X, torch.tensor([[sigma]], dtype=torch.float64))
    assert torch.allclose(got, exact[X], atol=1e-12)
    assert torch.allclose(PROCESS.transp_rate(X).double(), rate_matrix()[X])


@pytest.mark.parametrize("delta", [1e-3, 0.5, 2.0])
def test_staggered_score_is_the_inverse_exponential_applied(delta: float) -> None:
    score = random_score()
    exact = score @ torch.matrix_exp(-delta * rate_matrix()).T
    got = PROCESS.staggered_score(score, torch.tensor([[delta]], dtype=torch.float64))
    masked = X == MASK
    assert torch.allclose(got[masked], exact[masked], atol=1e-9)


def test_reverse_rate_sums_to_zero_and_leaves_only_masks() -> None:
    rate = PROCESS.reverse_rate(X, random_score())
    assert torch.allclose(rate.sum(-1), torch.zeros(1, 4, dtype=torch.float64), atol=1e-12)
    assert (rate[X != MASK] == 0).all()
    assert (rate[0, 1, :TOKENS] == random_score()[0, 1, :TOKENS]).all()


def test_score_entropy_against_a_slow_version() -> None:
    log_score, sigma = random_score().log(), torch.tensor([[0.7]], dtype=torch.float64)
    got = PROCESS.score_entropy(log_score, sigma, X, X0)
    r = 1 / (math.exp(0.7) - 1)
    for i in range(4):
        if X[0, i] != MASK:
            assert got[0, i] == 0
            continue
        s = log_score[0, i].exp().tolist()
        slow = sum(s[y] for y in range(TOKENS)) - r * math.log(s[X0[0, i]]) + r * (math.log(r) - 1)
        assert got[0, i].item() == pytest.approx(slow, rel=1e-12)


def test_score_entropy_is_zero_at_the_true_ratio_and_has_no_gradient_there() -> None:
    sigma = torch.tensor([[0.7]], dtype=torch.float64)
    point = torch.full((1, 1, TOKENS + 1), -40.0, dtype=torch.float64)
    # the score of a known x0: p(x0)/p(MASK) = 1/(e^sigma - 1)
    point[0, 0, 2] = -math.log(math.expm1(0.7))
    point.requires_grad_()
    loss = PROCESS.score_entropy(point, sigma, torch.tensor([[MASK]]), torch.tensor([[2]]))
    loss.sum().backward()
    assert abs(loss.item()) < 1e-12
    assert point.grad is not None and point.grad.abs().max() < 1e-9


def test_weighted_score_entropy_is_cross_entropy_over_t_up_to_a_constant() -> None:
    """With s = p/(e^sigma - 1), sigma' SE = CE sigma'/(e^sigma - 1) + const.

    That is CE/t for the loglinear schedule.
    """
    schedule, t = Loglinear(), torch.tensor([0.37], dtype=torch.float64)
    sigma = schedule.total(t)[:, None]
    x, x0 = torch.tensor([[MASK]]), torch.tensor([[1]])
    values = []
    for seed in range(3):
        p = torch.softmax(
            torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
            -1,
        )
        log_score = torch.cat(
            [(p / torch.expm1(sigma[0])).log(), torch.zeros(1, dtype=torch.float64)]
        )[None, None]
        loss = schedule.rate(t) * PROCESS.score_entropy(log_score, sigma, x, x0)[0]
        values.append((loss - (-p[1].log() / t)).item())
    assert max(values) - min(values) < 1e-9


def test_analytic_step_of_a_true_score_is_the_exact_posterior() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    sigma, earlier = (
        torch.tensor([[1.1]], dtype=torch.float64),
        torch.tensor([[0.4]], dtype=torch.float64),
    )
    score = torch.cat([p / torch.expm1(sigma[0]), torch.ones(1, dtype=torch.float64)])[None, None]
    got = reverse.analytic(PROCESS, score, torch.tensor([[MASK]]), sigma - earlier)
    masked, masked_earlier = -torch.expm1(-sigma[0, 0]), -torch.expm1(-earlier[0, 0])
    assert torch.allclose(got[0, 0, :TOKENS], p * (masked - masked_earlier) / masked, atol=1e-12)
    assert got[0, 0, MASK].item() == pytest.approx((masked_earlier / masked).item())
    assert torch.allclose(
        reverse.denoise(PROCESS, score, torch.tensor([[MASK]]), sigma)[0, 0], p, atol=1e-12
    )


def test_an_analytic_step_clamps_what_a_learned_score_makes_negative() -> None:
    score = torch.ones(1, 1, TOKENS + 1, dtype=torch.float64)  # P(stay) = 1 - (e^d - 1) sum s < 0
    got = reverse.analytic(
        PROCESS, score, torch.tensor([[MASK]]), torch.tensor([[2.0]], dtype=torch.float64)
    )
    assert (got >= 0).all() and got[0, 0, MASK] == 0 and got.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("passes", [1, 5, 33])
def test_sampling_with_the_true_score_gives_independent_tokens_of_the_data_law(passes: int) -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    rows = 40_000
    generator = torch.Generator().manual_seed(passes)

    def log_score(ids: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        at_mask = torch.cat([p, torch.ones(1, dtype=torch.float64)]).log() - torch.cat(
            [torch.expm1(sigma[:1]).log().repeat(TOKENS), torch.zeros(1)]
        )
        return torch.where((ids == MASK)[..., None], at_mask, 0.0).scatter(-1, ids[..., None], 0.0)

    x = torch.full((rows, 3), MASK)
    x[:, 1] = 4
    uniform = lambda i: torch.rand(rows, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    out = reverse.sample(log_score, PROCESS, Loglinear(), x, x == MASK, passes, uniform)
    assert (out[:, 1] == 4).all() and (out < TOKENS).all()
    for column in (0, 2):
        counts = torch.bincount(out[:, column], minlength=TOKENS).double()
        chi2 = ((counts - rows * p) ** 2 / (rows * p)).sum().item()
        assert chi2 < 23.5  # chi-square with 4 degrees of freedom, p = 1e-4


def test_corruption_masks_the_scheduled_share() -> None:
    schedule = Loglinear()
    u = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    for t in (0.1, 0.6, 1.0):
        sigma = schedule.total(torch.tensor(t))
        share = (
            (PROCESS.corrupt(torch.zeros_like(u, dtype=torch.long), sigma.expand_as(u), u) == MASK)
            .float()
            .mean()
            .item()
        )
        assert share == pytest.approx((1 - schedule.eps) * t, abs=5e-3)


@pytest.mark.parametrize("schedule", [Loglinear(), Geometric(1e-3, 5.0)])
def test_rate_is_the_derivative_and_time_inverts_the_masked_share(
    schedule: Loglinear | Geometric,
) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.total(t).sum(), t)
    assert torch.allclose(slope, schedule.rate(t), rtol=1e-9)
    for share in (0.1, 0.5, 0.9):
        t_share = torch.tensor(schedule.time_of_masked_share(share), dtype=torch.float64)
        assert -torch.expm1(-schedule.total(t_share)).item() == pytest.approx(share)
    assert schedule.time_of_masked_share(1.0) == 1.0
