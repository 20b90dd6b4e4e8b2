"""Logits processors: allowed tokens, logit bias, and penalties for tokens that already occur.

In vLLM's order (transformers' for what it has): ids outside `allowed_token_ids` are forbidden;
`logit_bias` is added; logits of tokens that occur in prompt or answer are divided (where positive,
else multiplied) by `repetition_penalty` (Keskar et al. 2019); then, for n occurrences in the answer
alone, `frequency_penalty` n and, where n > 0, `presence_penalty` are subtracted (OpenAI).

Tokens drafted in this round occur too: position k counts the draft tokens above it and no others.
Counts are rebuilt from the committed tokens, so nothing can go stale. Only logits of tokens that
occur are touched: apart from one copy of the logits this is O(B (V + N S)) work, not O(B N V).

Shapes: B rows, N positions, V vocabulary, S slots, M tokens drawn in this round, L = S + M places
a token may occur at, E entries, C columns (V, or a draft vocabulary).
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.tree import above
from specdiff.types import Batch, Draft, Params, column_index

COUNTING = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})
# bounds a repetition penalty so that logits times or over it stay finite; larger ones act alike
FINITE = 1e30


def process_logits(
    logits: Float[Tensor, "B N C"],
    batch: Batch,
    drawn: Draft | Int[Tensor, "B M"],
    columns: Int[Tensor, "C"] | None = None,
) -> Float[Tensor, "B N C"]:
    """The logits under the rows' own options, at least float32; the same object if none is used.

    drawn: a Draft, of which scored row k counts the tokens above it; or a tensor of tokens, which
        every row counts, as a drafter's next tokens do. In one pass over many positions those
        before each are not drawn yet, and must not count.
    columns: the ascending ids that the logits are of (None: all). Where a row allows none of them
        its logits are 0: see `reachable`.

    A drafter's first position is also limited to `batch.next_mask`, if that leaves it a token. The
    target's logits come masked: see grammar_rows.py.
    """
    if batch.next_mask is not None and not isinstance(drawn, Draft):
        if drawn.shape[1] == 0:
            logits = _first_masked(logits, batch.next_mask, columns)
        batch = replace(batch, next_mask=None)
    active = batch.params.active
    if not active & (COUNTING | {"allowed_token_ids", "logit_bias"}):
        return logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if columns is not None:
        return _of_columns(logits, batch, drawn, columns)
    if "allowed_token_ids" in active:
        logits = _allowed(logits, batch.params.allowed_ids)
    if "logit_bias" in active:
        logits = _biased(logits, batch.params.bias_ids, batch.params.bias)
    if not active & COUNTING:
        return logits
    if isinstance(drawn, Draft):
        return _penalized(logits, batch, drawn.tokens, above(drawn))
    return _penalized(logits, batch, drawn)


def _first_masked(
    logits: Float[Tensor, "B N C"],
    mask: Bool[Tensor, "B V"],
    columns: Int[Tensor, "C"] | None,
) -> Float[Tensor, "B N C"]:
    mask = mask if columns is None else mask[:, columns]
    first = logits[:, :1].masked_fill(~mask[:, None], -torch.inf)
    possible = first.amax(-1, keepdim=True) > -torch.inf
    return torch.cat([torch.where(possible, first, logits[:, :1]), logits[:, 1:]], dim=1)


def reachable(params: Params, columns: Int[Tensor, "C"]) -> Bool[Tensor, "B"]:
    """Whether a row's allowed ids leave it one of the columns."""
    unlimited = (params.allowed_ids < 0).all(1)
    return unlimited | (column_index(params.allowed_ids, columns) < len(columns)).any(1)


