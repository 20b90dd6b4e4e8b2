"""Logits and a request's parameters -> probabilities; one exact draw from a row of them; log probabilities of what came.

Shapes: B rows, N positions, V vocabulary, M tokens drawn in this round, T top tokens.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.devices import exact
from specdiff.logits_processors import adjusted
from specdiff.types import Batch, Draft, Logprobs, Params, Verification

PREFIX = (
    512  # candidates looked at before a full sort is needed; top-p sets are nearly always smaller
)


def distribution(
    logits: Float[Tensor, "B N V"], batch: Batch, drawn: Draft | Int[Tensor, "B M"]
) -> Float[Tensor, "B N V"]:
    """The rows' laws under all that their requests ask: allowed ids, bias, penalties, temperature, filters.

    The target's: `drawn` is the Draft, whose own tokens count at the positions behind them. A drafter's: the tokens it has drawn
    already in this round, which count everywhere. Temperature and filters alone are `probabilities`.
    """
    return probabilities(adjusted(logits, batch, drawn), batch.params)


def probabilities(logits: Float[Tensor, "B N V"], params: Params) -> Float[Tensor, "B N V"]:
    """softmax(logits / temperature) filtered by top-k, top-p and min-p, at least float32. Temperature 0 gives one-hot rows.

    Filters follow transformers' order. Each keeps every token at least as likely as some threshold, so equals stay or go
    together: top-k down to the k-th most likely, top-p down to the one at which the mass of what top-k left reaches top_p.
    A row's result never depends on the other rows' options.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    p = torch.softmax(
        _tempered(logits, params.temperature) if "temperature" in params.active else logits, dim=-1
    )
    if "top_k" in params.active:
        p = _keep(p, _kth(p, params.top_k), params.top_k > 0)
    if "top_p" in params.active:
        p = _keep(p, _at_mass(p, params.top_p), params.top_p < 1)
    if "min_p" in params.active:
        p = _keep(
            p, params.min_p[:, None, None].to(p.dtype) * p.amax(-1, keepdim=True), params.min_p > 0
        )
    if "greedy" in params.active:
        greedy = (params.temperature == 0)[:, None, None]
        p = torch.where(greedy, F.one_hot(logits.argmax(-1), logits.shape[-1]).to(p.dtype), p)
    return p


def _tempered(
    logits: Float[Tensor, "B N V"], temperature: Float[Tensor, "B"]
) -> Float[Tensor, "B N V"]:
    """Below the largest logit, not above 0: a tiny temperature then gives -inf, never inf - inf."""
    scale = torch.where(temperature == 0, 1, temperature)[:, None, None].to(logits.dtype)
    untouched = (temperature == 1)[:, None, None]
    return torch.where(untouched, logits, (logits - logits.amax(-1, keepdim=True)) / scale)


def _keep(
    p: Float[Tensor, "B N V"], least: Float[Tensor, "B N 1"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, "B N V"]:
    """The tokens of probability >= least, renormalised; rows that did not ask for the filter stay bit for bit."""
    kept = torch.where(p >= least, p, 0)
    return torch.where(rows[:, None, None], kept / kept.sum(-1, keepdim=True), p)


def _kth(p: Float[Tensor, "B N V"], k: Int[Tensor, "B"]) -> Float[Tensor, "B N 1"]:
    """The k-th largest probability of each row."""
    k = k.clamp(1, p.shape[-1])
    best = p.topk(int(k.max()), dim=-1).values
    return best.gather(-1, (k - 1)[:, None, None].expand(*p.shape[:-1], 1))


def _at_mass(p: Float[Tensor, "B N V"], mass: Float[Tensor, "B"]) -> Float[Tensor, "B N 1"]:
    """The probability of the token at which the most likely ones first reach the mass."""
    limit = mass[:, None, None].to(p.dtype)
    for size in (
        PREFIX,
        8 * PREFIX,
        p.shape[-1],
    ):  # flat laws need a longer prefix, at worst all of it: always exact
        best = p.topk(min(size, p.shape[-1]), dim=-1).values
        if size >= p.shape[-1] or bool(
            ((best.sum(-1, keepdim=True) >= limit) | (limit >= 1)).all()
        ):
            break
    before = best.cumsum(-1) - best
    needed = (before < limit).sum(-1, keepdim=True).clamp(min=1)
    return best.gather(-1, needed - 1)


def draw(weights: Float[Tensor, "... V"], uniform: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """One token a row by inverse CDF: exact cumulative sum (float64), the uniform scaled by its last entry, searched from the right.

    `weights` need not be normalised. A token of weight zero is never drawn, whatever the uniform in [0, 1).
    """
    precise = exact(weights.device)
    cdf = weights.to(precise).cumsum(-1)
    scaled = (uniform.to(precise) * cdf[..., -1]).unsqueeze(-1)
    # rounding may lift u * total onto total itself: stay below it, or a filtered last token could come out
    scaled = torch.minimum(scaled, torch.nextafter(cdf[..., -1:], torch.zeros_like(scaled)))
    return torch.searchsorted(cdf, scaled, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def logprobs(logits: Float[Tensor, "B N V"], verification: Verification, top: int) -> Logprobs:
    """Of the emitted tokens and of the `top` likeliest in their place, at the scored row each was judged or drawn at."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = logits.logsumexp(-1).gather(1, verification.path)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    likeliest, ids = (
        x.gather(1, verification.path[..., None].expand(-1, -1, x.shape[-1])) for x in best
    )
    return Logprobs(
        logits[rows, verification.path, verification.tokens] - total,
        ids,
        likeliest - total[..., None],
    )
