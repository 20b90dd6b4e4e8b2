"""Profile: what rounds of a target and a drafter cost, and how often each position is accepted.

One profile serves all requests of the pair: the first ones teach it, later ones start from it.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

LENGTHS = (1, 2, 3, 4, 6, 8)  # the draft lengths tried, besides the drafter's own
WINDOW = 9  # rounds of one length whose median is its cost
FADING = 0.998  # weight of the acceptance of earlier rounds, a round
EXPECTED = 0.7  # acceptance of a drafter not seen yet, as if seen WEIGHT times
WEIGHT = 2.0


@dataclass(slots=True)
class Profile:
    """Costs by number of rows and draft length (0: a plain round), and acceptance by position.

    `rounds[rows][length]` are the seconds of the last rounds, `curves[rows][length]` their median.
    `reached[k]` and `accepted[k]` count how often the k-th draft token was verified and accepted,
    earlier rounds fading; `acceptance[k]` is their ratio, and that of the position before for one
    not seen yet. `seconds` have passed in rounds, of which `loss` were spent on lengths that were
    not the best.

    Threads may share it: lists are replaced, not changed, and a lost update is one observation.
    """

    draft_len: int
    rounds: dict[int, dict[int, tuple[float, ...]]] = field(default_factory=dict)
    curves: dict[int, dict[int, float]] = field(default_factory=dict)
    reached: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    seconds: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        self.lengths = lengths(self.draft_len)
        self.reached = [0.0] * self.draft_len
        self.accepted = [0.0] * self.draft_len
        self.acceptance = [EXPECTED] * self.draft_len

    def observe_cost(self, rows: int, length: int, seconds: float, times: int = 1) -> None:
        """`times` rounds of `rows` rows took `seconds` each."""
        earlier = self.rounds.setdefault(rows, {}).get(length, ())
        latest = (*earlier, *[seconds] * times)[-WINDOW:]
        self.rounds[rows][length] = latest
        self.curves[rows] = {**self.curves.get(rows, {}), length: median_low(latest)}

    def observe_acceptance(self, reached: Sequence[float], accepted: Sequence[float]) -> None:
        """Shares of a round's rows in which each position was reached, and accepted."""
        self.reached = faded(self.reached, reached, FADING)
        self.accepted = faded(self.accepted, accepted, FADING)
        rate = EXPECTED
        rates = []
        for n, m in zip(self.reached, self.accepted, strict=True):
            rate = (m + WEIGHT * rate) / (n + WEIGHT)
            rates.append(rate)
        self.acceptance = rates


def faded(old: Sequence[float], new: Sequence[float], weight: float) -> list[float]:
    """`new` added to the `weight` of `old`."""
    return [weight * a + b for a, b in zip(old, new, strict=True)]


def lengths(draft_len: int) -> list[int]:
    """0, those of LENGTHS below `draft_len`, and `draft_len`."""
    return sorted({0, draft_len, *(n for n in LENGTHS if n < draft_len)})


def interpolated(curve: Mapping[int, float], length: int) -> float:
    """On the line through the neighbors; past the longest, on the line through the last two."""
    points = sorted(n for n in curve if n != length)
    if len(points) < 2:
        return curve[points[0]] if points else 1.0
    above = min(bisect(points, length), len(points) - 1)
    left = points[max(above - 1, 0)]
    right = points[max(above, 1)]
    slope = (curve[right] - curve[left]) / (right - left)
    seconds = curve[left] + max(slope, 0) * (length - left)
    return max(seconds, 0.5 * min(curve.values()))  # a steep line would reach zero
