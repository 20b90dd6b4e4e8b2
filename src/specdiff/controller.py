"""Adaptive drafting: each round's draft length, from measured costs and acceptance.

The length maximizes expected tokens a second. A drafting round of K yields 1 + a_0 + a_0 a_1 + ...
(K products) tokens, a_k being the share of k-th tokens accepted where all before them were. What is
known of both at first is the profile of target and drafter, which all requests share; a stream's
own rounds then count for more. Rounds tried for what they may teach are paid from a budget, a small
share of the time that decoding takes anyway.

A length depends on earlier rounds alone, so the output distribution does not change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.profile import Profile, faded, interpolated
from specdiff.types import Round

FIRST_LOSS = 1.0  # plain rounds that may be lost before any time has passed
SHARE = 0.01  # of the time passed that may be lost
FADING = 0.98  # weight of the acceptance of a stream's earlier rounds, a round
TRUST = 3.0  # rounds of a stream that count as much as the profile
SURE = 2  # rounds of one length whose median is no outlier
HOPED_COST = 0.8  # of a length less often seen
HOPE = 0.7  # acceptance hoped for where a stream has drafted little, as if seen HOPED times
HOPED = 0.5
REFRESH = 32  # drafting rounds after which a plain round is timed again, where it may matter
CLEAR = 2.0  # gain of drafting that a plain round's exact cost cannot undo
FIRST = 4  # the first draft's length at most


@dataclass(slots=True)
class Controller:
    """Maps the last round of a stream to the next round's draft length, from 0 to `draft_len`.

    profile: what is known beforehand, to which this stream adds. A stream has a controller of its
        own.
    """

    profile: Profile
    rows: int = 1
    length: int = 0
    reached: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    plain_age: int = 0
    steady: bool = False

    def __post_init__(self) -> None:
        self.reached = [0.0] * self.profile.draft_len
        self.accepted = [0.0] * self.profile.draft_len

    def __call__(self, last: Round | None) -> int:
        if last is not None and self.profile.draft_len:
            self._read(last)
        self.length = self._next()
        return self.length

    def rates(self, *, hope: bool = False) -> dict[int, float]:
        """Expected tokens a second by draft length; `hope`: what may be hoped for where little is
        measured."""
        tokens = self.tokens(hope=hope)
        costs = self.costs(hope=hope)
        return {length: tokens[length] / costs[length] for length in self.profile.lengths}

    def tokens(self, *, hope: bool = False) -> list[float]:
        """Expected tokens of a round by draft length."""
        total = chance = 1.0
        expected = [total]
        counts = zip(self.profile.acceptance, self.reached, self.accepted, strict=True)
        for prior, reached, accepted in counts:
            rate = (accepted + TRUST * prior) / (reached + TRUST)
            if hope:
                rate = max(rate, (accepted + HOPED * HOPE) / (reached + HOPED))
            chance *= rate
            total += chance
            expected.append(total)
        return expected

    def costs(self, *, hope: bool = False) -> dict[int, float]:
        """Seconds of a round by draft length: the median of the last ones, or a line through other
        lengths.

        No round takes longer than one of a longer draft, so an outlier ends there.
        """
        curve = self.profile.curves.get(self.rows, {})
        rounds = self.profile.rounds.get(self.rows, {})
        costs = {}
        longer = math.inf
        for length in reversed(self.profile.lengths):
            seconds = curve.get(length, math.inf)
            longer = min(longer, seconds)
            if len(rounds.get(length, ())) < (SURE if hope else 1):
                line = interpolated(curve, length)
                seconds = min(seconds, HOPED_COST * line if hope else line)
            if hope:
                seconds = max(seconds, curve.get(0, 0.0))
            costs[length] = min(seconds, longer)
        return costs

    def observe(self, rows: int, length: int, seconds: float, accepted: Sequence[int]) -> None:
        """A round of `length` drafted tokens, of which the running rows accepted `accepted`."""
        profile = self.profile
        self.rows = rows
        # after plain rounds a drafter reads their tokens, too: the draft takes at most this long
        earlier = profile.curves.get(rows, {}).get(length, seconds)
        caught_up = self.steady or not length
        profile.observe_cost(rows, length, seconds if caught_up else min(seconds, earlier))
        self.steady = length > 0
        self.plain_age = self.plain_age + 1 if length else 0
        places = range(profile.draft_len)
        reached = [sum(n >= k for n in accepted) / len(accepted) * (k < length) for k in places]
        passed = [sum(n > k for n in accepted) / len(accepted) for k in places]
        self.reached = faded(self.reached, reached, FADING)
        self.accepted = faded(self.accepted, passed, FADING)
        if length:
            profile.observe_acceptance(reached, passed)
        profile.seconds += seconds
        rates = self.rates()
        best = max(rates, key=rates.__getitem__)
        if length != best:
            emitted = 1 + sum(accepted) / len(accepted)
            profile.loss = max(0.0, profile.loss + seconds - emitted / rates[best])
        if not length and len(profile.rounds[rows][0]) == 1:
            # the first draft may be slow for reasons of its own: a kernel, or pages
            profile.loss = min(profile.loss, FIRST_LOSS * seconds)

    def _next(self) -> int:
        profile = self.profile
        if not profile.draft_len:
            return 0
        curve = profile.curves.get(self.rows, {})
        if 0 not in curve:
            return 0 if curve else min(FIRST, profile.draft_len)
        rates = self.rates()
        best = max(rates, key=rates.__getitem__)
        if profile.loss > SHARE * profile.seconds + FIRST_LOSS * curve[0]:
            return best
        refresh = REFRESH if len(profile.rounds[self.rows][0]) >= SURE else SURE
        if best and self.plain_age >= refresh and rates[best] < CLEAR * rates[0]:
            return 0
        hopes = self.rates(hope=True)
        return max(hopes, key=hopes.__getitem__)

    def _read(self, last: Round) -> None:
        counts = torch.stack([last.emitted, last.verification.accepted]).tolist()
        running = [accepted for emitted, accepted in zip(*counts, strict=True) if emitted]
        if not running:
            return
        # a drafter may find nothing: the round was a plain one
        length = self.length if last.draft.tokens.shape[1] else 0
        self.observe(len(last.emitted), length, sum(last.seconds.values()), running)


def draft_length(
    value: int | str | None,
    drafter: Drafter[Any],
    *,
    steady: bool,
    profile: Profile | None = None,
) -> int | Controller:
    """K, or a Controller, for a caller's `draft_len`; 0 for a drafter that never drafts.

    Args:
        value: a number, "auto", or None: "auto", but the drafter's own K if `steady`.
        steady: the text must not depend on clocks.
        profile: of the target and `drafter`, which earlier requests have filled; None: a new one.

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
        return Controller(profile or Profile(drafter.draft_len))
    return drafter.draft_len if value is None else int(value)
