"""Compilation in the background: loaded from disk at once, compiled while eager layers serve."""

import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from specdiff.compiled import store
from specdiff.compiled.compilation import COMPILING, Compilation, warn
from specdiff.compiled.graphs import Graphs
from specdiff.compiled.layer import first_line
from specdiff.errors import UnsupportedModelError
from specdiff.models.loading import home
from specdiff.models.ragged import RaggedModel

LARGEST = 40 << 20  # bytes of a layer: two milliseconds at 20 GB/s


def start(ragged: RaggedModel, compile: bool | str) -> Compilation | Graphs | None:
    """Compile the layers of a target, or capture the CUDA graphs of one on a GPU.

    Args:
        compile: "auto" loads what is on disk, and nothing else. True also compiles the rest in the
            background; on a GPU, it captures graphs. False: everything is eager.

    Returns None if everything is eager; with True, one line says why.
    """
    if compile is True and home(ragged.model).type == "cuda":
        return _graphs(ragged)
    if not compile or (compile == "auto" and not _pays(ragged)):
        return None
    try:
        compilation = Compilation(ragged)
    except UnsupportedModelError as error:
        if compile != "auto":
            warn(str(error))
        return None
    ragged.runner = compilation
    missing = compilation.load()
    problem = no_compiler() if compile != "auto" else None
    if problem is None and missing and compile != "auto":
        compilation.states |= dict.fromkeys(missing, COMPILING)
        descriptions = [kind.description for kind in compilation.kinds]
        arguments = (weakref.ref(compilation), descriptions)
        threading.Thread(target=_follow, args=arguments, daemon=True).start()
        return compilation
    if problem is not None:
        for positions in missing:
            compilation.fail(problem, positions)
    compilation.finished.set()
    return compilation


def _pays(ragged: RaggedModel) -> bool:
    """Whether compiled layers may be on disk, and save more in 200 tokens than loading takes.

    They save about 0.2 ms a layer and token, whatever its size; scoring the test text reads every
    layer twenty times.
    """
    size = ragged.model.get_memory_footprint() / ragged.layers
    return size <= LARGEST and any(store.home().glob(f"*/{store.PACKAGE}"))


def _graphs(ragged: RaggedModel) -> Graphs | None:
    try:
        graphs = Graphs(ragged)
    except UnsupportedModelError as error:
        warn(str(error))
        return None
    ragged.runner = graphs
    return graphs


def no_compiler() -> str | None:
    """Why nothing can be compiled here; None if there is a C++ compiler."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name):
        return None
    return f"no C++ compiler {name!r} is on the PATH (install one, or name it in $CXX)"


def _follow(reference: "weakref.ref[Compilation]", descriptions: list[dict[str, Any]]) -> None:
    """Run the worker, and switch on each range of positions as it appears on disk."""
    reason = "the compiling process ended early"
    try:
        with _worker() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdin as pipe:
                pipe.write(json.dumps(descriptions))
            for line in process.stdout:
                reason = json.loads(line).get("error", reason)
                compilation = reference()
                if compilation is not None:  # else it is for the next process
                    compilation.load()
                del compilation
    except OSError as error:
        reason = first_line(error)
    finally:
        compilation = reference()
        if compilation is not None:
            compilation.finish(reason)


def _worker() -> "subprocess.Popen[str]":
    package = Path(__file__).parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        # -P: the working folder holds no modules of ours
        [sys.executable, "-P", "-m", "specdiff.compiled.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # not interrupted by Ctrl-C
    )
