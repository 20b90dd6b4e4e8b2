"""Large grammars: what can be computed before a request joins is not computed in its rounds."""

import time
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="the structured extra is not installed")
from llguidance import LLExecutor

from specdiff.grammar import Matcher, fill_masks
from specdiff.text import structured
from specdiff.text.structured import GrammarCompiler
from test_lm import END, VOCAB, tokenizer  # noqa: F401

WORDS = [f"w{i:05d}{'abcdefgh'[i % 8] * 4}" for i in range(4000)]


def first_mask_seconds(compiler: GrammarCompiler) -> float:
    """Of a request with the grammar, on its own matcher."""
    matcher = Matcher(compiler.compile("choice", WORDS))
    executor = LLExecutor()
    began = time.perf_counter()
    fill_masks([matcher], [[]], executor)
    return time.perf_counter() - began


def test_the_first_mask_of_a_large_grammar_is_computed_as_it_compiles(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, [END])
    warm = min(first_mask_seconds(compiler) for _ in range(3))
    monkeypatch.setattr(structured, "_warm", lambda *arguments: None)
    cold = min(first_mask_seconds(compiler) for _ in range(3))
    assert warm < cold / 3
