"""Reverse samplers of both processes: exact distributions, float64 references, samples.

The distribution of a sampler with T passes is computed, not sampled: all canvases are rows, and
each step's products over positions make one transition matrix. Shapes: M canvases of L = 2
positions, V states.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from specdiff.diffusion import reverse
from specdiff.diffusion.process import Absorbing, Process, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear, Schedule

TOKENS = 3
# two tokens that hang together
DATA = torch.tensor(
    [[0.30, 0.02, 0.05], [0.03, 0.20, 0.02], [0.01, 0.12, 0.25]], dtype=torch.float64
)
FAMILIES: dict[str, tuple[Process, Schedule]] = {
    "absorbing": (Absorbing(TOKENS), Loglinear(1e-5)),
    "absorbing geometric": (Absorbing(TOKENS), Geometric(1e-4, 12.0)),
    "uniform": (Uniform(TOKENS), Loglinear(1e-5)),
    "uniform geometric": (Uniform(TOKENS), Geometric(1e-4, 12.0)),
}
both = pytest.mark.parametrize("sampler", ["analytic", "euler"])
families = pytest.mark.parametrize("family", FAMILIES)


def noised(process: Process, sigma: Tensor) -> Tensor:
    """p_sigma over pairs of states, from DATA, by transition matrices."""
    states = torch.arange(process.states)[None]
    forward = process.transp_transition(states, sigma.view(1, 1))[0]  # row x, column y: from y to x
    return forward[:, :TOKENS] @ DATA @ forward[:, :TOKENS].T


def exact_log_score(process: Process) -> reverse.LogScore:
    def log_score(ids: Tensor, sigma: Tensor) -> Tensor:
        p = noised(process, sigma[0].double())
        # each position changed, the other held
        row = torch.stack([p[:, ids[:, 1]].T, p[ids[:, 0]]], dim=1)
        return (row / p[ids[:, 0], ids[:, 1]][:, None, None]).log()

    return log_score


def law(family: str, sampler: str, passes: int) -> Tensor:
    """Every pair's exact chance after T passes: all canvases are rows of the sampler's steps."""
    process, schedule = FAMILIES[family]
    score, n = exact_log_score(process), process.states
    canvases = torch.tensor(list(itertools.product(range(n), repeat=2)))
    reached = torch.zeros(n, n, dtype=torch.float64)
    if isinstance(process, Absorbing):
        reached[-1, -1] = 1
    else:
        reached[:] = 1 / n**2
    times = torch.linspace(1, reverse.LAST_TIME, passes, dtype=torch.float64)
    for i, now in enumerate(times):
        then = times[i + 1][None] if i + 1 < passes else None
        s = score(canvases, schedule.total(now[None])).exp()
        live = noised(process, schedule.total(now)).flatten() > 0
        # canvases that cannot be: two tokens of a pair the data lacks
        s = torch.where(live[:, None, None], s, 1.0)
        probs = reverse._next(process, schedule, s, canvases, now[None], then, sampler, None)
        step = probs[:, 0, :, None] * probs[:, 1, None, :]
        reached = (reached.flatten()[:, None, None] * step).sum(0)
    return reached


@both
@families
def test_with_the_exact_score_the_samplers_tend_to_the_datas_law(family: str, sampler: str) -> None:
    """The bias of independent updates within a step, and Euler's own, shrinks about as 1 / T."""
    off = [
        float((law(family, sampler, passes) - DATA).abs().sum()) / 2 for passes in (4, 16, 64, 256)
    ]
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(off)), off
    assert off[-1] < 0.02, off


@both
@pytest.mark.parametrize("family", ["absorbing", "uniform geometric"])
def test_samples_follow_that_law(family: str, sampler: str) -> None:
    """Chi-square of samples against DATA after many steps, the computed distribution after few."""
    process, schedule = FAMILIES[family]
    for passes, rows, expected in [(4, 20_000, law(family, sampler, 4)), (200, 4_000, DATA)]:
        generator = torch.Generator().manual_seed(passes)
        x = torch.zeros(rows, 2, dtype=torch.long)
        draws = lambda i, n=rows, g=generator: torch.rand(n, 2, generator=g, dtype=torch.float64)  # noqa: E731
        out = reverse.sample(
            exact_log_score(process), process, schedule, x, x == 0, passes, draws, sampler=sampler
        )
        counts = torch.bincount(out[:, 0] * TOKENS + out[:, 1], minlength=TOKENS**2).double()
        reference = rows * expected.flatten()
        # 8 degrees of freedom, p = 1e-4
        assert ((counts - reference) ** 2 / reference).sum().item() < 31.8, passes


