"""One decoder layer, computed by a compiled layer of its kind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdiff.compiled.layers import UNUSED, places
from specdiff.models.ragged import View


class CompiledLayerError(RuntimeError):
    """A compiled layer refused its arguments."""


class CompiledLayer:
    """A layer's forward by the compiled layers of its kind.

    `loaders[N]` is the one for N positions. A call of another form is computed by the layer itself.
    """

    def __init__(self, layer: nn.Module, index: int, call: Sequence[Sequence[Any]]) -> None:
        self.layer = layer
        self.index = index
        self.weights = places(layer)
        self.loaders: dict[int, Any] = {}
        self.names = {name for name, *_ in call if isinstance(name, str)}
        self.cache = next(name for name, kind, *_ in call if kind == "cache")
        self.constants = [(name, *rest) for name, kind, *rest in call if kind == "constant"]
        self.tensors: list[tuple[Any, int | None, torch.dtype]] = []  # name, place in a tuple
        for name, kind, *rest in call:
            if kind in ("tensor", "mask"):
                self.tensors.append((name, None, getattr(torch, rest[0])))
            elif kind == "tuple":
                parts = [getattr(torch, part[1]) for part in rest[0]]
                self.tensors += [(name, place, dtype) for place, dtype in enumerate(parts)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._inputs(args, kwargs)
        if inputs is None:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        try:
            return self.loaders[args[0].shape[1]].run(inputs)[0]
        except RuntimeError as error:
            # a shape that it was not made for; what it may have written is written again
            raise CompiledLayerError(first_line(error)) from error

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors of `worker.Traced` in order; None if the call is of another form."""
        if kwargs.keys() - UNUSED != self.names:
            return None
        arguments: dict[Any, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        if any(arguments[name] is not value for name, value in self.constants):
            return None
        inputs: list[Tensor] = []
        for name, place, dtype in self.tensors:
            value = arguments[name] if place is None else arguments[name][place]
            if value.dtype is not dtype:
                return None
            inputs.append(value.contiguous())
        view = arguments[self.cache]
        if type(view) is not View or view.store.rows != 1:  # another thread's own call
            return None
        cache = view.store
        assert cache.index is not None, "place comes first"
        inputs += [cache.keys[self.index], cache.values[self.index], cache.index[1].contiguous()]
        inputs += [owner[name] for owner, name in self.weights]
        return inputs


def first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
