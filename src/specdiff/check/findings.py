"""What a check finds, and how sure it has to be."""

import math
from dataclasses import asdict, dataclass
from typing import Any

FALSE_ALARMS = 1e-5  # of one statistical check; a whole suite has fewer than ten, so a sound subject fails with less than 1e-4


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome. `message` says in plain words what is wrong and why it matters (or, passed, what was looked at).

    `statistic` passes up to `threshold` (p-values: down to it); both None where nothing was measured.
    """

    name: str
    passed: bool
    message: str
    statistic: float | None = None
    threshold: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def critical(tests: int) -> float:
    """What the largest of `tests` bounded martingale scores exceeds with a chance below FALSE_ALARMS (Freedman's inequality)."""
    return math.sqrt(2 * math.log(2 * max(tests, 1) / FALSE_ALARMS))
