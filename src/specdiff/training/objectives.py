"""Training objectives: losses per position, and weights that make them expected accepted tokens.

Shapes: N positions (any leading shape), C columns (the vocabulary, or the draft vocabulary),
G drafted positions of one canvas; B rows, L positions, V states of a process. Logits, the draft
distribution q and the teacher distribution p share the C columns, and nothing is reduced over
positions. Logits are finite and in float32 or wider: a vocabulary's sum does not survive bfloat16.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.diffusion.process import Process
from specdiff.diffusion.schedule import Schedule
from specdiff.errors import UsageError

DIVERGENCES = ("forward", "reverse", "tv", "hybrid", "log_hybrid", "l1")
# replaces a teacher's -inf where it would be summed: 50k columns at e^-30 weigh 5e-9
LOG_FLOOR = -30.0
GAIN = 3.0  # of -log a in log_hybrid
SLICE = 1 << 18  # elements that log_hybrid computes on at a time: 1 MB, to stay in a cache


def score_entropy(
    process: Process,
    schedule: Schedule,
    log_score: Float[Tensor, "B L V"],
    t: Float[Tensor, "B"],
    x: Int[Tensor, "B L"],
    x0: Int[Tensor, "B L"],
) -> Float[Tensor, "B L"]:
    """sigma'(t) SE(log_score; x_t, x_0): the diffusion-weighted denoising score entropy.

    Summed over positions and averaged over uniform t, it bounds the negative log-likelihood
    (L_DWDSE of SEDD, Lou et al. 2024).
    """
    return schedule.rate(t)[:, None] * process.score_entropy(
        log_score, schedule.total(t)[:, None], x, x0
    )


def cross_entropy(
    logits: Float[Tensor, "*N C"], truth: Int[Tensor, "*N"], t: Float[Tensor, "*N"] | None = None
) -> Float[Tensor, "*N"]:
    """-log q(truth), divided by t if there is one: the masked-diffusion bound.

    A negative truth (padding, or a token outside the draft vocabulary) costs exactly 0 and has no
    gradient. Source: MDLM, Sahoo et al. 2024; Ou et al. 2024.
    """
    target = truth.clamp(min=-1)
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=-1, reduction="none"
    ).reshape(truth.shape)
    if t is None:
        return loss
    return loss / t.masked_fill(truth < 0, 1)  # padding may have no time: 0/0


def distill(
    logits: Float[Tensor, "*N C"],
    teacher_logprobs: Float[Tensor, "*N C"],
    divergence: str,
    eta: float = 3.0,
) -> Float[Tensor, "*N"]:
    """Divergence of the draft distribution q = softmax(logits) from the teacher's p, by position.

    p is over the teacher's full vocabulary, of which these columns hold the mass P <= 1; q is 0
    elsewhere. With a = sum_x min(p, q), the exact expected acceptance for any P, and "equal"
    meaning up to a constant in the parameters:

    - forward: sum_x p log(p/q). Equal to P KL(p/P || q): positions count by the mass a draft can
      reach. The other columns, on which the full KL is infinite, are left out, so the value may
      be negative, down to P log P.
    - reverse: sum_x q log(q/p), the full KL(q || p), least at -log P.
    - tv: -log a, a full-vocabulary quantity, least at -log P (LK losses, Samarin et al. 2026).
    - hybrid: e^{-eta a} forward + (1 - e^{-eta a})(1 - a), a detached in the weights only (LK
      losses): forward while a is small, then the full total variation distance 1 - a.
    - log_hybrid: e^{-eta a} forward + (1 - e^{-eta a})(-3 log a), likewise; see `log_hybrid`.
    - l1: sum_x |p - q|. The full distance, 2 (1 - a), is larger by the constant 1 - P (DSpark).

    A teacher may give columns -inf (top-k), even all of them: such a position has no gradient.
    Reverse, infinite there, is the exception: it charges q 30 nats on each excluded column.

    Raises:
        UsageError: an unknown divergence.
    """
    if divergence not in DIVERGENCES:
        raise UsageError(
            f"unknown divergence {divergence!r}: choose one of {', '.join(DIVERGENCES)}"
        )
    if divergence == "log_hybrid":
        loss, _ = log_hybrid(logits, teacher_logprobs, logits.new_zeros(logits.shape[:-1]), eta)
        return loss
    log_q = logits.log_softmax(-1)
    log_p = teacher_logprobs.clamp(min=LOG_FLOOR)
    p = teacher_logprobs.exp()
    if divergence == "forward":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if divergence == "tv":  # in logarithms: an overlap that underflows would leave no gradient
        massless = (teacher_logprobs == -torch.inf).all(-1, keepdim=True)
        return -torch.minimum(teacher_logprobs.masked_fill(massless, 0), log_q).logsumexp(-1)
    if divergence == "l1":
        return (p - log_q.exp()).abs().sum(-1)
    a = torch.minimum(p, log_q.exp()).sum(-1)
    trust = torch.exp(-eta * a.detach())
    return trust * (p * (log_p - log_q)).sum(-1) + (1 - trust) * (1 - a)


def log_hybrid(
    logits: Float[Tensor, "*N C"],
    teacher_logits: Float[Tensor, "*N C"],
    log_z: Float[Tensor, "*N"],
    eta: float = 3.0,
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """e^{-eta a} KL + (1 - e^{-eta a})(-3 log a) by position, and the overlap a (detached).

    p = exp(teacher_logits - log_z), KL = sum_x p log(p/q), a = sum_x min(p, q). Both weights are
    constants of the gradient (LK losses, Samarin et al. 2026, whose hybrid has 1 - a in place of
    -3 log a). The gradient in the logits is closed: P q - p for KL with P = sum_x p, and
    q (s - [q < p]) / a for -log a with s = sum_x q [q < p].

    Logits may be bfloat16: it is computed in float32, slice by slice, in one pass over memory.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    loss, a = _LogHybrid.apply(flat, teacher_logits.reshape(flat.shape), log_z.reshape(-1), eta)
    return loss.view(log_z.shape), a.view(log_z.shape)