def test_a_wrong_process_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the score is taken as it is, not staggered to the earlier time."""

    def unstaggered(process: Process, score: Tensor, x: Tensor, dsigma: Tensor) -> Tensor:
        probs = score * process.transp_transition(x, dsigma)
        return probs / probs.sum(-1, keepdim=True)

    right = float((law("uniform geometric", "analytic", 16) - DATA).abs().sum())
    monkeypatch.setitem(reverse.SAMPLERS, "analytic", unstaggered)
    assert float((law("uniform geometric", "analytic", 16) - DATA).abs().sum()) > 1.5 * right


@pytest.mark.parametrize(
    "process", [Uniform(50257), Absorbing(50257)], ids=["uniform", "absorbing"]
)
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.1, 5.0, 20.0])
def test_steps_at_a_real_vocabulary(process: Process, sigma: float) -> None:
    """float32 log-scores, near the truth or not, give the float64 definitions' distributions."""
    if isinstance(process, Absorbing):
        x, odds = torch.tensor([[process.mask_id] * 2]), 1 / math.expm1(sigma)
        truth = torch.full((1, 2, process.states), math.log(odds) - 30)
        truth[..., 77] = math.log(odds)
    else:
        x, truth = torch.tensor([[7, 77]]), torch.zeros(1, 2, process.states)
        excess = math.log1p(process.tokens / math.expm1(sigma))
        truth[0, 0, 77], truth[0, 1] = excess, -excess
    noise = torch.randn(1, 2, process.states, generator=torch.Generator().manual_seed(0))
    for log_score in (truth, truth + 0.5 * noise, noise):
        zeroed = log_score.scatter(-1, x[..., None], 0.0)
        score, s = zeroed.double().exp(), torch.tensor([[sigma]], dtype=torch.float64)
        for name, got in {
            "analytic": reverse.analytic(process, score, x, s / 4),
            "euler": reverse.euler(process, score, x, s / 4),
            "denoise": reverse.denoise(process, score, x, s),
        }.items():
            assert not got.isnan().any() and (got >= 0).all(), name
            torch.testing.assert_close(
                got.sum(-1), torch.ones(1, 2, dtype=torch.float64), rtol=0, atol=1e-9
            )
        torch.testing.assert_close(
            reverse.analytic(process, score, x, s / 4), slow_analytic(process, score, x, sigma / 4)
        )
    settled = reverse.denoise(
        process,
        truth.scatter(-1, x[..., None], 0.0).double().exp(),
        x,
        torch.tensor([[sigma]], dtype=torch.float64),
    )
    # a known x0, found again from its own score, up to float32's 1e-7 of each of 50k ratios
    assert settled[..., 77].min().item() > 0.98


def slow_analytic(process: Process, score: Tensor, x: Tensor, d: float) -> Tensor:
    """Position by position, from the matrix exponential of each process written out."""
    rows = []
    for s, held in zip(score[0], x[0].tolist(), strict=True):
        e, total = math.exp(d), math.fsum(s.tolist())
        if isinstance(process, Absorbing):
            earlier, onto = s * e, torch.full_like(s, 1 - 1 / e)
            earlier[process.mask_id] += (1 - e) * total
            onto[process.mask_id] += 1 / e
        else:
            earlier, onto = (
                s * e - math.expm1(d) * total / process.tokens,
                torch.full_like(s, -math.expm1(-d) / process.tokens),
            )
            onto[held] += 1 / e
        law = (earlier * onto).clamp(min=0)
        rows.append(law / law.sum())
    return torch.stack(rows)[None]


@both
def test_given_tokens_stand_in_every_pass_and_at_the_end(sampler: str) -> None:
    process, canvases_seen = Uniform(TOKENS), []

    def log_score(ids: Tensor, sigma: Tensor) -> Tensor:
        canvases_seen.append(ids)
        return torch.zeros(*ids.shape, TOKENS)

    x, free = (
        torch.tensor([[1, 0, 2]]).repeat(50, 1),
        torch.tensor([[False, True, False]]).repeat(50, 1),
    )

    def draws(i: int) -> Tensor:
        return torch.rand(50, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    out = reverse.sample(log_score, process, Geometric(), x, free, 5, draws, sampler=sampler)
    assert len(canvases_seen) == 5
    for ids in [*canvases_seen, out]:
        assert torch.equal(ids[~free], x[~free]) and len(ids[free].unique()) == TOKENS


def test_each_row_has_its_own_start() -> None:
    heard = []

    def log_score(ids: Tensor, sigma: Tensor) -> Tensor:
        heard.append(sigma)
        return torch.zeros(*ids.shape, TOKENS + 1)

    x = torch.full((2, 1), TOKENS)

    def draws(i: int) -> Tensor:
        return torch.rand(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))

    reverse.sample(
        log_score,
        Absorbing(TOKENS),
        Loglinear(),
        x,
        x == TOKENS,
        3,
        draws,
        start=torch.tensor([1.0, 0.2]),
    )
    for i, share in enumerate((1.0, 0.5, 0.0)):
        for row, start in enumerate((1.0, 0.2)):
            t = torch.tensor(1e-5 + (start - 1e-5) * share, dtype=torch.float64)
            assert heard[i][row].item() == pytest.approx(Loglinear().total(t).item(), rel=1e-4)
