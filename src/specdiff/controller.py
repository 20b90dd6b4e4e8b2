"""Drafting on or off, from what was measured: a draft must emit more tokens a round than its round costs plain ones.

Break-even tau = seconds of a drafting round / seconds of a plain round. Drafting goes off while measured tau is below it,
and is probed again after ever longer pauses.
"""

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.types import Round

PLAIN_PROBES = 2  # plain rounds timed at the start, so that there is something to compare with
PATIENCE = 8  # drafting rounds before the first judgement
MEMORY = 0.9  # weight of the past in the running means
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # plain rounds before drafting is probed again


@dataclass(slots=True)
class Controller:
    """Call it with the last round; it names the next round's draft length: `draft_len` or 0."""

    draft_len: int
    tau: float = 0.0
    drafting_seconds: float = 0.0
    plain_seconds: float = 0.0
    drafted: int = 0
    plain: int = 0
    pause: int = FIRST_PAUSE
    waiting: int = field(default=0)

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
            self.drafted, self.waiting = 0, self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            return 0
        return self.draft_len

    @property
    def break_even(self) -> float:
        """The tau at which drafting neither gains nor loses; infinite drafting cost is never assumed before it is measured."""
        return self.drafting_seconds / self.plain_seconds if self.plain else 0.0

    def _observe(self, last: Round) -> None:
        running = last.emitted > 0
        if not bool(running.any()):
            return
        seconds, emitted = sum(last.seconds.values()), float(last.emitted[running].float().mean())
        if last.draft.tokens.shape[1]:
            first = self.drafted == 0
            self.drafting_seconds = (
                seconds if first else MEMORY * self.drafting_seconds + (1 - MEMORY) * seconds
            )
            self.tau = emitted if first else MEMORY * self.tau + (1 - MEMORY) * emitted
            self.drafted += 1
            if self.drafted > PATIENCE and self.tau > self.break_even:
                self.pause = FIRST_PAUSE
        else:
            self.plain_seconds = (
                seconds if self.plain == 0 else MEMORY * self.plain_seconds + (1 - MEMORY) * seconds
            )
            self.plain += 1


def draft_length(
    given: int | str | None, drafter: Drafter[Any], *, steady: bool
) -> int | Controller:
    """K, or a Controller, for what a caller gave: a number, "auto", or None: "auto" too, but the drafter's own K where the text must
    not depend on clocks (`steady`). 0 for a drafter that never drafts. Raises UsageError for anything else.
    """
    if given not in (None, "auto") and (isinstance(given, bool) or not isinstance(given, Integral)):
        raise UsageError(f"draft_len must be a whole number of at least 1 or 'auto', not {given!r}")
    if isinstance(given, Integral) and int(given) < 1:
        raise UsageError(
            f"draft_len must be at least 1, not {given}; for plain decoding use the drafter 'none'"
        )
    if drafter.draft_len == 0:
        return 0
    if given == "auto" or (given is None and not steady):
        return Controller(drafter.draft_len)
    return drafter.draft_len if given is None else int(given)
