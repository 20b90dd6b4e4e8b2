"""Adaptive drafting: on while it is measured to be faster than plain decoding, otherwise off.

Break-even tau = seconds of a drafting round / seconds of a plain round. Drafting is switched off
while the measured tau is below it, and probed again after ever longer pauses.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.types import Round

PLAIN_PROBES = 2  # plain rounds timed after the first drafting rounds, to compare with
PATIENCE = 8  # drafting rounds before the first decision
MEMORY = 0.9  # weight of the past in the running means
FIRST_PAUSE = 16  # plain rounds before drafting is probed again
LONGEST_PAUSE = 256


@dataclass(slots=True)
class Controller:
    """Maps the last round to the next round's draft length: `draft_len` or 0."""

    draft_len: int
    tau: float = 0.0
    drafting_seconds: float = 0.0
    plain_seconds: float = 0.0
    drafted: int = 0
    plain: int = 0
    pause: int = FIRST_PAUSE
    waiting: int = 0

    def __call__(self, last: Round | None) -> int:
        if self.draft_len == 0:
            return 0
        if last is not None:
            self._observe(last)
        if self.plain < PLAIN_PROBES and self.drafted >= PATIENCE:
            return 0
        if self.waiting:
            self.waiting -= 1
            return 0
        if self.drafted >= PATIENCE and self.tau < self.break_even:
            self.drafted = 0
            self.waiting = self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            return 0
        return self.draft_len

    @property
    def break_even(self) -> float:
        """The tau at which drafting neither gains nor loses; 0 before a plain round is measured."""
        return self.drafting_seconds / self.plain_seconds if self.plain else 0.0

    def _observe(self, last: Round) -> None:
        running = last.emitted > 0
        if not bool(running.any()):
            return
        seconds = sum(last.seconds.values())
        emitted = float(last.emitted[running].float().mean())
        if not last.draft.tokens.shape[1]:
            self.plain_seconds = _mean(self.plain_seconds, seconds, self.plain)
            self.plain += 1
            return
        self.drafting_seconds = _mean(self.drafting_seconds, seconds, self.drafted)
        self.tau = _mean(self.tau, emitted, self.drafted)
        self.drafted += 1
        if self.drafted > PATIENCE and self.tau > self.break_even:
            self.pause = FIRST_PAUSE


def _mean(old: float, value: float, count: int) -> float:
    """The running mean after one more value; the first one counts whole."""
    return value if count == 0 else MEMORY * old + (1 - MEMORY) * value


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
