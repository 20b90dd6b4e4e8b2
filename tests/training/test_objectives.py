"""Every objective against a slow loop, its gradient against finite differences, and its edges."""

import math

import pytest
import torch

from specdiff.diffusion.process import Absorbing, Process, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear
from specdiff.errors import UsageError
from specdiff.training import objectives

C = 6
INF = math.inf


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher(columns: int = C, of: int = 9) -> torch.Tensor:
    """[2, 3, C]: log-probabilities of a larger vocabulary, of which these columns are a part."""
    return normal(2, 3, of, seed=1).log_softmax(-1)[..., :columns]


def chances(*shape: int) -> torch.Tensor:
    return normal(*shape, seed=2).sigmoid()


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.fsum(math.exp(v - top) for v in row)
    return [math.exp(v - top) / total for v in row]


def slow_divergence(name: str, logits: list[float], logprobs: list[float]) -> float:
    q = softmax(logits)
    p = [math.exp(v) for v in logprobs]
    forward = math.fsum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True) if b > 0)
    common = math.fsum(min(a, b) for a, b in zip(q, p, strict=True))
    if name == "forward":
        return forward
    if name == "reverse":
        return math.fsum(
            a * (math.log(a) - max(b, -30.0)) for a, b in zip(q, logprobs, strict=True)
        )
    if name == "tv":
        return -math.log(common)
    if name == "l1":
        return math.fsum(abs(a - b) for a, b in zip(q, p, strict=True))
    distance = -3 * math.log(common) if name == "log_hybrid" else 1 - common
    return math.exp(-3 * common) * forward + (1 - math.exp(-3 * common)) * distance


@pytest.mark.parametrize("schedule", [Loglinear(), Geometric(1e-3, 5.0)])
@pytest.mark.parametrize("process", [Absorbing(5), Uniform(5)])
def test_score_entropy_weighs_each_row_by_its_rate(
    process: Process, schedule: Loglinear | Geometric
) -> None:
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    x0 = torch.tensor([[0, 1, 2], [3, 4, 0]])
    x = torch.tensor([[process.states - 1, 1, process.states - 1], [process.states - 1, 4, 1]])
    log_score = normal(2, 3, process.states).scatter(-1, x[..., None], 0)
    got = objectives.score_entropy(process, schedule, log_score, t, x, x0)
    for b in range(2):
        for i in range(3):
            sigma = schedule.total(t[b]).reshape(1, 1)
            one = process.score_entropy(
                log_score[b, i][None, None], sigma, x[b, i].reshape(1, 1), x0[b, i].reshape(1, 1)
            )
            assert got[b, i].item() == pytest.approx(
                schedule.rate(t[b]).item() * one.item(), rel=1e-12
            )
    assert torch.autograd.gradcheck(
        lambda s: objectives.score_entropy(process, schedule, s, t, x, x0).sum(),
        log_score.clone().requires_grad_(),
    )


def test_score_entropy_of_a_denoiser_is_cross_entropy_over_t_up_to_a_constant() -> None:
    """s = softmax(logits)/(e^sigma - 1): at every MASK the same gradient, and one constant."""
    process = Absorbing(C)
    schedule = Loglinear()
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    x0 = torch.tensor([[0, 5, 2], [1, 3, 4]])
    x = torch.full_like(x0, process.mask_id)
    differences = []
    for seed in range(3):
        logits = normal(2, 3, C, seed=seed).requires_grad_()
        log_score = logits.log_softmax(-1) - torch.expm1(schedule.total(t)).log()[:, None, None]
        entropy = objectives.score_entropy(
            process, schedule, torch.nn.functional.pad(log_score, (0, 1)), t, x, x0
        )
        cross = objectives.cross_entropy(logits, x0, t[:, None].expand(2, 3))
        differences.append((entropy - cross).detach())
        gradients = [
            torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
            for loss in (entropy, cross)
        ]
        assert torch.allclose(*gradients, atol=1e-10)
    assert torch.allclose(differences[0], differences[1], atol=1e-9)
    assert torch.allclose(differences[0], differences[2], atol=1e-9)


@pytest.mark.parametrize("timed", [True, False])
def test_denoise_against_a_slow_version(timed: bool) -> None:
    logits = normal(2, 3, C).requires_grad_()
    truth = torch.tensor([[0, 5, -1], [-100, 2, 2]])
    t = torch.tensor([[0.1, 0.5, 0.5], [0.0, 1.0, 0.3]], dtype=torch.float64) if timed else None
    got = objectives.cross_entropy(logits, truth, t)
    for b in range(2):
        for i in range(3):
            k = int(truth[b, i])
            slow = -math.log(softmax(logits[b, i].tolist())[k]) if k >= 0 else 0.0
            if k >= 0 and t is not None:
                slow /= t[b, i].item()
            assert got[b, i].item() == pytest.approx(slow, rel=1e-12)
    got.sum().backward()
    assert (got[truth < 0] == 0).all()
    assert logits.grad is not None
    assert (logits.grad[truth < 0] == 0).all()
    assert logits.grad.isfinite().all()
    assert torch.autograd.gradcheck(
        lambda z: objectives.cross_entropy(z, truth, t), logits.detach().requires_grad_()
    )


