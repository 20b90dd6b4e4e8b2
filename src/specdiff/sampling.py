"""Sampling: logits to probabilities under a request's parameters, exact draws, log probabilities.

Shapes: B rows, N positions, V vocabulary, M tokens drawn in this round, T top tokens, C
columns (V, or a draft vocabulary).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.devices import exact
from specdiff.logits_processors import process_logits
from specdiff.types import Batch, Draft, Logprobs, Params, Verification

PREFIX = 512  # candidates sorted first; top-p sets are nearly always smaller


def distribution(
    logits: Float[Tensor, "B N C"],
    batch: Batch,
    drawn: Draft | Int[Tensor, "B M"],
    columns: Int[Tensor, "C"] | None = None,
) -> Float[Tensor, "B N C"]:
    """The rows' distributions under allowed ids, bias, penalties, temperature and filters.

    For the target, `drawn` is the Draft: its tokens count at the positions after them. For a
    drafter, `drawn` holds the tokens it has drawn in this round (at first [B, 0]), which count at
    every position. `probabilities` applies temperature and filters alone. `columns`: the ascending
    ids that the logits are of (None: all).
    """
    return probabilities(process_logits(logits, batch, drawn, columns), batch.params)


def probabilities(logits: Float[Tensor, "B N V"], params: Params) -> Float[Tensor, "B N V"]:
    """softmax(logits / temperature) filtered by top-k, top-p and min-p, at least float32.

    Temperature 0 gives one-hot rows. Filters follow transformers' order. Each keeps every token at
    least as likely as some threshold, so equals stay or go together: top-k down to the k-th most
    likely, top-p down to the one at which the mass of what top-k left reaches top_p. A row's result
    never depends on the other rows' options.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scaled = _tempered(logits, params.temperature) if "temperature" in params.active else logits
    p = torch.softmax(scaled, dim=-1)
    if "top_k" in params.active:
        p = _keep(p, _kth(p, params.top_k), params.top_k > 0)
    if "top_p" in params.active:
        p = _keep(p, _at_mass(p, params.top_p), params.top_p < 1)
    if "min_p" in params.active:
        least = params.min_p[:, None, None].to(p.dtype) * p.amax(-1, keepdim=True)
        p = _keep(p, least, params.min_p > 0)
    if "greedy" in params.active:
        greedy = (params.temperature == 0)[:, None, None]
        p = torch.where(greedy, F.one_hot(logits.argmax(-1), logits.shape[-1]).to(p.dtype), p)
    return p


def _tempered(
    logits: Float[Tensor, "B N V"], temperature: Float[Tensor, "B"]
) -> Float[Tensor, "B N V"]:
    """Logits below the largest one, over the temperature: a tiny one gives -inf, no inf - inf."""
    scale = torch.where(temperature == 0, 1, temperature)[:, None, None].to(logits.dtype)
    untouched = (temperature == 1)[:, None, None]
    return torch.where(untouched, logits, (logits - logits.amax(-1, keepdim=True)) / scale)


def _keep(
    p: Float[Tensor, "B N V"], least: Float[Tensor, "B N 1"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, "B N V"]:
    """The tokens of probability >= least, renormalized, in the `rows`; others stay bit for bit."""
    support = torch.where(p >= least, p, 0)
    return torch.where(rows[:, None, None], support / support.sum(-1, keepdim=True), p)


def _kth(p: Float[Tensor, "B N V"], k: Int[Tensor, "B"]) -> Float[Tensor, "B N 1"]:
    """The k-th largest probability of each row."""
    k = k.clamp(1, p.shape[-1])
    best = p.topk(int(k.max()), dim=-1).values
    return best.gather(-1, (k - 1)[:, None, None].expand(*p.shape[:-1], 1))


def _at_mass(p: Float[Tensor, "B N V"], mass: Float[Tensor, "B"]) -> Float[Tensor, "B N 1"]:
    """The probability of the token at which the most likely ones first reach the mass."""
    limit = mass[:, None, None].to(p.dtype)
    V = p.shape[-1]
    for size in (PREFIX, 8 * PREFIX, V):  # flat rows need a longer prefix, at worst all of it
        best = p.topk(min(size, V), dim=-1).values
        reached = (best.sum(-1, keepdim=True) >= limit) | (limit >= 1)
        if size >= V or bool(reached.all()):
            break
    before = best.cumsum(-1) - best
    needed = (before < limit).sum(-1, keepdim=True).clamp(min=1)
    return best.gather(-1, needed - 1)


def draw(weights: Float[Tensor, "... V"], uniform: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """One token a row by inverse CDF, from weights >= 0 and a uniform in [0, 1).

    The cumulative sum is float64, the uniform is scaled by its last entry and searched from the
    right. `weights` need not be normalized. A token of weight zero is never drawn.
    """
    precise = exact(weights.device)
    cdf = weights.to(precise).cumsum(-1)
    scaled = (uniform.to(precise) * cdf[..., -1]).unsqueeze(-1)
    # rounding may lift u * total onto total itself, which could draw a filtered last token
    scaled = torch.minimum(scaled, torch.nextafter(cdf[..., -1:], torch.zeros_like(scaled)))
    return torch.searchsorted(cdf, scaled, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def draw_tokens(
    logits: Float[Tensor, "B N C"],
    batch: Batch,
    drawn: Int[Tensor, "B M"],
    uniform: Float[Tensor, "B N"],
    columns: Int[Tensor, "C"] | None = None,
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N C"] | None]:
    """A drafter's tokens and the distributions they were drawn from, as `distribution` has them.

    Where all rows are greedy the tokens are the most likely ones, and there is no distribution:
    they are point masses.
    """
    q = None
    if batch.params.all_greedy:
        index = most_likely(process_logits(logits, batch, drawn, columns))
    else:
        q = distribution(logits, batch, drawn, columns)
        index = draw(q, uniform)
    return index if columns is None else columns[index], q


def most_likely(logits: Float[Tensor, "B N C"]) -> Int[Tensor, "B N"]:
    """The first largest entry of each row (`argmax` is five times slower in bfloat16 on a CPU)."""
    index: Tensor = logits.max(-1).indices
    return index


def logprobs(logits: Float[Tensor, "B N V"], verification: Verification, top: int) -> Logprobs:
    """Log probabilities of the emitted tokens and of the `top` most likely ones.

    Each is from the scored row at which its token was judged or drawn.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = logits.logsumexp(-1).gather(1, verification.path)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    path = verification.path[..., None].expand(-1, -1, best.indices.shape[-1])
    return Logprobs(
        tokens=logits[rows, verification.path, verification.tokens] - total,
        top_ids=best.indices.gather(1, path),
        top=best.values.gather(1, path) - total[..., None],
    )
