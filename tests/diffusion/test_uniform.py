"""The uniform process against its definition: loops, matrix exponentials, Bayes, real sizes."""

import math

import pytest
import torch

from specdiff.diffusion.process import Absorbing, Process, Uniform
from specdiff.errors import UsageError

TOKENS = 5
PROCESS = Uniform(TOKENS)
X = torch.tensor([[0, 4, 3, 1]])
X0 = torch.tensor([[0, 2, 3, 4]])


def rate_matrix() -> torch.Tensor:
    """Q[i, j]: the rate at which j turns into i (columns sum to zero)."""
    return torch.full((TOKENS, TOKENS), 1 / TOKENS, dtype=torch.float64) - torch.eye(
        TOKENS, dtype=torch.float64
    )


def double(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def random_score(seed: int = 0) -> torch.Tensor:
    score = (
        torch.rand(1, 4, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        + 0.1
    )
    return score.scatter(-1, X[..., None], 1.0)


def true_ratios(sigma: float, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """p(y | x0) / p(x | x0) by brute force."""
    law = torch.matrix_exp(sigma * rate_matrix())[:, x0].movedim(0, -1)
    return law / law.gather(-1, x[..., None])


def slow_score_entropy(log_score: list[float], ratios: list[float], x: int) -> float:
    """SEDD, eq. 3, term by term, with the rate 1/V as weight."""
    terms = (
        math.exp(s) - r * s + r * (math.log(r) - 1)
        for y, (s, r) in enumerate(zip(log_score, ratios, strict=True))
        if y != x
    )
    return math.fsum(terms) / len(log_score)


def test_both_processes_are_processes() -> None:
    assert isinstance(PROCESS, Process) and isinstance(Absorbing(TOKENS), Process)
    assert PROCESS.states == PROCESS.tokens == TOKENS
    assert not hasattr(PROCESS, "mask_id")


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0, 20.0])
def test_transition_is_the_matrix_exponential_of_the_rate(sigma: float) -> None:
    exact = torch.matrix_exp(sigma * rate_matrix())
    assert torch.allclose(PROCESS.transp_transition(X, double(sigma)), exact[X], atol=1e-12)
    assert torch.allclose(PROCESS.transp_rate(X).double(), rate_matrix()[X])


@pytest.mark.parametrize("delta", [1e-3, 0.5, 2.0])
def test_staggered_score_is_the_inverse_exponential_applied(delta: float) -> None:
    exact = random_score() @ torch.matrix_exp(-delta * rate_matrix()).T
    assert torch.allclose(PROCESS.staggered_score(random_score(), double(delta)), exact, atol=1e-9)


def test_an_analytic_step_of_the_true_score_is_the_exact_posterior() -> None:
    """Bayes: p(y earlier | x now) = p(y earlier) p(x now | y) / p(x now), for any data."""
    data = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    now, earlier = (
        torch.matrix_exp(1.1 * rate_matrix()) @ data,
        torch.matrix_exp(0.4 * rate_matrix()) @ data,
    )
    score = now / now[X][..., None]
    got = PROCESS.staggered_score(score, double(0.7)) * PROCESS.transp_transition(X, double(0.7))
    assert torch.allclose(
        got, earlier * torch.matrix_exp(0.7 * rate_matrix())[X] / now[X][..., None], atol=1e-12
    )


@pytest.mark.parametrize("process", [PROCESS, Absorbing(TOKENS - 1)])
def test_reverse_rate_is_transposed_rate_times_score_with_columns_that_sum_to_zero(
    process: Process,
) -> None:
    score = random_score()
    got, rate = process.reverse_rate(X, score), process.transp_rate(X)
    for i in range(4):
        x = int(X[0, i])
        for y in range(TOKENS):
            off = [float(rate[0, i, z] * score[0, i, z]) for z in range(TOKENS) if z != x]
            assert got[0, i, y].item() == pytest.approx(
                -sum(off) if y == x else float(rate[0, i, y] * score[0, i, y]), abs=1e-12
            )


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0, 20.0])
def test_score_entropy_against_a_slow_version(sigma: float) -> None:
    log_score, ratios = random_score().log(), true_ratios(sigma, X, X0)
    got = PROCESS.score_entropy(log_score, double(sigma), X, X0)
    for i in range(4):
        slow = slow_score_entropy(log_score[0, i].tolist(), ratios[0, i].tolist(), int(X[0, i]))
        assert got[0, i].item() == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("sigma", [1e-2, 0.7, 5.0])
