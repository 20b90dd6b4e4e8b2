"""Training state on disk, in safetensors and JSON: written aside, flushed, renamed, its marker last. Never half there.

checkpoints/00000250/training.safetensors   m.* network, e.* its moving average, o.* optimizer moments
checkpoints/00000250/state.json             step, seconds spent, ...
checkpoints/00000250/COMPLETE               only now does it count
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from specdiff.errors import WeightsError

MARKER = "COMPLETE"
KEPT = 2


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Add the checkpoint of `step`, then drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    aside, final = folder / f".{step:08d}.partial", folder / f"{step:08d}"
    for stale in (aside, final):
        shutil.rmtree(stale, ignore_errors=True)
    aside.mkdir()
    # cloned: tied tensors share memory, which safetensors refuses
    save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, aside / "training.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
    for path in (aside / "training.safetensors", aside / "state.json"):
        _flush(path)
    aside.rename(final)
    (final / MARKER).touch()
    _flush(final / MARKER)
    _flush(final)
    _flush(folder)
    for old in complete(folder)[:-KEPT]:
        shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"[0-9]*/{MARKER}"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and state. Raises WeightsError naming the file."""
    try:
        return load_file(path / "training.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise WeightsError(
            f"{path} is marked complete but cannot be read ({error}); delete that folder to go on from an older one"
        ) from error


def _flush(path: Path) -> None:
    """To the disk itself: a rename may otherwise outlive the bytes it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