class _LogHybrid(torch.autograd.Function):
    """Computes the gradient with the loss, while a slice of the logits is in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "N C"],
        teacher_logits: Float[Tensor, "N C"],
        log_z: Float[Tensor, "N"],
        eta: float,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.empty_like(log_z, dtype=dtype)
        overlaps = torch.empty_like(loss)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        step = max(1, SLICE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
        for start in range(0, len(logits), max(1, step)):
            part = slice(start, start + step)
            log_q = logits[part].to(dtype).log_softmax(-1)
            log_p = teacher_logits[part].to(dtype) - log_z[part, None]
            q = log_q.exp()
            p = log_p.exp()
            a = torch.minimum(p, q).sum(-1)
            trust = torch.exp(-eta * a)
            kl = log_p.clamp_(min=LOG_FLOOR).sub_(log_q).mul_(p).sum(-1)
            safe = a.clamp(min=1e-30)
            loss[part] = trust * kl - GAIN * (1 - trust) * safe.log()
            overlaps[part] = a
            if gradient is None:
                continue
            pull = -GAIN * torch.expm1(-eta * a) / safe  # of -log a
            below = q.masked_fill(q >= p, 0)
            mass = p.sum(-1)
            scale = trust * mass + pull * below.sum(-1)
            part_gradient = q.mul_(scale[:, None])
            part_gradient -= below.mul_(pull[:, None])
            part_gradient -= p.mul_(trust[:, None])
            gradient[part] = part_gradient
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(overlaps)
        return loss, overlaps

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Float[Tensor, "N"], _: Any
    ) -> tuple[Float[Tensor, "N C"], None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss[:, None].to(gradient.dtype), None, None, None


def overlap(
    logits: Float[Tensor, "*N C"], teacher_logprobs: Float[Tensor, "*N C"]
) -> Float[Tensor, "*N"]:
    """sum_x min(p, q): the exact expected acceptance of a position (Leviathan et al. 2023)."""
    return torch.minimum(logits.softmax(-1), teacher_logprobs.exp()).sum(-1)


def expected_accepted(q: Float[Tensor, "*N G"]) -> Float[Tensor, "*N"]:
    """sum_j prod_{i<=j} q_i: the expected accepted tokens of a canvas.

    Here and below q_i is the probability that position i is accepted once all before it are: the
    draft's probability of the true token, or the overlap when distilling. Its negative is the
    streak loss itself (SpecDiff-2).
    """
    return q.cumprod(-1).sum(-1)


def uniform(q: Float[Tensor, "*N G"]) -> Float[Tensor, "*N G"]:
    """w_k = 1."""
    return torch.ones_like(q)


def exponential(q: Float[Tensor, "*N G"], scale: float) -> Float[Tensor, "*N G"]:
    """w_k = exp(-(k - 1)/scale), k = 1..G (DFlash, DSpark); q gives the shape alone."""
    k = torch.arange(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.exp(-k / scale).expand(q.shape)


def streak(q: Float[Tensor, "*N G"]) -> Float[Tensor, "*N G"]:
    """w_i = prod_{k<i} q_k: sum_i w_i (-log q_i) is the stabler streak loss (SpecDiff-2)."""
    reached = q.detach().cumprod(-1)
    return torch.cat([torch.ones_like(reached[..., :1]), reached[..., :-1]], dim=-1)


def d_pace(q: Float[Tensor, "*N G"], a: float = 0.5) -> Float[Tensor, "*N G"]:
    """w_j = sum_{m>=j} prod_{i<=m} ((1 - a) q_i + a) (D-PACE, Wu et al. 2026).

    The gradient of expected_accepted in log q_j, with q raised towards 1 so that late positions
    learn from the start.
    """
    reached = ((1 - a) * q.detach() + a).cumprod(-1)
    return reached.flip(-1).cumsum(-1).flip(-1)


Weights = Callable[[Float[Tensor, "*N G"], float], Float[Tensor, "*N G"]]
# (q, scale) -> weights without gradient; only "exponential" reads the scale
WEIGHTS: Mapping[str, Weights] = {
    "d_pace": lambda q, _: d_pace(q),
    "exponential": exponential,
    "streak": lambda q, _: streak(q),
    "uniform": lambda q, _: uniform(q),
}
