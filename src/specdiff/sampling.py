"""Logits and a request's parameters -> probabilities; and one exact draw from a row of them.

Shapes: B rows, N positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.types import Params

PREFIX = 512  # candidates looked at before a full sort is needed; top-p sets are nearly always smaller


def probabilities(logits: Float[Tensor, "B N V"], params: Params) -> Float[Tensor, "B N V"]:
    """softmax(logits / temperature) filtered by top-k, top-p and min-p, at least float32. Temperature 0 gives one-hot rows.

    Filters follow transformers' order and tie rules: top-k keeps every token as likely as the k-th; top-p keeps the
    smallest set of most likely tokens (lower ids first among equals) whose mass reaches top_p, of what top-k left.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    greedy = (params.temperature == 0)[:, None, None]
    scale = params.temperature.masked_fill(params.temperature == 0, 1)[:, None, None]
    p = torch.softmax(logits / scale if "temperature" in params.active else logits, dim=-1)
    if "top_k" in params.active:
        p = _renormalise(p * _top_k(p, params.top_k))
    if "top_p" in params.active:
        p = _renormalise(p * _top_p(p, params.top_p))
    if "min_p" in params.active:
        p = _renormalise(p * (p >= params.min_p[:, None, None] * p.amax(-1, keepdim=True)))
    if "greedy" in params.active:
        p = torch.where(greedy, F.one_hot(logits.argmax(-1), logits.shape[-1]).to(p.dtype), p)
    return p


def _renormalise(p: Float[Tensor, "B N V"]) -> Float[Tensor, "B N V"]:
    return p / p.sum(-1, keepdim=True)


def _top_k(p: Float[Tensor, "B N V"], k: Int[Tensor, "B"]) -> Bool[Tensor, "B N V"]:
    size = p.shape[-1]
    k = torch.where(k == 0, size, k).clamp(max=size)
    most = size if bool((k == size).all()) else int(torch.where(k == size, 1, k).max())
    best = p.topk(most, dim=-1).values
    least = best.gather(-1, (k.clamp(max=most) - 1)[:, None, None].expand(*p.shape[:-1], 1))
    return (p >= least) | (k == size)[:, None, None]


def _top_p(p: Float[Tensor, "B N V"], top_p: Float[Tensor, "B"]) -> Bool[Tensor, "B N V"]:
    limit = top_p[:, None, None].to(p.dtype)
    best, order = p.topk(min(PREFIX, p.shape[-1]), dim=-1)
    enough = (best.sum(-1, keepdim=True) >= limit) & (best[..., -1:] < best.amax(-1, keepdim=True))
    if not bool((enough | (limit >= 1)).all()):
        best, order = p.sort(dim=-1, descending=True, stable=True)  # exact fallback: the prefix may not hold the whole set
    before = best.cumsum(-1) - best
    keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < limit)
    return keep | (limit >= 1)


def draw(weights: Float[Tensor, "... V"], uniform: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """One token a row by inverse CDF: float64 cumulative sum, the uniform scaled by its last entry, searched from the right.

    `weights` need not be normalised. A token of weight zero is never drawn, whatever the uniform in [0, 1).
    """
    exact = torch.float32 if weights.device.type == "mps" else torch.float64
    cdf = weights.to(exact).cumsum(-1)
    scaled = (uniform.to(exact) * cdf[..., -1]).unsqueeze(-1)
    # rounding may lift u * total onto total itself: stay below it, or a filtered last token could come out
    scaled = torch.minimum(scaled, torch.nextafter(cdf[..., -1:], torch.zeros_like(scaled)))
    return torch.searchsorted(cdf, scaled, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)
