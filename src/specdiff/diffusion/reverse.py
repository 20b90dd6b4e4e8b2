"""Reverse sampling with a learned score: analytic and Euler steps, the closing step, whole samples.

Shapes: B rows, L positions, V states, W tokens. A score function takes (ids [B, L], sigma [B]) and
returns the log-score [B, L, V].
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.diffusion.process import Absorbing, Process
from specdiff.diffusion.schedule import Schedule
from specdiff.sampling import draw

LogScore = Callable[[Int[Tensor, "B L"], Float[Tensor, "B"]], Float[Tensor, "B L V"]]
Uniforms = Callable[[int], Float[Tensor, "B L"]]
Shape = Callable[[Float[Tensor, "B L W"]], Float[Tensor, "B L W"]]
LAST_TIME = 1e-5
CHUNK = 64  # positions whose distributions exist at a time: bounds memory on a long canvas


def analytic(
    process: Process,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    dsigma: Float[Tensor, "B 1"],
) -> Float[Tensor, "B L V"]:
    """Tweedie tau-leaping (SEDD, section 4.2): staggered score times transition.

    The result is the distribution of x a noise dsigma earlier. With a learned score a probability
    can come out negative (absorbing: that of staying MASK): it is clamped and renormalized.
    """
    probs = process.staggered_score(score, dsigma) * process.transp_transition(x, dsigma)
    probs = probs.clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def euler(
    process: Process,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    dsigma: Float[Tensor, "B 1"],
) -> Float[Tensor, "B L V"]:
    """One Euler step of the reverse process (SEDD, eq. 17).

    Stay, plus dsigma = Delta sigma'(t) times the reverse rates. Too long a step gives staying a
    negative probability: it is clamped and renormalized.
    """
    probs = dsigma[..., None] * process.reverse_rate(x, score)
    probs = probs.scatter_add(-1, x[..., None], torch.ones_like(probs[..., :1])).clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def denoise(
    process: Process,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    sigma: Float[Tensor, "B 1"],
) -> Float[Tensor, "B L W"]:
    """The closing step to sigma = 0: analytic, over all remaining noise and the W tokens only."""
    probs = process.staggered_score(score, sigma) * process.transp_transition(x, sigma)
    probs = probs[..., : process.tokens].clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


SAMPLERS = {"analytic": analytic, "euler": euler}


def sample(
    log_score: LogScore,
    process: Process,
    schedule: Schedule,
    x: Int[Tensor, "B L"],
    free: Bool[Tensor, "B L"],
    passes: int,
    uniform: Uniforms,
    *,
    start: float | Float[Tensor, "B"] = 1.0,
    sampler: str = "analytic",
    shape: Shape | None = None,
) -> Int[Tensor, "B L"]:
    """Fill the free positions of x in T = `passes` network passes.

    T - 1 steps of the sampler, then the closing step. The other tokens of x are fixed: they stand
    on the canvas in every pass. Free positions begin as the process's own noise.

    Args:
        uniform: `uniform(i)` supplies pass i's draws, `uniform(passes)` the initial noise's.
        start: the time of the first pass, a row's own or one for all; the last is at 1e-5.
        shape: reshapes the distribution of a token wherever it is drawn for good (temperature,
            filters).
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    begin = torch.as_tensor(start, dtype=exact, device=x.device).expand(len(x)).clamp(min=LAST_TIME)
    left = torch.linspace(1, 0, passes, dtype=exact, device=x.device)[:, None]
    times = LAST_TIME + (begin - LAST_TIME) * left
    canvas = torch.where(free, process.limit(uniform(passes)), x)
    for i, now in enumerate(times):
        then = times[i + 1] if i + 1 < passes else None
        scores = log_score(canvas, schedule.total(now))
        chunks = (torch.split(y, CHUNK, dim=1) for y in (scores, canvas, uniform(i)))
        # in float64: at high noise scores differ from 1 by less than a step over that noise
        # multiplies their difference
        drawn = [
            draw(_next(process, schedule, s.to(exact).exp(), ids, now, then, sampler, shape), u)
            for s, ids, u in zip(*chunks, strict=True)
        ]
        canvas = torch.where(free, torch.cat(drawn, dim=1), x)
    return canvas


def _next(
    process: Process,
    schedule: Schedule,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    now: Float[Tensor, "B"],
    then: Float[Tensor, "B"] | None,
    sampler: str,
    shape: Shape | None,
) -> Float[Tensor, "B L V"]:
    """The distribution of a position at time `then`; at the end of time (None) it is a token."""
    sigma = schedule.total(now)
    if then is None:
        probs = denoise(process, score, x, sigma[:, None])
        return probs if shape is None else _shaped(probs, process.tokens, shape)
    dsigma = (
        schedule.rate(now) * (now - then) if sampler == "euler" else sigma - schedule.total(then)
    )
    probs = SAMPLERS[sampler](process, score, x, dsigma[:, None])
    # absorbing tokens stay once revealed; those of the uniform process may still change
    final = isinstance(process, Absorbing)
    return _shaped(probs, process.tokens, shape) if final and shape is not None else probs


def _shaped(probs: Float[Tensor, "B L V"], tokens: int, shape: Shape) -> Float[Tensor, "B L V"]:
    """Reshape the distribution among tokens; their total probability (1 - MASK's) is unchanged."""
    clean = probs[..., :tokens]
    total = clean.sum(-1, keepdim=True)
    clean = torch.where(total > 0, shape(clean) * total, clean)
    return torch.cat([clean, probs[..., tokens:]], dim=-1)
