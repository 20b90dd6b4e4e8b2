"""Comparison of plain and speculative decoding of one prompt."""

from typing import Any

import pytest

import tiny
from specdiff import SpeculativeLM
from specdiff.targets.causal import CausalTarget
from specdiff.text.comparison import compare, first_difference
from test_lm import VOCAB, tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def lm(tokenizer: Any) -> SpeculativeLM:
    target = CausalTarget(tiny.model("llama", vocab=VOCAB, positions=400))
    return SpeculativeLM(target, "ngram", tokenizer, 200, sampling_defaults={"temperature": 0.0})


def test_greedy_decoding_gives_the_same_tokens_with_the_defaults_of_the_model(
    lm: SpeculativeLM,
) -> None:
    options = {"max_tokens": 12, "raw": True, "draft_len": 3}
    answer = lm.generate("the rain in spain", **options)
    result = compare(lm, "the rain in spain", options, answer, seconds=1.0)
    assert result.same_tokens and result.first_difference is None
    assert result.plain_tokens_per_second > 0 and result.speculative_tokens_per_second > 0
    rates = result.speculative_tokens_per_second / result.plain_tokens_per_second
    assert result.ratio == pytest.approx(rates)


def test_other_tokens_are_located_and_rounds_without_drafting_have_no_break_even(
    lm: SpeculativeLM,
) -> None:
    options = {"max_tokens": 8, "raw": True, "draft_len": 3}
    answer = lm.generate("the rain in spain", **options)
    answer.token_ids[5] += 1
    answer.stats.plain_rounds = 1
    result = compare(lm, "the rain in spain", options, answer, seconds=1.0)
    assert not result.same_tokens and result.first_difference == 5
    assert result.break_even_tau is None


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0
