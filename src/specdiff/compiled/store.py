"""Compiled layers on disk: one folder for each layer and range of positions, and its key.

An entry is found again by whoever runs the same layer with the same versions of torch, transformers
and the traced code on the same processor. It holds machine code, so that only what this user wrote
is loaded, and nothing whose digest is not the one written last.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from specdiff import environment, files
from specdiff.errors import StorageError
from specdiff.models.gguf import cache_home

FOLDER = "compiled"
PACKAGE = "layer.pt2"
ENTRY = "entry.json"
# the code that an entry is made of and by
TRACED = ("compiled/worker.py", "models/masks.py", "models/packed.py", "nn/linear.py")
POSITIONS = {"1": (1, 1), "2 to 16": (2, 16)}  # name -> fewest and most positions of a forward


def home() -> Path:
    """Where the entries are; the folder may not exist."""
    return cache_home() / FOLDER


def entry(description: Mapping[str, Any], positions: str) -> Path:
    """The folder of a described layer, compiled for a range of POSITIONS."""
    facts = {"layer": description, "positions": positions, **_environment()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return home() / f"{description['class'][1]}-{positions.replace(' ', '')}-{key}"


def package(folder: Path) -> Path | None:
    """The compiled layer of a whole entry; None if there is none. A damaged entry is removed.

    Raises StorageError for an entry that another user wrote or may write.
    """
    path = folder / PACKAGE
    try:
        record = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        for part in (folder, path):
            _check_owner(part)
        if files.digest(path) == record["sha256"]:
            return path
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def write(folder: Path, compiled: Path, facts: Mapping[str, Any]) -> None:
    """Make an entry of a compiled layer. Raises StorageError."""
    with files.staged_folder(folder) as partial:
        shutil.move(compiled, partial / PACKAGE)
        record = {**facts, "sha256": files.digest(partial / PACKAGE)}
        files.write_json(partial / ENTRY, record)


def summary() -> str:
    """The number and size of the entries, for `specdiff env`."""
    packages = sorted(home().glob(f"*/{PACKAGE}"))
    size = sum(path.stat().st_size for path in packages)
    return f"{len(packages)} ({size / 2**20:.0f} MiB) in {home()}"


def _check_owner(path: Path) -> None:
    """Raises StorageError if others could have put machine code there."""
    if os.name != "posix":
        return
    facts = path.stat()
    if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StorageError(
            f"{path} could have been written by another user, so its machine code is not loaded; "
            "remove it, or set XDG_CACHE_HOME to a folder of your own"
        )


@cache
def _environment() -> dict[str, Any]:
    """What else machine code depends on."""
    package = Path(__file__).parents[1]
    sources = "".join((package / name).read_text(encoding="utf-8") for name in TRACED)
    return {
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "processor": environment.cpu_name(),
        "capabilities": {name: str(value) for name, value in torch.cpu.get_capabilities().items()},
        "sources": hashlib.sha256(sources.encode()).hexdigest(),
    }