def test_denoise_takes_any_leading_shape() -> None:
    logits = normal(C)
    truth = torch.tensor(3)
    assert objectives.cross_entropy(logits, truth).shape == ()
    assert objectives.cross_entropy(logits[None, None], truth[None, None])[
        0, 0
    ] == objectives.cross_entropy(logits, truth)
    assert objectives.cross_entropy(logits.new_zeros(0, C), truth.new_zeros(0)).shape == (0,)


@pytest.mark.parametrize("divergence", objectives.DIVERGENCES)
def test_distill_against_a_slow_version(divergence: str) -> None:
    logits = normal(2, 3, C)
    logprobs = teacher()
    logprobs[0, 0, 2:4] = -INF
    logprobs[0, 1] = normal(C, seed=3).log_softmax(-1)  # no mass outside
    got = objectives.distill(logits, logprobs, divergence)
    for b in range(2):
        for i in range(3):
            slow = slow_divergence(divergence, logits[b, i].tolist(), logprobs[b, i].tolist())
            assert got[b, i].item() == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("divergence", [d for d in objectives.DIVERGENCES if "hybrid" not in d])
def test_gradient_of_distill(divergence: str) -> None:
    logprobs = teacher()
    logprobs[0, 0, 2:4] = -INF
    assert torch.autograd.gradcheck(
        lambda z: objectives.distill(z, logprobs, divergence), normal(2, 3, C).requires_grad_()
    )


def test_gradient_of_the_hybrid_holds_its_weights_fixed() -> None:
    logits = normal(2, 3, C).requires_grad_()
    logprobs = teacher()
    trust = torch.exp(-3 * objectives.overlap(logits, logprobs)).detach()

    def fixed(z: torch.Tensor) -> torch.Tensor:
        return trust * objectives.distill(z, logprobs, "forward") + (1 - trust) * (
            1 - objectives.overlap(z, logprobs)
        )

    assert torch.autograd.gradcheck(fixed, logits)
    grads = [
        torch.autograd.grad(f.sum(), logits)[0]
        for f in (fixed(logits), objectives.distill(logits, logprobs, "hybrid"))
    ]
    assert torch.allclose(*grads, atol=1e-12)


