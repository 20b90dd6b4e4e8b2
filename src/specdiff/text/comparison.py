"""Plain against speculative decoding of one prompt: alternating runs in one process, medians."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdiff.text.generation import Generation
from specdiff.text.lm import SpeculativeLM

REPETITIONS = 2  # of each way of decoding, after the answer itself


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of both ways, and where their tokens part.

    break_even_tau: the cost of a drafting round in plain steps; None if some rounds did not draft.
    first_difference: index of the first token that differs; None if all are the same.
    """

    plain_tokens_per_second: float
    speculative_tokens_per_second: float
    ratio: float
    break_even_tau: float | None
    same_tokens: bool
    first_difference: int | None


def compare(
    lm: SpeculativeLM,
    prompt: str | Sequence[int],
    options: Mapping[str, Any],
    answer: Generation,
    seconds: float,
) -> Comparison:
    """Decode `prompt` plainly and speculatively in turn, and compare with `answer`.

    options: those of `lm.generate` that gave `answer`, in `seconds`: the first speculative run.
    """
    plain = SpeculativeLM(
        lm.target, "none", lm.tokenizer, lm.max_len, sampling_defaults=lm.defaults
    )
    plain_options = {**options, "draft_len": None}
    plain_rates: list[float] = []
    speculative_rates = [_rate(answer, seconds)]
    for _ in range(REPETITIONS):
        reference, rate = _timed(plain, prompt, plain_options)
        plain_rates.append(rate)
        speculative_rates.append(_timed(lm, prompt, options)[1])
    plain_rate = statistics.median(plain_rates)
    speculative_rate = statistics.median(speculative_rates)
    ratio = speculative_rate / plain_rate
    difference = first_difference(answer.token_ids, reference.token_ids)
    every_round_drafted = answer.stats.drafted > 0 and not answer.stats.plain_rounds
    return Comparison(
        plain_tokens_per_second=plain_rate,
        speculative_tokens_per_second=speculative_rate,
        ratio=ratio,
        break_even_tau=answer.stats.tau / ratio if every_round_drafted else None,
        same_tokens=difference is None,
        first_difference=difference,
    )


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first index at which two sequences differ, or the shorter length; None if equal."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))


def _timed(
    lm: SpeculativeLM, prompt: str | Sequence[int], options: Mapping[str, Any]
) -> tuple[Generation, float]:
    """An answer, and its tokens per second."""
    begin = time.perf_counter()
    answer = lm.generate(prompt, **options)
    return answer, _rate(answer, time.perf_counter() - begin)


def _rate(answer: Generation, seconds: float) -> float:
    return len(answer.token_ids) / max(seconds, 1e-9)
