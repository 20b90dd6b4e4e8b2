"""A second device, played by the CPU: what meets a tensor of the other side fails, as on a GPU.

Every storage is on the host unless it was made on, or moved to, the second device while the mode is on. The rules are CUDA's: a
number (a tensor without dimensions) may come from the host, an index too, and `copy_` goes across; all else must be on one side.
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
        wanted = _device(kwargs.pop("device", None))
        if wanted is not None and wanted not in (DEVICE, HOST):
            return func(*args, device=wanted, **kwargs)  # meta
        if func == Tensor.to:
            to, wanted = self._destination(args, wanted)
            if wanted not in (None, DEVICE, HOST):
                return func(*args, **kwargs)
            args = to
            if wanted is not None and wanted != self.place(args[0]):
                moved = (
                    args[0].clone()
                    if len(args) == 1 and not kwargs
                    else func(*args, **kwargs).clone()
                )
                self.put(moved, wanted)
                return moved
        if func == Tensor.cpu:
            wanted = HOST
            args = (args[0].clone(),) if self.place(args[0]) == DEVICE else args
        generator = kwargs.get("generator")
        if generator is not None and wanted == DEVICE:
            raise RuntimeError(f"{name}: a generator of the host draws on the second device")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if wanted is None:
            wanted = self._meet(name, args, inputs)
        elif func not in (Tensor.to, Tensor.cpu):
            kwargs["device"] = HOST
        out = func(*args, **kwargs)
        own = {t.untyped_storage()._cdata for t in inputs}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in own:
                self.put(leaf, wanted)
        return out

    def _destination(
        self, args: Any, wanted: torch.device | None
    ) -> tuple[Any, torch.device | None]:
        """`to`'s own arguments without the device, and the device."""
        rest: list[Any] = []
        for argument in args[1:]:
            if isinstance(argument, Tensor):
                wanted = self.place(argument)
                rest.append(argument.dtype)
            elif isinstance(argument, torch.device | str):
                wanted = _device(argument)
            elif isinstance(argument, torch.dtype):  # the others say how, not what
                rest.append(argument)
        return (args[0], *rest), wanted

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