def test_score_entropy_is_zero_at_the_true_ratio_and_positive_elsewhere(sigma: float) -> None:
    truth = true_ratios(sigma, X, X0).log().requires_grad_()
    loss = PROCESS.score_entropy(truth, double(sigma), X, X0)
    loss.sum().backward()
    # the error of matrix_exp
    assert loss.abs().max() < 1e-11 and truth.grad is not None and truth.grad.abs().max() < 1e-8
    for seed in range(5):
        away = truth.detach() + 0.1 * torch.randn(
            1, 4, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        assert (
            PROCESS.score_entropy(away.scatter(-1, X[..., None], 0), double(sigma), X, X0) > 0
        ).all()


def test_gradient_of_score_entropy() -> None:
    log_score = random_score().log().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: PROCESS.score_entropy(s, double(0.7), X, X0), log_score
    )


@pytest.mark.parametrize("near", [True, False], ids=["near the truth", "anywhere"])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.1, 5.0, 20.0])
def test_score_entropy_in_float32_at_a_real_vocabulary(sigma: float, near: bool) -> None:
    """Against sums of exact float64 terms.

    At low noise the authors' formula for the ratio is NaN, or off by its whole size.
    """
    process, x, x0 = Uniform(50257), torch.tensor([[7, 7]]), torch.tensor([[7, 50256]])
    odds = 1 + process.tokens / math.expm1(torch.tensor(sigma).item())
    ratios = torch.ones(1, 2, process.tokens, dtype=torch.float64)
    ratios[0, 0], ratios[0, 1, 50256] = 1 / odds, odds
    ratios[0, :, 7] = 1
    noise = torch.randn(1, 2, process.tokens, generator=torch.Generator().manual_seed(0))
    log_score = 0.5 * noise + ratios.log().float() if near else noise
    log_score = log_score.scatter(-1, x[..., None], 0).requires_grad_()
    got = process.score_entropy(log_score, torch.tensor([[sigma]]), x, x0)
    got.sum().backward()
    assert got.dtype == torch.float32 and log_score.grad is not None
    for i in range(2):
        slow = slow_score_entropy(log_score[0, i].tolist(), ratios[0, i].tolist(), 7)
        assert got[0, i].item() == pytest.approx(slow, rel=1e-4)
    gradient = ((log_score.double().exp() - ratios) / process.tokens).scatter(-1, x[..., None], 0)
    assert torch.allclose(
        log_score.grad.double(), gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.1, 5.0, 20.0])
def test_transition_in_float32_at_a_real_vocabulary(sigma: float) -> None:
    process, x = Uniform(50257), torch.tensor([[7]])
    got = process.transp_transition(x, torch.tensor([[sigma]]))
    onto = -math.expm1(-torch.tensor(sigma).item()) / process.tokens
    assert got[0, 0, 8].item() == pytest.approx(onto, rel=1e-5)
    assert got[0, 0, 7].item() == pytest.approx(math.exp(-sigma) + onto, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_corruption_follows_the_transition(sigma: float) -> None:
    """Over a fine grid of uniforms the shares are the transition's, to the grid's step."""
    n = 20_000
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[None]
    out = PROCESS.corrupt(torch.full((1, n), 2), double(sigma), u)
    shares = torch.bincount(out[0], minlength=TOKENS) / n
    law = torch.matrix_exp(sigma * rate_matrix())[:, 2]
    assert (shares - law).abs().max() < 2 / n


@pytest.mark.parametrize("sigma", [1e-5, 0.1, 20.0])
def test_corruption_gives_every_token_of_a_real_vocabulary_the_same_share(sigma: float) -> None:
    process = Uniform(50257)
    threshold = -math.expm1(-torch.tensor(sigma).item())
    tokens = torch.arange(process.tokens, dtype=torch.float64)
    x0 = torch.full((1, process.tokens), 7)
    # token j owns [j, j + 1) / V of the threshold, nearly to both ends
    for place in (
        1e-4,
        0.5,
        1 - 1e-4,
    ):
        got = process.corrupt(
            x0, torch.tensor([[sigma]]), threshold * ((tokens + place) / process.tokens)[None]
        )
        assert (got[0] == tokens.long()).all()
    for V in (2, 3, 5, 32768, 50257, 65535):
        edges = torch.tensor(
            [[0.0, math.nextafter(threshold, 0), math.nextafter(threshold, 1)]], dtype=torch.float64
        )
        assert Uniform(V).corrupt(
            torch.ones(1, 3, dtype=torch.long), torch.tensor([[sigma]]), edges
        ).tolist() == [[0, V - 1, 1]]


def test_corruption_refuses_uniforms_with_too_few_bits() -> None:
    with pytest.raises(UsageError, match=r"float64 uniforms, got torch\.float32"):
        PROCESS.corrupt(X0, torch.tensor([[0.5]]), torch.rand(1, 4))
