"""What a request changes in the logits themselves: allowed tokens, bias, and penalties for tokens that already occur.

In vLLM's order (transformers' for what it has): ids outside `allowed_token_ids` are forbidden; `logit_bias` is added; logits of
tokens that occur in prompt or answer are divided (where positive, else multiplied) by `repetition_penalty` (Keskar et al. 2019);
then, for n occurrences in the answer alone, `frequency_penalty` n and, where n > 0, `presence_penalty` are taken off (OpenAI).

Tokens drafted in this round occur too: the law of position k counts the draft tokens above it and no others. Counts are made
anew from the committed tokens, so nothing can go stale. Only logits of tokens that occur are touched: beside one copy of the
logits that is O(B (V + N S)) work, not O(B N V).

Shapes: B rows, N positions, V vocabulary, S slots, M tokens drawn in this round, L = S + M places a token may occur at, E entries.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.types import Batch, Draft

COUNTING = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})
FINITE = 1e30  # bounds a repetition penalty, so that logits times or over it stay finite: nothing else can be told apart there


def adjusted(
    logits: Float[Tensor, "B N V"], batch: Batch, drawn: Draft | Int[Tensor, "B M"]
) -> Float[Tensor, "B N V"]:
    """The logits under the rows' own options, at least float32; the very same object where no row uses any.

    drawn: a Draft: scored row k counts the draft tokens above it. A tensor: every row counts all of them, as a drafter's next
    tokens do; in one pass over many positions those before each are not drawn yet, and must not count.
    """
    active = batch.params.active
    if not active & (COUNTING | {"allowed_token_ids", "logit_bias"}):
        return logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if "allowed_token_ids" in active:
        logits = _allowed(logits, batch.params.allowed_ids)
    if "logit_bias" in active:
        ids, bias = (
            batch.params.bias_ids.clamp(min=0),
            batch.params.bias.to(logits.dtype),
        )  # filled up with 0 for token 0
        shape = (-1, logits.shape[1], -1)
        logits = logits.scatter_add(2, ids[:, None].expand(shape), bias[:, None].expand(shape))
    if active & COUNTING:
        logits = (
            _penalised(logits, batch, drawn.tokens, above(drawn))
            if isinstance(drawn, Draft)
            else _penalised(logits, batch, drawn)
        )
    return logits


def _allowed(logits: Float[Tensor, "B N V"], ids: Int[Tensor, "B E"]) -> Float[Tensor, "B N V"]:
    """-inf outside the ids. Where that leaves nothing (a draft vocabulary may hold none of them), all of them alike."""
    asked = (ids >= 0).any(1, keepdim=True)
    ids = torch.where(ids < 0, ids[:, :1].clamp(min=0), ids)
    keep = (~asked).expand(-1, logits.shape[-1]).scatter(1, ids, True)
    at = ids[:, None].expand(-1, logits.shape[1], -1)
    kept = logits.gather(2, at)
    kept = torch.where(asked[..., None] & (kept.amax(-1, keepdim=True) == -torch.inf), 0, kept)
    return logits.masked_fill(~keep[:, None], -torch.inf).scatter_(2, at, kept)


def above(draft: Draft) -> Bool[Tensor, "B N M"]:
    """Which draft tokens stand before what scored row n predicts: the first n of a chain, the ancestors in a tree (B or 1 rows)."""
    B, M = draft.tokens.shape
    if draft.parents is None:
        return torch.ones(1, M + 1, M, dtype=torch.bool, device=draft.tokens.device).tril(-1)
    found = torch.zeros(B, M + 1, M, dtype=torch.bool, device=draft.tokens.device)
    for k in range(M):  # parents come before their children
        at = (draft.parents[:, k] + 1)[:, None, None].expand(-1, 1, M)
        found[:, k + 1] = found.gather(1, at)[:, 0]
        found[:, k + 1, k] = True
    return found


def _penalised(
    logits: Float[Tensor, "B N V"],
    batch: Batch,
    drawn: Int[Tensor, "B M"],
    above: Bool[Tensor, "#B N M"] | None = None,
) -> Float[Tensor, "B N V"]:
    """Each place's token gets its new logit from the token's counts, so places that hold the same token write the same."""
    params, active, N = batch.params, batch.params.active, logits.shape[1]
    places = torch.cat(
        [batch.ids, drawn], dim=1
    )  # slots behind `length` too: their tokens occur 0 times, or elsewhere
    same = (drawn[:, :, None] == places[:, None]).to(logits.dtype)
    own = same.sum(1, keepdim=True) if above is None else above.to(logits.dtype) @ same
    at = places[:, None].expand(-1, N, -1)
    score = logits.gather(2, at)
    if "repetition_penalty" in active:
        occurs = _committed(batch, places, torch.zeros_like(batch.length), logits) + own > 0
        factor = params.repetition_penalty.clamp(1 / FINITE, FINITE)[:, None, None].to(logits.dtype)
        score = torch.where(occurs, torch.where(score > 0, score / factor, score * factor), score)
    if active & {"presence_penalty", "frequency_penalty"}:
        n = _committed(batch, places, batch.prompt_length, logits) + own
        presence, frequency = (
            x[:, None, None].to(logits.dtype)
            for x in (params.presence_penalty, params.frequency_penalty)
        )
        score = score - frequency * n - presence * (n > 0)
    return logits.scatter(2, at, score)


def _committed(
    batch: Batch, places: Int[Tensor, "B L"], first: Int[Tensor, "B"], like: Float[Tensor, "B N V"]
) -> Float[Tensor, "B 1 L"]:
    """How often each place's token was committed at position `first[b]` or later."""
    slot = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    counted = (slot >= first[:, None]) & (slot < batch.length[:, None])
    table = like.new_zeros(like.shape[0], like.shape[2]).scatter_add(
        1, batch.ids, counted.to(like.dtype)
    )
    return table.gather(1, places)[:, None]
