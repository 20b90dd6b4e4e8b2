"""Who attends whom in the ragged cache, as the 4-D float masks Hugging Face models take; and attention that spares copies.

A bool mask under eager attention is silently wrong, hence floats (the dtype's lowest value, not -inf: rows of -inf alone
would give NaN).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdiff.errors import UnsupportedModelError

ATTENTION = "specdiff"
# what models hand to every attention function and what masks already say: of no consequence to this one
NEUTRAL = frozenset({
    "position_ids", "use_cache", "sliding_window", "output_attentions", "output_hidden_states", "output_router_logits",
})  # fmt: skip
SINKS = (
    "s_aux",
    "sinks",
)  # scaled dot-product attention has none, and transformers' own drops them without a word


def causal(
    at: Int[Tensor, "R N"], slots: int, window: int | None = None
) -> Bool[Tensor, "R 1 N S"]:
    """Position `at` sees the slots up to its own, at most the last `window` of them."""
    slot = torch.arange(slots, device=at.device)
    seen = slot <= at[..., None]
    if window is not None:
        seen &= slot > at[..., None] - window
    return seen[:, None]


def additive(seen: Bool[Tensor, "R 1 N S"], dtype: torch.dtype) -> Float[Tensor, "R 1 N S"]:
    """0 where attention is allowed, the dtype's lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "B Q N D"],
    key: Float[Tensor, "B A S D"],
    value: Float[Tensor, "B A S D"],
    attention_mask: Float[Tensor, "B H N S"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B N Q D"], None]:
    """Scaled dot-product attention with the query heads of a group laid along the query axis.

    The stock function copies keys and values once per query head where a mask is given; here they are read in place. All
    else (no mask, no groups, dropout, an option that may change the result) is left to the stock function.

    Raises UnsupportedModelError for attention sinks.
    """
    sinks = [name for name in SINKS if options.get(name) is not None]
    if sinks:
        raise UnsupportedModelError(
            f"this model adds attention sinks ({sinks[0]}), which scaled dot-product attention leaves out; "
            f"load it with attn_implementation='eager'"
        )
    B, Q, N, D = query.shape
    A = key.shape[1]
    plain = not dropout and all(value is None or name in NEUTRAL for name, value in options.items())
    if attention_mask is None or attention_mask.shape[1] != 1 or Q == A or not plain:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return out, None
    group = Q // A
    folded = query.reshape(B, A, group * N, D)
    mask = attention_mask.expand(B, 1, N, -1).repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, Q, N, -1).transpose(1, 2).contiguous(), None
