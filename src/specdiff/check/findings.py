"""Findings: the outcome of a check, and the significance it needs."""

import math
from dataclasses import asdict, dataclass
from typing import Any

# of one statistical check; a whole suite has fewer than ten, so a sound subject fails with a
# chance below 1e-4
FALSE_ALARMS = 1e-5


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome.

    `message` says in plain words what is wrong and why it matters or, if passed, what was examined.
    `statistic` passes up to `threshold` (p-values: down to it); both are None where nothing was
    measured.
    """

    name: str
    passed: bool
    message: str
    statistic: float | None = None
    threshold: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def critical(tests: int) -> float:
    """The value that the largest of `tests` bounded martingale scores exceeds with a chance below
    FALSE_ALARMS (Freedman's inequality)."""
    return math.sqrt(2 * math.log(2 * max(tests, 1) / FALSE_ALARMS))
