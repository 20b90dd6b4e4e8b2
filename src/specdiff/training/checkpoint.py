"""Checkpoints: everything that resuming needs, written whole or not at all.

training/checkpoints/00000250/training.safetensors   m.* network, e.* its average, o.* moments
training/checkpoints/00000250/state.json             step, seconds spent, ...
training/checkpoints/00000250/COMPLETE               written last: without it, it does not count
training/recipe.yaml, training/sources.json          what the run was begun with
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from specdiff import files
from specdiff.data.records import read_text
from specdiff.errors import CorpusError, UsageError, WeightsError
from specdiff.training.recipe import Recipe, as_yaml, load

MARKER = "COMPLETE"
HISTORY = 2  # complete checkpoints that stay on disk
RECIPE = "recipe.yaml"
SOURCES = "sources.json"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # empty but on the main process
SCATTER = StateDictOptions(full_state_dict=True)  # on every process
NETWORK = "network."  # a task's own parameters are all in its network


@dataclass(slots=True)
class TrainingState:
    """A prepared model and optimizer, sharded or not, and a moving average unless `decay` is None.

    Read and restored as plain whole tensors.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    decay: float | None
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decay is not None:
            self.average = {name: p.detach().clone() for name, p in self._parameters()}

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Move the average towards the parameters, early on in larger steps (as the SEDD code)."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def network(self) -> dict[str, Tensor]:
        """The network's tensors, averaged if there is an average. Every process must call it."""
        own: dict[str, Any] = get_model_state_dict(self.model, options=WHOLE)
        averaged = {name: _whole(tensor) for name, tensor in self.average.items()}
        return {name.removeprefix(NETWORK): tensor for name, tensor in (own | averaged).items()}

    def dump(self) -> dict[str, Tensor]:
        """All tensors: m.* network, e.* average, o.* moments. Every process must call it."""
        own: dict[str, Any] = get_model_state_dict(self.model, options=WHOLE)
        moments: dict[str, Any] = get_optimizer_state_dict(
            self.model, self.optimizer, options=WHOLE
        )
        tensors = {f"m.{name}": tensor for name, tensor in own.items()}
        tensors |= {f"e.{name}": _whole(tensor) for name, tensor in self.average.items()}
        for name, values in moments.get("state", {}).items():
            tensors |= {f"o.{name}.{kind}": value for kind, value in values.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `dump`."""
        set_model_state_dict(self.model, _part(tensors, "m."), options=SCATTER)
        stored = _part(tensors, "o.")
        moments: dict[str, Any] = get_optimizer_state_dict(
            self.model, self.optimizer, options=SCATTER
        )
        for name, values in moments["state"].items():
            # cloned, for step counts are taken over as they are
            values.update({kind: stored[f"{name}.{kind}"].clone() for kind in values})
        set_optimizer_state_dict(self.model, self.optimizer, moments, options=SCATTER)
        average = _part(tensors, "e.")
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(_placed(average[name], tensor))

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name.removeprefix("module."), parameter


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _placed(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Add the checkpoint of `step`, then delete all but the newest two.

    Raises StorageError, which leaves the older ones intact.
    """
    with files.staged_folder(folder / f"{step:08d}") as staged:
        files.write_tensors(staged / "training.safetensors", tensors)
        files.write_json(staged / "state.json", {"step": step, **state})
        files.write_text(staged / MARKER, "")
    for old in complete(folder)[:-HISTORY]:
        shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{MARKER}"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and state. Raises WeightsError naming the file."""
    try:
        tensors = load_file(path / "training.safetensors")
        return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise WeightsError(
            f"{path} is marked complete but cannot be read ({error}); "
            f"delete that folder to resume from an older one"
        ) from error


def truncate_log(path: Path, step: int) -> None:
    """Remove a log's entries beyond `step`, and a torn last line. Raises StorageError."""
    lines = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.endswith("}") and json.loads(line)["step"] <= step
    ]
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def write_origin(out: Path, recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Record the recipe of a run and the digests of its sources. Raises StorageError."""
    files.write_text(out / "training" / RECIPE, as_yaml(recipe))
    files.write_json(out / "training" / SOURCES, dict(sources))


def check_origin(out: Path, recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Raises UsageError or CorpusError if a run was begun with another recipe or other sources."""
    path = out / "training" / RECIPE
    old = load(str(path)) if path.exists() else recipe
    for name in Recipe.model_fields:
        if getattr(old, name) != getattr(recipe, name):
            raise UsageError(
                f"{out} was begun with {name} = {getattr(old, name)!r}, not "
                f"{getattr(recipe, name)!r}; repeat that recipe to resume, or choose another --out"
            )
    path = out / "training" / SOURCES
    digests = json.loads(read_text(path)) if path.exists() else {}  # earlier versions had none
    for name, digest in sources.items():
        if digests.get(name, digest) != digest:
            raise CorpusError(
                f"{out} was begun with another {name}: SHA-256 {digests[name]}, not {digest}; "
                f"give the same {name} to resume, or choose another --out"
            )


def check_folder(out: Path) -> None:
    """Raises UsageError if `out` holds files that no training run wrote."""
    if (out / "training" / RECIPE).exists() or not out.is_dir():
        return
    names = (path.name for path in out.iterdir())
    others = sorted(name for name in names if not name.startswith(".") and name != "training")
    if others:
        raise UsageError(
            f"{out} holds {others[0]}, but no training/{RECIPE}, so no run of specdiff created it; "
            f"choose another --out"
        )
