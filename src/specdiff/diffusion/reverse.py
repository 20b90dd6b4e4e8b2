"""Running a process backwards with a learned score: the authors' analytic sampler and its closing denoise step.

Shapes: B rows, L positions, V states. A score function takes (ids [B, L], sigma [B]) and returns the log-score [B, L, V].
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.diffusion.process import Absorbing
from specdiff.diffusion.schedule import Schedule
from specdiff.sampling import draw

LogScore = Callable[[Int[Tensor, "B L"], Float[Tensor, "B"]], Float[Tensor, "B L V"]]
Uniforms = Callable[[int], Float[Tensor, "B L"]]
LAST_TIME = 1e-5


def analytic(
    process: Absorbing, score: Float[Tensor, "B L V"], x: Int[Tensor, "B L"], dsigma: Float[Tensor, "B 1"]
) -> Float[Tensor, "B L V"]:
    """Tweedie tau-leaping (SEDD, section 4.2): the law of x a noise dsigma earlier, staggered score times transition.

    The probability of staying MASK, 1 - (e^d - 1) sum s, can come out negative with a learned score: clamped, renormalised.
    """
    probs = (process.staggered_score(score, dsigma) * process.transp_transition(x, dsigma)).clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def denoise(
    process: Absorbing, score: Float[Tensor, "B L V"], x: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"]
) -> Float[Tensor, "B L V"]:
    """The closing step to sigma = 0: an analytic step over all the noise that is left, with the MASK column dropped."""
    probs = (process.staggered_score(score, sigma) * process.transp_transition(x, sigma))[..., :-1].clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def sample(
    log_score: LogScore,
    process: Absorbing,
    schedule: Schedule,
    x: Int[Tensor, "B L"],
    steps: int,
    uniform: Uniforms,
    start: float = 1.0,
) -> Int[Tensor, "B L"]:
    """Fill the MASK positions of x in `steps` analytic steps and a denoising one: T = steps + 1 network passes.

    Tokens given in x stay (written back before every pass and after the last). `uniform(i)` supplies the i-th pass's draws.
    """
    given = x != process.mask_id
    times = torch.linspace(start, LAST_TIME, steps + 1, device=x.device)
    canvas = x
    for i, t in enumerate(times):
        sigma = schedule.total(t)
        canvas = torch.where(given, x, canvas)
        score = log_score(canvas, sigma.expand(len(x))).exp()
        if i < steps:
            dsigma = (sigma - schedule.total(times[i + 1])).expand(len(x), 1)
            probs = analytic(process, score, canvas, dsigma)
        else:
            probs = denoise(process, score, canvas, sigma.expand(len(x), 1))
        canvas = draw(probs, uniform(i))
    return torch.where(given, x, canvas)
