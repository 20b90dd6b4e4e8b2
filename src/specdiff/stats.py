"""Acceptance and timing statistics, folded from rounds. The loop itself counts nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from specdiff.types import Round


@dataclass(slots=True)
class Stats:
    """Counts of one request. Rounds without a draft count as rounds, and in `plain_rounds`.

    `faults` counts failures of the drafter: at most one a request, as it is disabled for the
    request after the first. `tau` is tokens per round including the bonus token, `alpha` is
    accepted / drafted; `reached[k]` and `passed[k]` count how often draft position k was verified
    and accepted. `seconds` are shared by all rows of a batch.
    """

    rounds: int = 0
    plain_rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    faults: int = 0
    reached: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        drafted: int,
        accepted: int,
        emitted: int,
        seconds: Mapping[str, float],
        *,
        disabled: bool = False,
    ) -> None:
        """One round of one row: counts of drafted, accepted and emitted tokens.

        `disabled` is the row's entry of `Round.disabled`.
        """
        cut = emitted <= accepted  # at an end of text: the tokens after it were not rejected
        accepted = min(accepted, emitted)
        self.rounds += 1
        self.plain_rounds += drafted == 0
        self.tokens += emitted
        self.drafted += drafted
        self.accepted += accepted
        self.faults = max(self.faults, int(disabled))
        self.reached += [0] * (drafted - len(self.reached))
        self.passed += [0] * (drafted - len(self.passed))
        for k in range(min(accepted + (not cut), drafted)):
            self.reached[k] += 1
            self.passed[k] += k < accepted
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def merge(self, other: "Stats") -> None:
        """Add the counts of another request."""
        for name in ("rounds", "plain_rounds", "tokens", "drafted", "accepted", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reached = [a + b for a, b in zip_longest(self.reached, other.reached, fillvalue=0)]
        self.passed = [a + b for a, b in zip_longest(self.passed, other.passed, fillvalue=0)]
        for stage, value in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    @property
    def tau(self) -> float:
        """Mean acceptance length: tokens per round, bonus included (1.0 when nothing ran)."""
        return self.tokens / self.rounds if self.rounds else 1.0

    @property
    def alpha(self) -> float:
        """Acceptance rate: accepted / drafted (0 when nothing was drafted)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def per_position(self) -> list[float]:
        """Acceptance of draft position k given that it was reached."""
        return [
            passed / reached if reached else 0.0
            for passed, reached in zip(self.passed, self.reached, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for --json."""
        return {
            "rounds": self.rounds,
            "plain_rounds": self.plain_rounds,
            "tokens": self.tokens,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "faults": self.faults,
            "tau": self.tau,
            "alpha": self.alpha,
            "per_position": self.per_position,
            "seconds": self.seconds,
        }


def fold(rounds: Iterable[Round]) -> list[Stats]:
    """Per-row Stats of a decode: `stats.fold(decode(...))`."""
    rows: list[Stats] = []
    for r in rounds:
        rows = rows or [Stats() for _ in range(len(r.emitted))]
        columns = (r.draft.sizes, r.verification.accepted, r.emitted, r.disabled)
        counts = zip(*(column.tolist() for column in columns), strict=True)
        for row, (size, accepted, emitted, disabled) in zip(rows, counts, strict=True):
            if emitted:
                row.add(size, accepted, emitted, r.seconds, disabled=disabled)
    return rows
