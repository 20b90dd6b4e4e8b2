"""Attention over the ragged cache: 4-D float masks for each family, and grouped attention.

Bool masks under eager attention are silently wrong, hence floats (the dtype's lowest value, not
-inf: a row of -inf alone would give NaN). The cache holds every slot of every layer; a sliding
window only hides slots. There are three kinds of families: one mask for all layers (with a window
or without), one mask for each layer type, and GPT-Neo.

Shapes: R rows of one forward, N positions of it, S attended slots.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdiff.errors import UnsupportedModelError
from specdiff.models.refusals import FULL, SLIDING

ATTENTION = "specdiff"
# options that models pass to every attention function and that the masks already express
NEUTRAL = frozenset({
    "position_ids", "use_cache", "sliding_window",
    "output_attentions", "output_hidden_states", "output_router_logits",
})  # fmt: skip
# attention sinks: scaled dot-product attention has none, and transformers' own drops them silently
SINKS = ("s_aux", "sinks")
Mask = Float[Tensor, "R 1 N S"] | dict[str, Float[Tensor, "R 1 N S"]]


def causal(
    at: Int[Tensor, "R N"],
    slots: int,
    window: int | None = None,
    related: Bool[Tensor, "#R N N"] | None = None,
) -> Bool[Tensor, "R 1 N S"]:
    """Position `at` attends to the slots up to its own, at most the last `window` of them.

    With `related`, the positions are a tree from slot `at[:, 0]` on: each attends to the slots
    before the tree and to those of its related nodes, and the window counts depth, not slots.
    """
    slot = torch.arange(slots, device=at.device)
    if related is not None:
        return _tree(at, slot, window, related)
    visible = slot <= at[..., None]
    if window is not None:
        visible &= slot > at[..., None] - window
    return visible[:, None]


def _tree(
    at: Int[Tensor, "R N"],
    slot: Int[Tensor, "S"],
    window: int | None,
    related: Bool[Tensor, "#R N N"],
) -> Bool[Tensor, "R 1 N S"]:
    first = at[:, :1]
    before = (slot < first)[:, None].expand(-1, at.shape[1], -1)
    index = at[:, None].expand(-1, at.shape[1], -1)
    visible = before.scatter(2, index, related.expand(len(at), -1, -1))
    if window is not None:
        position = first + related.sum(-1) - 1
        place = slot.expand(len(at), -1).scatter(1, at, position)
        visible = visible & (place[:, None] > position[..., None] - window)
    return visible[:, None]


def additive(visible: Bool[Tensor, "R 1 N S"], dtype: torch.dtype) -> Float[Tensor, "R 1 N S"]:
    """0 where attention is allowed, the dtype's lowest number elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


class MaskBuilder(ABC):
    """A model's masks."""

    @property
    @abstractmethod
    def window(self) -> int | None:
        """Positions that a sliding layer attends to, its own included; None if no layer slides."""

    @abstractmethod
    def applied(
        self,
        at: Int[Tensor, "R N"],
        slots: int,
        dtype: torch.dtype,
        related: Bool[Tensor, "#R N N"] | None = None,
    ) -> AbstractContextManager[Mask]:
        """The attention mask for queries at slots `at` over the first `slots`; see `causal`.

        Call the model inside the context.
        """

    @abstractmethod
    def narrowed(self, window: int) -> AbstractContextManager[None]:
        """The same model with a smaller window.

        A short text then shows whether the right layers slide, and by the right amount.
        """