def test_what_each_divergence_is_of_the_full_vocabulary() -> None:
    """The claims of the docstring, with the outside columns written out and q = 0 there."""
    full = normal(2, 3, 9, seed=1).softmax(-1)
    logits = normal(2, 3, C)
    inside = full[..., :C]
    q = torch.nn.functional.pad(logits.softmax(-1), (0, 3))
    P = inside.sum(-1)
    a = torch.minimum(full, q).sum(-1)
    got = {d: objectives.distill(logits, inside.log(), d) for d in objectives.DIVERGENCES}
    renormalized = inside / P[..., None]
    kl = (renormalized * (renormalized.log() - logits.log_softmax(-1))).sum(-1)
    assert torch.allclose(got["forward"], P * kl + P * P.log())
    assert torch.allclose(got["reverse"], torch.special.xlogy(q, q / full).sum(-1))
    assert torch.allclose(got["tv"], -a.log())
    assert torch.allclose(got["l1"] + 1 - P, (full - q).abs().sum(-1))
    assert torch.allclose(got["l1"] + 1 - P, 2 * (1 - a))
    assert torch.allclose(
        got["hybrid"],
        torch.exp(-3 * a) * got["forward"] + (1 - torch.exp(-3 * a)) * (full - q).abs().sum(-1) / 2,
    )
    assert torch.allclose(objectives.overlap(logits, inside.log()), a)
    best = {
        d: objectives.distill(renormalized.log(), inside.log(), d) for d in objectives.DIVERGENCES
    }
    assert torch.allclose(best["forward"], P * P.log())
    assert torch.allclose(best["reverse"], -P.log()) and torch.allclose(best["tv"], -P.log())
    assert all((got[d] > best[d]).all() for d in objectives.DIVERGENCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", objectives.DIVERGENCES)
def test_distill_is_finite_at_the_edges(divergence: str, dtype: torch.dtype) -> None:
    """A top-1 teacher, one with no mass here, and a draft whose q underflows."""
    logprobs = torch.full((4, C), -INF, dtype=dtype)
    logprobs[0, 1] = logprobs[2, 1] = 0.0
    logprobs[3] = normal(C).log_softmax(-1).to(dtype)
    logits = normal(4, C).to(dtype)
    logits[2:, 4] += 2000
    logits.requires_grad_()
    loss = objectives.distill(logits, logprobs, divergence)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    assert loss.dtype == dtype and (objectives.overlap(logits, logprobs)[1] == 0)
    # towards the one column with mass
    assert logits.grad[0, 1] < 0
    assert (logits.grad[0, [0, 2, 3, 4, 5]] > 0).sum() >= 4
    if divergence != "reverse":  # which spreads q over columns that are all ruled out
        assert logits.grad[1].abs().max() < 1e-6
    if divergence in ("forward", "tv"):
        assert loss[1].abs() < 1e-6
    if divergence in ("forward", "hybrid", "tv"):
        assert logits.grad[2, 1] == -1


def test_tv_keeps_its_gradient_where_the_overlap_underflows() -> None:
    logprobs = torch.full((C,), -INF)
    logits = torch.zeros(C)
    logprobs[1] = 0.0
    logits[1] = -120.0
    logits.requires_grad_()
    assert objectives.overlap(logits, logprobs) < 1e-37
    (gradient,) = torch.autograd.grad(objectives.distill(logits, logprobs, "tv"), logits)
    assert gradient.tolist() == pytest.approx([0.2, -1.0, 0.2, 0.2, 0.2, 0.2])


def test_an_unknown_divergence_lists_the_choices() -> None:
    with pytest.raises(
        UsageError,
        match="unknown divergence 'kl': choose one of forward, reverse, tv, hybrid, log_hybrid, l1",
    ):
        objectives.distill(normal(2, C), normal(2, C), "kl")


def test_overlap_against_a_slow_version() -> None:
    logits = normal(2, 3, C)
    logprobs = teacher()
    logprobs[0, 0, 2:4] = -INF
    got = objectives.overlap(logits, logprobs)
    for b in range(2):
        for i in range(3):
            pairs = zip(softmax(logits[b, i].tolist()), logprobs[b, i].exp().tolist(), strict=True)
            assert got[b, i].item() == pytest.approx(
                math.fsum(min(pair) for pair in pairs), rel=1e-12
            )
    assert torch.autograd.gradcheck(
        lambda z: objectives.overlap(z, logprobs), logits.requires_grad_()
    )
    assert torch.allclose(
        objectives.overlap(normal(3, C), normal(3, C).log_softmax(-1)),
        torch.ones(3, dtype=torch.float64),
    )


def slow_weights(name: str, q: list[float], scale: float) -> list[float]:
    G = len(q)
    if name == "uniform":
        return [1.0] * G
    if name == "exponential":
        return [math.exp(-(k - 1) / scale) for k in range(1, G + 1)]
    if name == "streak":
        return [math.prod(q[:i]) for i in range(G)]
    return [
        math.fsum(math.prod(0.5 * v + 0.5 for v in q[: m + 1]) for m in range(j, G))
        for j in range(G)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drafted", [1, 2, 7])
@pytest.mark.parametrize("name", sorted(objectives.WEIGHTS))
def test_weights_against_a_slow_version(name: str, drafted: int, dtype: torch.dtype) -> None:
    q = chances(2, 3, drafted).to(dtype)
    q[0, 0, 0] = 0
    q[0, 1, -1] = 1
    q.requires_grad_()
    got = objectives.WEIGHTS[name](q, 3.0)
    assert got.shape == q.shape and got.dtype == dtype and not got.requires_grad
    for b in range(2):
        for i in range(3):
            assert got[b, i].tolist() == pytest.approx(
                slow_weights(name, q[b, i].tolist(), 3.0), rel=1e-6, abs=1e-12
            )
    assert torch.allclose(objectives.WEIGHTS[name](q[0, 0], 3.0), got[0, 0])


def test_the_table_holds_the_four_weights() -> None:
    assert list(objectives.WEIGHTS) == ["d_pace", "exponential", "streak", "uniform"]


def test_d_pace_between_its_ends() -> None:
    """a = 1 counts the positions from j on; a = 0 is the gradient of expected_accepted in log q."""
    q = chances(2, 5)
    assert torch.allclose(
        objectives.d_pace(q, 1.0), torch.arange(5, 0, -1, dtype=torch.float64).expand(2, 5)
    )
    log_q = q.log().requires_grad_()
    (gradient,) = torch.autograd.grad(objectives.expected_accepted(log_q.exp()).sum(), log_q)
    assert torch.allclose(objectives.d_pace(q, 0.0), gradient)


def test_expected_accepted_against_a_slow_version() -> None:
    q = chances(2, 3, 4)
    q[0, 0, 1] = 0
    got = objectives.expected_accepted(q)
    for b in range(2):
        for i in range(3):
            row = q[b, i].tolist()
            assert got[b, i].item() == pytest.approx(
                math.fsum(math.prod(row[: j + 1]) for j in range(4)), rel=1e-12
            )
    assert torch.autograd.gradcheck(objectives.expected_accepted, q.requires_grad_())
