"""Training state on disk, in safetensors and JSON: written aside, flushed, renamed, its marker last. Never half there.

checkpoints/00000250/training.safetensors   m.* network, e.* its moving average, o.* optimizer moments
checkpoints/00000250/state.json             step, seconds spent, ...
checkpoints/00000250/COMPLETE               only now does it count
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from specdiff import files
from specdiff.errors import WeightsError

MARKER = "COMPLETE"
KEPT = 2


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Add the checkpoint of `step`, then drop all but the newest two. Raises StorageError; older checkpoints stay then."""
    with files.staged_folder(folder / f"{step:08d}") as staged:
        files.write_tensors(staged / "training.safetensors", tensors)
        files.write_json(staged / "state.json", {"step": step, **state})
        files.write_text(staged / MARKER, "")
    for old in complete(folder)[:-KEPT]:
        shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"[0-9]*/{MARKER}"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and state. Raises WeightsError naming the file."""
    try:
        return load_file(path / "training.safetensors"), json.loads(
            (path / "state.json").read_text(encoding="utf-8")
        )
    except Exception as error:
        raise WeightsError(
            f"{path} is marked complete but cannot be read ({error}); delete that folder to resume from an older one"
        ) from error
