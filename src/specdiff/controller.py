"""Adaptive drafting: each round's draft length, from measured costs and acceptance.

The length maximizes expected tokens a second. A drafting round of K yields 1 + a_0 + a_0 a_1 + ...
(K products) tokens, a_k being the share of k-th tokens accepted where all before them were; both
this and the seconds a round of each length takes are measured as decoding goes. Rounds tried for
what they may teach are paid from a budget, a small share of the time that decoding takes anyway.

A length depends on earlier rounds alone, so the output distribution does not change.
"""

from bisect import bisect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from statistics import median_low
from typing import Any

import torch

from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.types import Round

LENGTHS = (1, 2, 3, 4, 6, 8)  # the draft lengths tried, besides the drafter's own
WINDOW = 9  # rounds of one length whose median is its cost
HORIZON = 256  # tokens of an answer whose share FIRST_SHARE may be spent before any time has passed
FIRST_SHARE = 0.006
SHARE = 0.005  # of the time passed
FADING = 0.98  # weight of the acceptance of earlier rounds, a round
SURE = 2  # rounds of one length whose median is no outlier
HOPED_COST = 0.8  # of a length less often seen
HOPE = 0.7  # acceptance expected of a drafter not seen yet, as if seen PRIOR times
PRIOR = 0.5
REFRESH = 32  # drafting rounds after which a plain round is timed again, where it may matter
CLEAR = 2.0  # gain of drafting that a plain round's exact cost cannot undo
FIRST = 4  # the first draft's length at most


@dataclass(slots=True)
class Controller:
    """Maps the last round to the next round's draft length, from 0 to `draft_len`.

    measured: seconds of a round by draft length (0: a plain one), where known beforehand. Without
        them the first rounds measure.
    """

    draft_len: int
    measured: Mapping[int, float] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    length: int = 0
    costs: dict[int, deque[float]] = field(default_factory=dict)
    reached: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    seconds: float = 0.0
    loss: float = 0.0
    plain_age: int = 0

    def __post_init__(self) -> None:
        shorter = [n for n in LENGTHS if n < self.draft_len]
        self.lengths = [0, *shorter, self.draft_len] if self.draft_len else [0]
        for length, seconds in self.measured.items():
            self.costs[length] = deque([seconds] * SURE, maxlen=WINDOW)
        self.reached = [0.0] * self.draft_len
        self.accepted = [0.0] * self.draft_len

    def __call__(self, last: Round | None) -> int:
        if last is not None and self.draft_len:
            self._observe(last)
        self.length = self._next()
        return self.length

    def rate(self, length: int, *, hope: bool = False) -> float:
        """Expected tokens a second, or what may be hoped for where little is measured."""
        return self.tokens(length, hope=hope) / self.cost(length, hope=hope)

    def tokens(self, length: int, *, hope: bool = False) -> float:
        """Expected tokens of a round."""
        total = 1.0
        chance = 1.0
        rate = HOPE
        for k in range(length):
            # a position not seen yet is taken to be as good as the one before
            prior = HOPE if hope else rate
            rate = (self.accepted[k] + PRIOR * prior) / (self.reached[k] + PRIOR)
            chance *= rate
            total += chance
        return total

    def cost(self, length: int, *, hope: bool = False) -> float:
        """Seconds of a round: the median of the last ones, or a line through other lengths.

        No round takes longer than one of a longer draft, so an outlier ends there.
        """
        medians = {n: median_low(seconds) for n, seconds in self.costs.items()}
        line = _interpolated(medians, length)
        if length not in medians:
            medians[length] = HOPED_COST * line if hope else line
        elif hope and len(self.costs[length]) < SURE:
            medians[length] = min(medians[length], HOPED_COST * line)
        if hope and 0 in self.costs:
            medians[length] = max(medians[length], medians[0])
        return min(seconds for n, seconds in medians.items() if n >= length)

    def _next(self) -> int:
        if not self.draft_len:
            return 0
        if not self.costs or 0 not in self.costs:
            return 0 if self.costs else min(FIRST, self.draft_len)
        best = max(self.lengths, key=self.rate)
        budget = SHARE * self.seconds + FIRST_SHARE * HORIZON / self.rate(best)
        if self.loss > budget:
            return best
        refresh = REFRESH if len(self.costs[0]) >= SURE else SURE
        if best and self.plain_age >= refresh and self.rate(best) < CLEAR * self.rate(0):
            return 0
        return max(self.lengths, key=lambda length: self.rate(length, hope=True))

    def _observe(self, last: Round) -> None:
        rows = torch.stack([last.emitted, last.verification.accepted]).tolist()
        counts = [accepted for emitted, accepted in zip(*rows, strict=True) if emitted]
        if not counts:
            return
        # a drafter may give none: the round was a plain one
        length = self.length if last.draft.tokens.shape[1] else 0
        seconds = sum(last.seconds.values())
        self.costs.setdefault(length, deque(maxlen=WINDOW)).append(seconds)
        self.seconds += seconds
        self.plain_age = self.plain_age + 1 if length else 0
        for k in range(self.draft_len):
            self.reached[k] *= FADING
            self.accepted[k] *= FADING
            if k < length:
                self.reached[k] += sum(n >= k for n in counts) / len(counts)
                self.accepted[k] += sum(n > k for n in counts) / len(counts)
        best = max(map(self.rate, self.lengths))
        self.loss += max(0.0, self.cost(length) - self.tokens(length) / best)


def _interpolated(medians: Mapping[int, float], length: int) -> float:
    """On the line through the neighbors; past the longest, on the line through the last two."""
    points = sorted(n for n in medians if n != length)
    if len(points) < 2:
        return medians[points[0]] if points else 1.0
    above = min(bisect(points, length), len(points) - 1)
    left = points[max(above - 1, 0)]
    right = points[max(above, 1)]
    slope = (medians[right] - medians[left]) / (right - left)
    return medians[left] + max(slope, 0) * (length - left)


def draft_length(
    value: int | str | None, drafter: Drafter[Any], *, steady: bool
) -> int | Controller:
    """K, or a Controller, for a caller's `draft_len`; 0 for a drafter that never drafts.

    Args:
        value: a number, "auto", or None: "auto", but the drafter's own K if `steady`.
        steady: the text must not depend on clocks.

    Raises UsageError for any other value.
    """
    if value not in (None, "auto") and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise UsageError(
            f"draft_len must be a whole number of at least 1 or 'auto', not {value!r}",
            param="draft_len",
        )
    if isinstance(value, Integral) and int(value) < 1:
        raise UsageError(
            f"draft_len must be at least 1, not {value}; for plain decoding use the drafter 'none'",
            param="draft_len",
        )
    if drafter.draft_len == 0:
        return 0
    if value == "auto" or (value is None and not steady):
        return Controller(drafter.draft_len)
    return drafter.draft_len if value is None else int(value)
