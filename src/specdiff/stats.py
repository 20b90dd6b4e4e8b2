"""What a run was worth: folds over rounds. The loop itself counts nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from specdiff.types import Round


@dataclass(slots=True)
class Stats:
    """Counts of one request. Rounds without a draft count as rounds, and in `plain_rounds`.

    `faults` counts how often the drafter broke: once a request at most, for it then rests. `tau` is tokens per round including the
    bonus token, `alpha` accepted / drafted; `reached[k]` and `kept[k]` count how often draft position k was looked at and accepted.
    `seconds` are shared by all rows of a batch.
    """

    rounds: int = 0
    plain_rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    faults: int = 0
    reached: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
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
        """One round of one row: `drafted` proposed, `accepted` of them kept, `emitted` tokens committed; `disabled` as in Round."""
        cut = emitted <= accepted  # at an end: what lies behind was not rejected
        accepted = min(accepted, emitted)
        self.rounds += 1
        self.plain_rounds += drafted == 0
        self.tokens += emitted
        self.drafted += drafted
        self.accepted += accepted
        self.faults = max(self.faults, int(disabled))
        self.reached += [0] * (drafted - len(self.reached))
        self.kept += [0] * (drafted - len(self.kept))
        for k in range(min(accepted + (not cut), drafted)):
            self.reached[k] += 1
            self.kept[k] += k < accepted
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def merge(self, other: "Stats") -> None:
        """Count what another request did as well."""
        for name in ("rounds", "plain_rounds", "tokens", "drafted", "accepted", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reached = [a + b for a, b in zip_longest(self.reached, other.reached, fillvalue=0)]
        self.kept = [a + b for a, b in zip_longest(self.kept, other.kept, fillvalue=0)]
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
            kept / reached if reached else 0.0
            for kept, reached in zip(self.kept, self.reached, strict=True)
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
        sizes = (
            r.draft.size.tolist()
            if r.draft.size is not None
            else [r.draft.tokens.shape[1]] * len(rows)
        )
        told = zip(
            rows,
            sizes,
            r.verification.accepted.tolist(),
            r.emitted.tolist(),
            r.disabled.tolist(),
            strict=True,
        )
        for row, size, accepted, emitted, disabled in told:
            if emitted:
                row.add(size, accepted, emitted, r.seconds, disabled=disabled)
    return rows
