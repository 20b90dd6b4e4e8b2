"""Who attends whom in the ragged cache, as the 4-D float masks Hugging Face models take; and attention that spares copies.

A bool mask under eager attention is silently wrong, hence floats (the dtype's lowest value, not -inf: rows of -inf alone
would give NaN).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ATTENTION = "specdiff"


def causal(at: Int[Tensor, "R N"], slots: int, window: int | None = None) -> Bool[Tensor, "R 1 N S"]:
    """Position `at` sees the slots up to its own, at most the last `window` of them."""
    slot = torch.arange(slots, device=at.device)
    seen = slot <= at[..., None]
    if window is not None:
        seen &= slot > at[..., None] - window
    return seen[:, None]


def additive(seen: Bool[Tensor, "R 1 N S"], dtype: torch.dtype) -> Float[Tensor, "R 1 N S"]:
    """0 where attention is allowed, the dtype's lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "B Q N D"],
    key: Float[Tensor, "B A S D"],
    value: Float[Tensor, "B A S D"],
    attention_mask: Float[Tensor, "B 1 N S"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B N Q D"], None]:
    """Scaled dot-product attention with the query heads of a group laid along the query axis.

    The stock wrapper copies keys and values once per query head whenever a mask is given; here they are read in place.
    """
    B, Q, N, D = query.shape
    A = key.shape[1]
    if attention_mask is not None and Q != A:
        group = Q // A
        folded = query.reshape(B, A, group * N, D)
        mask = attention_mask.expand(B, 1, N, -1).repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling).reshape(B, Q, N, -1)
    else:
        looks_back = getattr(module, "is_causal", True) if is_causal is None else is_causal  # no mask is causal, but for encoders
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=scaling,
            enable_gqa=Q != A,
            is_causal=looks_back and attention_mask is None and N > 1,
        )
    return out.transpose(1, 2).contiguous(), None
