"""The decoder layers of a model, and what has to be known of one to compile it elsewhere.

Layers of one description are compiled once: weights, keys and values are inputs. A description is
JSON, from which `worker` builds the same layer in another process: its class and config, the
classes and plain attributes of its modules, the shapes of its tensors, and how the model calls it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from specdiff.errors import UnsupportedModelError
from specdiff.models.cache import RaggedCache
from specdiff.models.masks import ATTENTION, ConfigMasks
from specdiff.models.ragged import RaggedModel

STREAMED = "specdiff.nn.linear"  # a faster forward of float32 linear layers
RECORDER = "transformers.utils.output_capturing"  # of hidden states, once a drafter has read some
OWN = ("layer_idx", "training")  # attributes that may differ between layers of one description
# what the model passes on, and no layer computes with
UNUSED = frozenset({"output_attentions", "output_hidden_states", "output_router_logits"})
# values of a config that no layer computes with
UNREAD = (
    "_name_or_path", "architectures", "transformers_version", "vocab_size",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class LayerKind:
    """Layers that one compiled layer serves; `description` is JSON."""

    description: dict[str, Any]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """The arguments of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def decoder_layers(ragged: RaggedModel) -> list[nn.Module]:
    """The decoder layers in order.

    Raises UnsupportedModelError if the model has none that are called one after the other.
    """
    if type(ragged.masks) is not ConfigMasks:
        raise UnsupportedModelError("its layers are changed at every call")
    lists = [
        module
        for module in ragged.model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == ragged.layers
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(f"{len(lists)} of its lists of modules may be its layers")
    return list(lists[0])


def recorded(
    ragged: RaggedModel, layers: list[nn.Module], call: Callable[[], Any]
) -> list[Recording]:
    """The Recording of each layer during `call`. Raises UnsupportedModelError if one has none."""
    calls: dict[nn.Module, Recording] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = Recording(args, kwargs)

    with ragged.lock:
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            call()
        finally:
            for handle in hooks:
                handle.remove()
    if len(calls) < len(layers):
        raise UnsupportedModelError("some of its layers are not called")
    return [calls[layer] for layer in layers]


def kinds(
    ragged: RaggedModel,
    layers: list[nn.Module],
    recordings: list[Recording],
    cache: RaggedCache,
) -> list[LayerKind]:
    """The layers in groups of one description; `cache` is that of the recorded calls.

    Raises UnsupportedModelError for a layer that cannot be described.
    """
    if sorted(cache.keys) != [*range(len(layers))]:
        raise UnsupportedModelError("its layers share keys and values")
    config = ragged.model.config.get_text_config()
    values = json.loads(config.to_json_string(use_diff=False))
    for name in UNREAD:
        values.pop(name, None)
    groups: dict[str, list[int]] = {}
    shared = {
        "config": [*_path(config), values],
        "attention": config._attn_implementation,
    }
    if shared["attention"] not in (ATTENTION, "eager"):
        raise UnsupportedModelError(f"its attention is {shared['attention']!r}")
    for index, (layer, recording) in enumerate(zip(layers, recordings, strict=True)):
        stores = [
            [store.shape[1], store.shape[3], _dtype(store)]
            for store in (cache.keys[index], cache.values[index])
        ]
        own = {**described(layer), "call": call_of(recording), "stores": stores}
        groups.setdefault(json.dumps(own, sort_keys=True), []).append(index)
    return [
        LayerKind({**shared, **json.loads(text), "index": indices[0]}, tuple(indices))
        for text, indices in groups.items()
    ]


def described(layer: nn.Module) -> dict[str, Any]:
    """A layer's modules and tensors.

    Raises UnsupportedModelError for weights that are no plain tensors of the CPU, for hooks, for
    modules whose forward was replaced, and for a layer that is not transformers' own.
    """
    if not type(layer).__module__.startswith("transformers.models."):
        raise UnsupportedModelError(
            f"its layers ({type(layer).__name__}) are no part of transformers"
        )
    modules = [_module(name, module) for name, module in layer.named_modules()]
    tensors = [
        [name, _dtype(tensor), list(tensor.shape), list(tensor.stride())]
        for name, tensor in named_tensors(layer)
    ]
    return {"class": _path(layer), "modules": modules, "tensors": tensors}


def named_tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each name."""
    return [
        *layer.named_parameters(remove_duplicate=False),
        *layer.named_buffers(remove_duplicate=False),
    ]


def places(layer: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors of `named_tensors` are stored: they are read anew at every call."""
    slots = []
    for name, _ in named_tensors(layer):
        stem, _, leaf = name.rpartition(".")
        module = layer.get_submodule(stem)
        store = module._parameters if leaf in module._parameters else module._buffers
        slots.append((store, leaf))
    return slots


def call_of(recording: Recording) -> list[list[Any]]:
    """The arguments of a call: `[name or position, what, dtype, sizes after R and N]`.

    Raises UnsupportedModelError for an argument of another kind.
    """
    hidden = recording.args[0] if recording.args else None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnsupportedModelError("its layers take no hidden states first")
    size = hidden.shape[:2]
    items = [*enumerate(recording.args), *recording.kwargs.items()]
    call = [
        [name, *_argument(str(name), value, size)] for name, value in items if name not in UNUSED
    ]
    for kind in ("mask", "cache"):
        if kind not in [item[1] for item in call]:
            raise UnsupportedModelError(f"its layers take no {kind}")
    return call


def _argument(name: str, value: Any, size: torch.Size) -> list[Any]:
    if isinstance(value, Cache):
        return ["cache"]
    if isinstance(value, PLAIN):
        return ["constant", value]
    if isinstance(value, Tensor) and value.dim() == 4 and value.shape[:3] == (size[0], 1, size[1]):
        return ["mask", _dtype(value)]
    if isinstance(value, Tensor) and value.shape[:2] == size:
        return ["tensor", _dtype(value), list(value.shape[2:])]
    if isinstance(value, tuple):
        return ["tuple", [_argument(name, part, size) for part in value]]
    raise UnsupportedModelError(
        f"its layers take an argument {name} of another shape or type ({type(value).__name__})"
    )


def _module(name: str, module: nn.Module) -> list[Any]:
    """The name, class and plain attributes of a module, and whether its weights are streamed."""
    forward = vars(module).get("forward")
    own = isinstance(forward, MethodType) and forward.__func__.__module__ == STREAMED
    if (name and hooked(module)) or (forward is not None and not own):
        raise UnsupportedModelError(
            f"another library has changed what its {name or 'layers'} compute"
        )
    facts = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, PLAIN) and not key.startswith("_") and key not in OWN
    }
    return [name, _path(module), facts, own]


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, apart from transformers' own, which record what was computed."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) != RECORDER for hook in hooks)


def _path(thing: object) -> list[str]:
    return [type(thing).__module__, type(thing).__qualname__]


def _dtype(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        kind = f"a {type(tensor).__name__} on {tensor.device}"
        raise UnsupportedModelError(f"it computes with {kind}")
    return str(tensor.dtype).removeprefix("torch.")
