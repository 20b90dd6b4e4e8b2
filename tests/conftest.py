"""Puts this folder on the path, so that every test file can import its neighbors."""

import pytest

import specdiff


@pytest.fixture(scope="session")
def lm() -> specdiff.SpeculativeLM:
    """The packaged SmolLM2 in float32, with the drafter that ships for it, if one does."""
    return specdiff.load("smollm2-135m", dtype="float32")
