"""The public face: a dozen names, sorted, complete, and cheap to import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import specdiff

HEAVY = ("transformers", "rich", "typer", "huggingface_hub", "tokenizers", "gguf")


def imported(code: str) -> set[str]:
    """The top-level packages a fresh interpreter has loaded after `code`."""
    report = (
        "import sys, json; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True
    )
    assert not out.stderr
    return set(json.loads(out.stdout))


def test_all_is_sorted_and_real() -> None:
    assert list(specdiff.__all__) == sorted(specdiff._HOME)
    assert list(specdiff.__all__) == sorted(set(specdiff.__all__))
    for name in specdiff.__all__:
        assert getattr(specdiff, name) is not None
        assert not name.startswith("_")


def test_all_is_complete() -> None:
    """Every public name is listed, also by `dir`."""
    assert set(dir(specdiff)) == {*specdiff.__all__, "__version__"}
    namespace: dict[str, object] = {}
    exec("from specdiff import *", namespace)
    assert set(specdiff.__all__) <= set(namespace)
    promised = {
        "Drafter",
        "SamplingParams",
        "SpeculativeLM",
        "Target",
        "Batch",
        "Context",
        "Draft",
        "Round",
        "decode",
        "load",
    }
    assert promised <= set(specdiff.__all__)
    own = {
        node.name
        for node in ast.parse(Path(specdiff.__file__).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert own <= set(specdiff.__all__)


def test_the_loop_is_public() -> None:
    """specdiff.decode is the room; the function and the pieces to write it by hand are in it."""
    for name in ("decode", "start", "admit", "step", "release", "commit"):
        assert callable(getattr(specdiff.decode, name))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'specdiff' has no attribute 'generate'"):
        specdiff.generate  # noqa: B018


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert version("specdiff") == specdiff.__version__


def test_importing_is_cheap() -> None:
    loaded = imported("import specdiff")
    assert not loaded & {*HEAVY, "torch"}


def test_the_nouns_and_roles_need_no_transformers() -> None:
    """What a drafter's own file imports, and the errors."""
    names = (
        "Batch, Context, Draft, Drafter, Purpose, Round, "
        "SamplingParams, SpecdiffError, Target, TargetInfo"
    )
    assert not imported(f"from specdiff import {names}") & {*HEAVY}
    assert not imported(
        "import specdiff.decode, specdiff.verify, specdiff.sampling, specdiff.stats"
    ) & {*HEAVY}
    assert "torch" not in imported("import specdiff.errors")


def test_no_room_reads_pickles() -> None:
    """No module imports pickle, or loads one with torch."""
    for path in Path(specdiff.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        assert not calls & {"torch.load", "eval", "exec"}, path
