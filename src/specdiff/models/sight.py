"""How far back each layer of a model sees, as the attention masks its family takes.

The cache keeps every slot of every layer; a sliding window only hides slots. Three kinds of families there are: one mask for
all layers (with a window or without), a mask for each layer type, and GPT-Neo, which has its own ideas.

Shapes: R rows of one forward, N positions of it, S attended slots.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from specdiff.errors import UnsupportedModelError
from specdiff.models import masks

Mask = Float[Tensor, "R 1 N S"] | dict[str, Float[Tensor, "R 1 N S"]]
FULL, SLIDING = (
    "full_attention",
    "sliding_attention",
)  # transformers' names of the layer types that keys at positions serve

REFUSED = {
    **dict.fromkeys(("bloom", "mpt"), "biases attention by distance on its own (alibi), taking a cache's rows to be of one length"),
    **dict.fromkeys(("falcon_mamba", "lfm2", "lfm2_moe", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"),
                    "carries a state that a rejected draft cannot be taken out of"),
    **dict.fromkeys(("openai-gpt", "reformer", "xlm", "xlnet"), "keeps no keys and values to go on from"),
    "whisper": "counts the positions of a padded row from its padding on",
}  # fmt: skip


SERVED_ROPE = (
    "default",
    "linear",
    "llama3",
    "proportional",
    "yarn",
)  # rope types that turn a position the same way always
FIXED_NTK = (
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hunyuan_vl_text",
)  # call it dynamic, but an `alpha` fixes their frequencies


def refuse(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError, saying why, for a model that its config alone shows cannot be scored exactly."""
    text = config.get_text_config()
    alibi = REFUSED["bloom"] if getattr(text, "alibi", False) else None
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - {FULL, SLIDING})
    layers = (
        f"has layers of type {', '.join(kinds)}, where only full and sliding attention are served"
        if kinds
        else None
    )
    encodes = "encodes its prompt apart from its answer" if config.is_encoder_decoder else None
    why = REFUSED.get(config.model_type) or alibi or encodes or layers or _rope(text)
    if why is not None:
        raise UnsupportedModelError(
            f"a {config.model_type} target cannot be scored exactly over the ragged cache: it {why}; supported are models whose "
            f"layers attend to keys at explicit positions, such as gpt2, llama, qwen2 and qwen3 (docs/supported-models.md)"
        )


def rope_types(config: PretrainedConfig) -> list[str]:
    """The rope types a text config names, those of single layer types included."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    fixed = config.model_type in FIXED_NTK
    types = set()
    for group in groups:
        name = group.get("rope_type", group.get("type"))
        if name is not None and not (fixed and name == "dynamic" and group.get("alpha")):
            types.add(str(name))
    return sorted(types)


def _rope(config: PretrainedConfig) -> str | None:
    """Why a model's rotary embedding cannot be served, if so."""
    others = [name for name in rope_types(config) if name not in SERVED_ROPE]
    if not others:
        return None
    return (
        f"has rotary embeddings of type {', '.join(others)}, whose frequencies may change with the length of the whole forward "
        f"pass, neighbors and drafts included (served are {', '.join(SERVED_ROPE)})"
    )


class Sight(ABC):
    """A model's masks."""

    @property
    @abstractmethod
    def window(self) -> int | None:
        """How many positions, its own included, a sliding layer sees; None where no layer slides."""

    @abstractmethod
    def looking(
        self, at: Int[Tensor, "R N"], slots: int, dtype: torch.dtype
    ) -> AbstractContextManager[Mask]:
        """What to hand the model as its attention mask for queries at slots `at` over the first `slots`; call it inside."""

    @abstractmethod
    def narrowed(self, window: int) -> AbstractContextManager[None]:
        """The same model with a smaller window: a short text then shows whether the right layers slide, by the right amount."""


class ConfiguredSight(Sight):
    """Families that make masks from their config at each call: one for all layers, or one a layer type where layers differ.

    Here too it is read at each call, so that the masks follow a config that is changed under a loaded model.
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
    def looking(self, at: Int[Tensor, "R N"], slots: int, dtype: torch.dtype) -> Iterator[Mask]:
        near = masks.additive(masks.causal(at, slots, self.window), dtype)
        yield (
            {FULL: masks.additive(masks.causal(at, slots), dtype), SLIDING: near}
            if self.mixed
            else near
        )

    @contextmanager
    def narrowed(self, window: int) -> Iterator[None]:
        own: int | None = self.config.sliding_window
        self.config.sliding_window = window
        try:
            yield
        finally:
            self.config.sliding_window = own


class GPTNeoSight(Sight):
    """GPT-Neo hands one mask to every layer, and each layer adds a band that counts slots as if all rows had one length.

    While it is looked at here, the bands are wide open, and a hook hands the local layers a windowed mask. Both are undone at
    once, so the model stays the user's own; meanwhile no other thread may call it, which the model's lock ensures among
    targets. The window is the width of the bands, whatever the config has come to say since they were made.
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
    def looking(self, at: Int[Tensor, "R N"], slots: int, dtype: torch.dtype) -> Iterator[Mask]:
        near = masks.additive(masks.causal(at, slots, self.window), dtype)

        def hand(_: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return arguments, named | {"attention_mask": near.to(named["attention_mask"].device)}

        bands = [layer.bias for layer in self.layers]
        hooks = [layer.register_forward_pre_hook(hand, with_kwargs=True) for layer in self.local]
        try:
            for layer in self.layers:
                layer.bias = layer.bias.new_ones(()).expand(1, 1, slots, slots)
            yield masks.additive(masks.causal(at, slots), dtype)
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


def sight_of(model: PreTrainedModel) -> Sight:
    """The sight of a model's family."""
    return (
        GPTNeoSight(model)
        if model.config.model_type == "gpt_neo"
        else ConfiguredSight(model.config)
    )