class ConfigMasks(MaskBuilder):
    """Families that make masks from their config at each call.

    One for all layers, or one for each layer type where layers differ. The config is read at each
    call here too, so that the masks follow a config that is changed under a loaded model.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config.get_text_config()

    @property
    def mixed(self) -> bool:
        return SLIDING in (getattr(self.config, "layer_types", None) or ())

    @property
    def window(self) -> int | None:
        typed = getattr(self.config, "layer_types", None) is not None
        slides = self.mixed if typed else getattr(self.config, "use_sliding_window", True)
        return getattr(self.config, "sliding_window", None) if slides else None

    @contextmanager
    def applied(
        self,
        at: Int[Tensor, "R N"],
        slots: int,
        dtype: torch.dtype,
        related: Bool[Tensor, "#R N N"] | None = None,
    ) -> Iterator[Mask]:
        near = additive(causal(at, slots, self.window, related), dtype)
        if self.mixed:
            yield {FULL: additive(causal(at, slots, None, related), dtype), SLIDING: near}
        else:
            yield near

    @contextmanager
    def narrowed(self, window: int) -> Iterator[None]:
        own: int | None = self.config.sliding_window
        self.config.sliding_window = window
        try:
            yield
        finally:
            self.config.sliding_window = own


class GPTNeoMasks(MaskBuilder):
    """GPT-Neo passes one mask to every layer, and each layer adds a band of its own.

    The band counts slots as if all rows had one length. While the masks are applied, the bands are
    wide open, and a hook passes a windowed mask to the local layers. Both are undone at once, so
    the model stays the user's own; meanwhile no other thread may call it, which the model's lock
    ensures among targets. The window is the width of the bands, even if the config has changed
    since they were made.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        blocks: Any = model.get_submodule("transformer.h")
        self.layers: list[Any] = [block.attn.attention for block in blocks]
        self.local = [layer for layer in self.layers if layer.attention_type == "local"]
        self.own = int(self.local[0].bias[0, 0, -1].sum()) if self.local else None

    @property
    def window(self) -> int | None:
        return self.own

    @contextmanager
    def applied(
        self,
        at: Int[Tensor, "R N"],
        slots: int,
        dtype: torch.dtype,
        related: Bool[Tensor, "#R N N"] | None = None,
    ) -> Iterator[Mask]:
        near = additive(causal(at, slots, self.window, related), dtype)

        def windowed(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"attention_mask": near.to(kwargs["attention_mask"].device)}

        bands = [layer.bias for layer in self.layers]
        hooks = [
            layer.register_forward_pre_hook(windowed, with_kwargs=True) for layer in self.local
        ]
        try:
            for layer in self.layers:
                layer.bias = layer.bias.new_ones(()).expand(1, 1, slots, slots)
            yield additive(causal(at, slots, None, related), dtype)
        finally:
            for layer, band in zip(self.layers, bands, strict=True):
                layer.bias = band
            for hook in hooks:
                hook.remove()

    @contextmanager
    def narrowed(self, window: int) -> Iterator[None]:
        own = self.own
        bands = [layer.bias for layer in self.local]
        self.own = window
        try:
            for layer in self.local:
                layer.bias = layer.bias & ~torch.ones_like(layer.bias).tril(-window)
            yield
        finally:
            self.own = own
            for layer, band in zip(self.local, bands, strict=True):
                layer.bias = band


def masks_for(model: PreTrainedModel) -> MaskBuilder:
    """The masks of a model's family."""
    if model.config.model_type == "gpt_neo":
        return GPTNeoMasks(model)
    return ConfigMasks(model.config)


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

    The stock function copies keys and values once per query head when there is a mask; here they
    are read in place. All other cases (no mask, no groups, dropout, an option that may change the
    result) go to the stock function.

    Raises UnsupportedModelError for attention sinks.
    """
    sinks = [name for name in SINKS if options.get(name) is not None]
    if sinks:
        raise UnsupportedModelError(
            f"this model adds attention sinks ({sinks[0]}), which scaled dot-product attention "
            f"leaves out; load it with attn_implementation='eager'"
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
    mask = attention_mask
    if N > 1:  # one query of each head has one mask
        mask = attention_mask.expand(B, 1, N, -1).repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, Q, N, -1).transpose(1, 2).contiguous(), None
