"""A second device, simulated on the CPU: operations that mix it with the host fail, as on a GPU.

A storage is on the host unless it was created on, or moved to, the second device while the mode
is on. The rules are CUDA's: a number (a tensor without dimensions) and an index may come from the
host, and `copy_` works across; everything else must be on one side.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("privateuseone")
HOST = torch.device("cpu")
ACROSS = {
    "copy_",
    "__set__",
    "backward",
    "_has_compatible_shallow_copy_type",
}  # these may read both sides


class SecondDevice(TorchFunctionMode):
    """While it is on, `DEVICE` works as a device of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}  # those of the second device

    def place(self, tensor: Tensor) -> torch.device:
        reference = self.storages.get(tensor.untyped_storage()._cdata)
        return HOST if reference is None or reference.expired() else DEVICE

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if device == DEVICE:
            self.storages[storage._cdata] = StorageWeakRef(storage)
        else:
            self.storages.pop(storage._cdata, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if self.place(args[0]) == DEVICE else func(*args)
        name = func.__name__
        if name in ("numpy", "__array__") and self.place(args[0]) == DEVICE:
            raise TypeError("a tensor of the second device is not numpy's")
        device = _device(kwargs.pop("device", None))
        if device is not None and device not in (DEVICE, HOST):
            return func(*args, device=device, **kwargs)  # meta
        if func == Tensor.to:
            to, device = self._destination(args, device)
            if device not in (None, DEVICE, HOST):
                return func(*args, **kwargs)
            args = to
            if device is not None and device != self.place(args[0]):
                moved = (
                    args[0].clone()
                    if len(args) == 1 and not kwargs
                    else func(*args, **kwargs).clone()
                )
                self.put(moved, device)
                return moved
        if func == Tensor.cpu:
            device = HOST
            args = (args[0].clone(),) if self.place(args[0]) == DEVICE else args
        generator = kwargs.get("generator")
        if generator is not None and device == DEVICE:
            raise RuntimeError(f"{name}: a generator of the host draws on the second device")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if device is None:
            device = self._meet(name, args, inputs)
        elif func not in (Tensor.to, Tensor.cpu):
            kwargs["device"] = HOST
        out = func(*args, **kwargs)
        own = {t.untyped_storage()._cdata for t in inputs}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in own:
                self.put(leaf, device)
        return out

    def _destination(
        self, args: Any, device: torch.device | None
    ) -> tuple[Any, torch.device | None]:
        """`to`'s own arguments without the device, and the device."""
        others: list[Any] = []
        for argument in args[1:]:
            if isinstance(argument, Tensor):
                device = self.place(argument)
                others.append(argument.dtype)
            elif isinstance(argument, torch.device | str):
                device = _device(argument)
            elif isinstance(argument, torch.dtype):  # the others say how, not what
                others.append(argument)
        return (args[0], *others), device

    def _meet(self, name: str, args: Any, inputs: list[Tensor]) -> torch.device:
        """Where these tensors meet. Raises RuntimeError where they may not."""
        places = [self.place(t) for t in inputs]
        if name in ACROSS or DEVICE not in places:
            return places[0] if places else HOST
        if name in ("__getitem__", "__setitem__", "index_put", "index_put_"):
            strangers = [t for t in inputs[1:] if self.place(t) != places[0] and t.dim() > 0]
            if places[0] == HOST and strangers:
                raise RuntimeError(f"{name}: a tensor of the host meets one of the second device")
            if any(t.is_floating_point() for t in strangers):
                raise RuntimeError(
                    f"{name}: a tensor of the second device takes values of the host"
                )
            return places[0]
        if any(t.dim() > 0 and place == HOST for t, place in zip(inputs, places, strict=True)):
            shapes = ", ".join(
                f"{place.type} {list(t.shape)}" for t, place in zip(inputs, places, strict=True)
            )
            raise RuntimeError(f"{name}: tensors of two devices meet: {shapes}")
        return DEVICE


def _device(name: Any) -> torch.device | None:
    return None if name is None else torch.device(name)