def _of_columns(
    logits: Float[Tensor, "B N C"],
    batch: Batch,
    drawn: Draft | Int[Tensor, "B M"],
    columns: Int[Tensor, "C"],
) -> Float[Tensor, "B N C"]:
    """Ids become places among the columns; all others share one more column, of logit -inf."""
    ids = _places(batch.ids, columns)
    bias_ids = _places(batch.params.bias_ids, columns)
    allowed_ids = _places(batch.params.allowed_ids, columns)
    params = replace(batch.params, bias_ids=bias_ids, allowed_ids=allowed_ids)
    if isinstance(drawn, Draft):
        drawn = Draft(_places(drawn.tokens, columns), parents=drawn.parents)
    else:
        drawn = _places(drawn, columns)
    padded = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    logits = process_logits(padded, replace(batch, ids=ids, params=params), drawn)[..., :-1]
    return torch.where(logits.amax(-1, keepdim=True) == -torch.inf, 0, logits)


def _places(ids: Int[Tensor, "*B"], columns: Int[Tensor, "C"]) -> Int[Tensor, "*B"]:
    return torch.where(ids < 0, ids, column_index(ids, columns))


def _biased(
    logits: Float[Tensor, "B N V"], ids: Int[Tensor, "B E"], bias: Float[Tensor, "B E"]
) -> Float[Tensor, "B N V"]:
    """Padding adds 0 to token 0."""
    ids = ids.clamp(min=0)
    shape = (-1, logits.shape[1], -1)
    bias = bias.to(logits.dtype)[:, None].expand(shape)
    return logits.scatter_add(2, ids[:, None].expand(shape), bias)


def _allowed(logits: Float[Tensor, "B N V"], ids: Int[Tensor, "B E"]) -> Float[Tensor, "B N V"]:
    """-inf outside the ids; uniform over the ids where all of theirs are -inf.

    A draft vocabulary may hold none of them.
    """
    active = (ids >= 0).any(1, keepdim=True)
    ids = torch.where(ids < 0, ids[:, :1].clamp(min=0), ids)
    keep = (~active).expand(-1, logits.shape[-1]).scatter(1, ids, True)
    index = ids[:, None].expand(-1, logits.shape[1], -1)
    values = logits.gather(2, index)
    empty = active[..., None] & (values.amax(-1, keepdim=True) == -torch.inf)
    values = torch.where(empty, 0, values)
    return logits.masked_fill(~keep[:, None], -torch.inf).scatter_(2, index, values)


def _penalized(
    logits: Float[Tensor, "B N V"],
    batch: Batch,
    drawn: Int[Tensor, "B M"],
    ancestors: Bool[Tensor, "#B N M"] | None = None,
) -> Float[Tensor, "B N V"]:
    """Each place's token gets its new logit from that token's counts.

    Places of the same token therefore write the same value.
    """
    params = batch.params
    active = params.active
    N = logits.shape[1]
    # slots past `length` too: their tokens occur 0 times, or elsewhere
    places = torch.cat([batch.ids, drawn], dim=1)
    same = (drawn[:, :, None] == places[:, None]).to(logits.dtype)
    own = same.sum(1, keepdim=True) if ancestors is None else ancestors.to(logits.dtype) @ same
    at = places[:, None].expand(-1, N, -1)
    score = logits.gather(2, at)
    if "repetition_penalty" in active:
        occurs = _committed(batch, places, torch.zeros_like(batch.length), logits) + own > 0
        factor = params.repetition_penalty.clamp(1 / FINITE, FINITE)[:, None, None].to(logits.dtype)
        score = torch.where(occurs, torch.where(score > 0, score / factor, score * factor), score)
    if active & {"presence_penalty", "frequency_penalty"}:
        n = _committed(batch, places, batch.prompt_length, logits) + own
        presence = params.presence_penalty[:, None, None].to(logits.dtype)
        frequency = params.frequency_penalty[:, None, None].to(logits.dtype)
        score = score - frequency * n - presence * (n > 0)
    return logits.scatter(2, at, score)


def _committed(
    batch: Batch, places: Int[Tensor, "B L"], first: Int[Tensor, "B"], like: Float[Tensor, "B N V"]
) -> Float[Tensor, "B 1 L"]:
    """How often each place's token was committed at position `first[b]` or later."""
    slot = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    counted = (slot >= first[:, None]) & (slot < batch.length[:, None])
    counts = like.new_zeros(like.shape[0], like.shape[2])
    counts = counts.scatter_add(1, batch.ids, counted.to(like.dtype))
    return counts.gather(1, places)[:, None]
