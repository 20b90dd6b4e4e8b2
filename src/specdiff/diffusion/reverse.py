"""Running a process backwards with a learned score: the authors' analytic and Euler steps, their closing step, whole samples.

Shapes: B rows, L positions, V states. A score function takes (ids [B, L], sigma [B]) and returns the log-score [B, L, V].
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
CHUNK = 64  # positions whose laws exist at a time, so that a long canvas over a large vocabulary stays small


def analytic(
    process: Process,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    dsigma: Float[Tensor, "B 1"],
) -> Float[Tensor, "B L V"]:
    """Tweedie tau-leaping (SEDD, section 4.2): the law of x a noise dsigma earlier, staggered score times transition.

    With a learned score a probability can come out negative (absorbing: that of staying MASK): clamped, renormalised.
    """
    probs = (process.staggered_score(score, dsigma) * process.transp_transition(x, dsigma)).clamp(
        min=0
    )
    return probs / probs.sum(-1, keepdim=True)


def euler(
    process: Process,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    dsigma: Float[Tensor, "B 1"],
) -> Float[Tensor, "B L V"]:
    """One Euler step of the reverse process (SEDD, eq. 17): stay, plus dsigma = Delta sigma'(t) times the reverse rates.

    Too long a step gives staying a negative probability: clamped, renormalised.
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
    """The closing step to sigma = 0: an analytic step over all the noise that is left, over the W tokens (no MASK column)."""
    probs = (process.staggered_score(score, sigma) * process.transp_transition(x, sigma))[
        ..., : process.tokens
    ].clamp(min=0)
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
    """Fill the free positions of x in T = `passes` network passes: T - 1 steps of the sampler, then the closing one.

    The other tokens of x are given: they stand on the canvas in every pass. Free positions begin as the process's own noise.

    Args:
        uniform: `uniform(i)` supplies pass i's draws, `uniform(passes)` the initial noise's.
        start: the time of the first pass, a row's own or one for all; the last is at 1e-5.
        shape: reshapes the law of a token wherever it is drawn for good (temperature, filters).
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    begin = torch.as_tensor(start, dtype=exact, device=x.device).expand(len(x)).clamp(min=LAST_TIME)
    left = torch.linspace(1, 0, passes, dtype=exact, device=x.device)[:, None]
    times = LAST_TIME + (begin - LAST_TIME) * left
    canvas = torch.where(free, process.limit(uniform(passes)), x)
    for i, now in enumerate(times):
        then = times[i + 1] if i + 1 < passes else None
        found = log_score(canvas, schedule.total(now))
        parts = zip(
            *(torch.split(y, CHUNK, dim=1) for y in (found, canvas, uniform(i))), strict=True
        )
        # in float64: at high noise scores differ from 1 by less than a step over that noise multiplies their difference
        drawn = [
            draw(_law(process, schedule, s.to(exact).exp(), held, now, then, sampler, shape), u)
            for s, held, u in parts
        ]
        canvas = torch.where(free, torch.cat(drawn, dim=1), x)
    return canvas


def _law(
    process: Process,
    schedule: Schedule,
    score: Float[Tensor, "B L V"],
    x: Int[Tensor, "B L"],
    now: Float[Tensor, "B"],
    then: Float[Tensor, "B"] | None,
    sampler: str,
    shape: Shape | None,
) -> Float[Tensor, "B L V"]:
    """What a position becomes by the time `then`; at the end of time (None) it is a token."""
    sigma = schedule.total(now)
    if then is None:
        probs = denoise(process, score, x, sigma[:, None])
        return probs if shape is None else _shaped(probs, process.tokens, shape)
    dsigma = (
        schedule.rate(now) * (now - then) if sampler == "euler" else sigma - schedule.total(then)
    )
    probs = SAMPLERS[sampler](process, score, x, dsigma[:, None])
    settled = isinstance(
        process, Absorbing
    )  # its tokens stay once revealed; the uniform process's may still change
    return _shaped(probs, process.tokens, shape) if settled and shape is not None else probs


def _shaped(probs: Float[Tensor, "B L V"], tokens: int, shape: Shape) -> Float[Tensor, "B L V"]:
    """Reshape the law among tokens; how likely there is one at all (and not MASK still) stays."""
    clean = probs[..., :tokens]
    total = clean.sum(-1, keepdim=True)
    return torch.cat(
        [torch.where(total > 0, shape(clean) * total, clean), probs[..., tokens:]], dim=-1
    )
