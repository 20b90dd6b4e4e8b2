"""Compiler of decoder layers: a process of its own, at the lowest priority.

It reads one JSON job from standard input, builds the layer described in it with random weights, and
writes an entry of the store for each range of positions. One line of JSON follows each: {"entry"}
or {"error"}. The reader may be gone by then: the entries serve the next process.

Run by `specdiff.compiled.background`; one process compiles at a time.
"""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MethodType
from typing import Any, TextIO

import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim, export
from transformers import PretrainedConfig

from specdiff.compiled import store
from specdiff.compiled.layers import STREAMED, described, named_tensors
from specdiff.errors import StorageError
from specdiff.models.packed import Groups, Int4Linear, Int8Linear, SplitInt8Linear

ROW, SLOTS, BOUND = 1, 384, 256  # of the examples; slots and bound are free
PACKED: dict[str, Callable[[Tensor, Tensor | None], nn.Module]] = {
    "Int4Linear": lambda weight, bias: Int4Linear(Groups.rounded(weight), bias),
    "SplitInt8Linear": lambda weight, bias: SplitInt8Linear(Groups.rounded(weight), bias),
    "Int8Linear": Int8Linear,
}


class Stored:
    """A layer's keys and values, as a traced layer updates them: see RaggedCache.

    Shapes: A key/value heads, S slots, N positions, D head width.
    """

    def __init__(
        self,
        keys: Float[Tensor, "1 A S D"],
        values: Float[Tensor, "1 A S D"],
        at: Int[Tensor, "1 N"],
        bound: int,
    ) -> None:
        self.keys = keys
        self.values = values
        self.at = at
        self.bound = bound

    def update(
        self, keys: Float[Tensor, "1 A N D"], values: Float[Tensor, "1 A N D"], *args: Any
    ) -> tuple[Tensor, Tensor]:
        return self._write(self.keys, keys), self._write(self.values, values)

    def _write(self, store: Tensor, new: Tensor) -> Tensor:
        rows = torch.zeros_like(self.at[:, :1])
        store.transpose(1, 2).index_put_((rows, self.at), new.transpose(1, 2))
        return store[:, :, : self.bound]


class Traced(nn.Module):
    """A layer as a function of its call's tensors, its keys, values and slots, and its weights."""

    def __init__(self, layer: nn.Module, call: Sequence[Sequence[Any]]) -> None:
        super().__init__()
        self.layer = [layer]  # not a submodule: its weights are arguments
        self.call = call
        self.names = [name for name, _ in named_tensors(layer)]

    def forward(
        self,
        tensors: list[Tensor],
        keys: Tensor,
        values: Tensor,
        at: Tensor,
        weights: list[Tensor],
    ) -> Tensor:
        queue = iter(tensors)
        masks = [tensors[i] for i, leaf in enumerate(leaves(self.call)) if leaf[0] == "mask"]
        stored = Stored(keys, values, at, masks[0].shape[-1])
        arguments = [(name, _value(item, queue, stored)) for name, *item in self.call]
        args = tuple(value for name, value in arguments if isinstance(name, int))
        kwargs = {name: value for name, value in arguments if isinstance(name, str)}
        parameters = dict(zip(self.names, weights, strict=True))
        out = torch.func.functional_call(self.layer[0], parameters, args, kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"its layers return a {type(out).__name__}, not one tensor")
        return out


