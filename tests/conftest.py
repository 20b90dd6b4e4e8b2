"""Puts this folder on the path, so that every test file can import its neighbors."""

import os
from pathlib import Path

import pytest

import specdiff


@pytest.fixture(scope="session")
def lm() -> specdiff.SpeculativeLM:
    """The packaged SmolLM2 in float32, with the drafter that ships for it, if one does."""
    return specdiff.load("smollm2-135m", dtype="float32")


@pytest.fixture
def compiled_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A cache of compiled layers that all tests of a run share: compiling takes a while."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    home = base / "compiled-layers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "specdiff" / "compiled"