def leaves(call: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The tensors of a call in order: ["mask", dtype] or ["tensor", dtype, sizes]."""
    flat = [part for _, *item in call for part in (item[1] if item[0] == "tuple" else [item])]
    return [part for part in flat if part[0] in ("mask", "tensor")]


def _value(item: Sequence[Any], queue: Iterator[Tensor], stored: Stored) -> Any:
    if item[0] == "tuple":
        return tuple(_value(part, queue, stored) for part in item[1])
    if item[0] == "constant":
        return item[1]
    return stored if item[0] == "cache" else next(queue)


def layer_of(description: Mapping[str, Any]) -> nn.Module:
    """The described layer, its weights random. Raises TypeError if it is another one."""
    module, name, values = description["config"]
    config: PretrainedConfig = _named(module, name).from_dict(values)
    config._attn_implementation = description["attention"]
    layer: nn.Module = _named(*description["class"])(config, layer_idx=description["index"])
    layer.eval()
    for path, (source, kind), facts, streamed in description["modules"]:
        if source == "specdiff.models.packed" and not _within_packed(path, description):
            names = [row[0] for row in description["tensors"]]
            bias = torch.zeros(facts["out_features"]) if f"{path}.bias" in names else None
            weight = torch.randn(facts["out_features"], facts["in_features"])
            layer.set_submodule(path, PACKED[kind](weight, bias))
        if streamed:
            part = layer.get_submodule(path)
            vars(part)["forward"] = MethodType(importlib.import_module(STREAMED)._forward, part)
    tensors = {name: (dtype, shape) for name, dtype, shape, _ in description["tensors"]}
    for name, tensor in named_tensors(layer):
        dtype, shape = tensors.get(name, ("", []))
        if list(tensor.shape) == shape:  # a model's own dtypes may be mixed
            tensor.data = tensor.data.to(getattr(torch, dtype))
    own = json.loads(json.dumps(described(layer)))
    for fact in ("modules", "tensors"):
        if _comparable(own[fact]) != _comparable(description[fact]):
            raise TypeError(f"the {fact} of a layer built from its config differ from the model's")
    return layer


def examples(layer: nn.Module, description: Mapping[str, Any], positions: str) -> tuple[Any, Any]:
    """Arguments of Traced, and their free dimensions."""
    count = 1 if positions == "1" else 5
    least, most = store.POSITIONS[positions]
    free = Dim.STATIC if least == most else Dim("N", min=least, max=most)
    slots = Dim("S", min=2, max=1 << 30)
    bound = Dim("b", min=2, max=1 << 30)
    tensors, shapes = [], []
    for kind, name, *sizes in leaves(description["call"]):
        dtype = getattr(torch, name)
        if kind == "mask":
            tensors.append(torch.zeros(ROW, 1, count, BOUND, dtype=dtype))
            shapes.append({2: free, 3: bound})
        else:
            tensors.append(torch.ones(ROW, count, *sizes[0], dtype=dtype))
            shapes.append({1: free})
    stores = [
        torch.zeros(ROW, heads, SLOTS, width, dtype=getattr(torch, dtype))
        for heads, width, dtype in description["stores"]
    ]
    weights = []
    strides = {name: stride for name, _, _, stride in description["tensors"]}
    for name, tensor in named_tensors(layer):
        detached = tensor.detach()
        weights.append(torch.empty_strided(detached.shape, strides[name], dtype=detached.dtype))
        weights[-1].copy_(detached)
    at = torch.arange(count)[None] + 100
    dynamic: Any = (shapes, {2: slots}, {2: slots}, {1: free}, [{} for _ in weights])
    return (tensors, *stores, at, weights), dynamic


def compile_layer(description: Mapping[str, Any], positions: str, path: Path) -> None:
    """Compile the described layer into a package of torch's at `path`."""
    layer = layer_of(description)
    arguments, shapes = examples(layer, description, positions)
    with torch.no_grad():
        program = export(
            Traced(layer, description["call"]),
            arguments,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    # loops over a few positions are too short for threads; products choose their number themselves
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"cpp.threads": 1}
    )


def main() -> None:
    descriptions = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no line of ours
    if sys.platform != "win32":
        os.nice(19)
    torch.set_num_threads(1)
    try:
        with _alone(), scratch_folder() as scratch:
            for description in descriptions:
                for positions in store.POSITIONS:
                    _report(lines, _entry(description, positions, scratch))
    except (OSError, StorageError) as error:
        _report(lines, {"error": str(error)})


def _entry(description: Mapping[str, Any], positions: str, scratch: Path) -> dict[str, Any]:
    """Compile a layer unless it is on disk; the line that says so."""
    folder = store.entry(description, positions)
    facts = {"layer": description["class"], "positions": positions, "torch": torch.__version__}
    try:
        if store.package(folder) is None:
            compile_layer(description, positions, scratch / store.PACKAGE)
            store.write(folder, scratch / store.PACKAGE, facts)
    except Exception as error:  # whatever torch cannot compile
        lines = (line.strip() for line in str(error).splitlines())
        message = next((line for line in lines if line), "")
        return {"error": f"{type(error).__name__}: {message[:300]}"}
    return {"entry": folder.name}


@contextmanager
def _alone() -> Iterator[None]:
    home = store.home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        yield


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for everything that the compiler writes: headers and checks serve all layers."""
    with tempfile.TemporaryDirectory(prefix="specdiff-compile-") as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        yield Path(scratch)


def _report(lines: TextIO, line: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):
        print(json.dumps(line), file=lines, flush=True)


def _named(module: str, name: str) -> Any:
    """A class of transformers."""
    if not module.startswith("transformers."):
        raise TypeError(f"{module}.{name} is no part of transformers")
    return getattr(importlib.import_module(module), name)


def _within_packed(path: str, description: Mapping[str, Any]) -> bool:
    """Whether a module is a part of a packed layer."""
    packed = [row[0] for row in description["modules"] if row[1][0] == "specdiff.models.packed"]
    return any(path.startswith(f"{other}.") for other in packed)


def _comparable(rows: list[list[Any]]) -> list[list[Any]]:
    """In any order, and without strides, which the loader of the model chose."""
    return sorted((row[:3] for row in rows), key=str)


if __name__ == "__main__":
    main()
