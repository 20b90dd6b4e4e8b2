"""Profile: what rounds of a target and a drafter cost, and how often each position is accepted.

One profile serves all requests of the pair: the first ones teach it, later ones start from it.

A drafter may have two branches (0: its network, 1: lookup) that draft for different rows.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

LENGTHS = (1, 2, 3, 4, 6, 8)  # the draft lengths tried, besides the drafter's own
WINDOW = 9  # passes over one number of tokens whose median is its cost
SURE = 2  # passes whose median is no outlier
SLOPE = 0.05  # of a curve of which one point is known, per token
LEAST = 0.5  # of the cheapest pass: no line leads below it
FADING = 0.998  # weight of the acceptance of earlier rounds, a round
EXPECTED = 0.55  # acceptance of a drafter not seen yet, as if seen WEIGHT times
WEIGHT = 2.0
LOOKED_UP = 0.2  # share of a second branch not seen yet, as if seen WEIGHT times


@dataclass(slots=True)
class Curve:
    """Seconds over a number of tokens: the median of the last passes, and lines in between."""

    latest: dict[int, tuple[float, ...]] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)

    def observe(self, n: int, seconds: float, times: int = 1) -> None:
        """`times` passes over `n` tokens took `seconds` each."""
        latest = (*self.latest.get(n, ()), *[seconds] * times)[-WINDOW:]
        self.latest = {**self.latest, n: latest}
        self.medians = {**self.medians, n: median_low(latest)}

    def at(self, n: int, *, hope: bool = False) -> float:
        """The seconds of `n` tokens (0: nothing was measured).

        No pass takes longer than one over more tokens, so an outlier ends there. `hope`: as if
        numbers of tokens seen less than SURE times were outliers.
        """
        points = self.medians
        if hope:
            points = {k: s for k, s in points.items() if k == 1 or len(self.latest[k]) >= SURE}
        if n in points:
            return min(seconds for other, seconds in points.items() if other >= n)
        return interpolated(points, n)


@dataclass(slots=True)
class Costs:
    """Seconds of a round by its parts, for one number of rows.

    `score`: scoring, verification and commit, over the positions scored in a row. `draft`: drafting
    over the first branch's draft length (0: another branch drafted, or found nothing).
    """

    score: Curve = field(default_factory=Curve)
    draft: Curve = field(default_factory=Curve)

    @property
    def sure(self) -> bool:
        """Whether no median may be an outlier."""
        curves = (self.score, self.draft)
        return all(len(passes) >= SURE for curve in curves for passes in curve.latest.values())

    def scaled(self, factor: float) -> "Costs":
        """A guess for `factor` times as many rows: their positions take what one row's would."""
        costs = Costs()
        for n in (1, *(length + 1 for length in LENGTHS)):
            costs.score.observe(n, self.score.at(max(1, round(n * factor))))
        growth = costs.score.at(1) / self.score.at(1)
        for n, seconds in self.draft.medians.items():
            costs.draft.observe(n, seconds * growth)
        return costs


@dataclass(slots=True)
class Acceptance:
    """How often the k-th token of a draft was verified, and accepted; earlier rounds fade."""

    reached: Sequence[float]
    accepted: Sequence[float]

    @classmethod
    def of(cls, length: int) -> "Acceptance":
        """Nothing seen yet of drafts of `length` tokens."""
        return cls([0.0] * length, [0.0] * length)

    def following(
        self, reached: Sequence[float], accepted: Sequence[float], fading: float
    ) -> "Acceptance":
        """With the shares of a round's rows in which each position was reached, and accepted."""
        return Acceptance(
            faded(self.reached, reached, fading), faded(self.accepted, accepted, fading)
        )

    def without(self, part: "Acceptance") -> "Acceptance":
        """What is left if some of these rounds are not counted."""
        reached = [max(a - b, 0.0) for a, b in zip(self.reached, part.reached, strict=True)]
        rest = zip(self.accepted, part.accepted, reached, strict=True)
        return Acceptance(reached, [min(max(a - b, 0.0), n) for a, b, n in rest])

    def rates(self, prior: Sequence[float], weight: float) -> list[float]:
        """By position, `prior` counting as `weight` rounds."""
        counts = zip(prior, self.reached, self.accepted, strict=True)
        return [(m + weight * rate) / (n + weight) for rate, n, m in counts]

    def chained(self, first: float, weight: float) -> list[float]:
        """By position, the rate of the position before counting as `weight` rounds."""
        rates = []
        rate = first
        for n, m in zip(self.reached, self.accepted, strict=True):
            rate = (m + weight * rate) / (n + weight)
            rates.append(rate)
        return rates


@dataclass(slots=True)
class Profile:
    """Costs by number of rows, and acceptance by branch, draft temperature and position.

    branches: the longest draft of each branch; (): one branch, of `draft_len`.
    temperatures: the draft temperatures to choose from, the first one to begin with.

    `acceptance[branch, None]` is that of greedy requests, `acceptance[branch, t]` that of others at
    draft temperature t. `drafted[b]` counts the rows that branch b drafted for, earlier rounds
    fading. `seconds` have passed in rounds, of which `loss` were spent on plans that were not the
    best.

    Threads may share it: lists are replaced, not changed, and a lost update is one observation.
    """

    draft_len: int
    branches: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)
    costs: dict[int, Costs] = field(default_factory=dict)
    acceptance: dict[tuple[int, float | None], Acceptance] = field(default_factory=dict)
    drafted: list[float] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        self.branches = self.branches or (self.draft_len,)
        self.lengths = [lengths(longest) for longest in self.branches]
        self.drafted = [0.0] * len(self.branches)

    def costs_of(self, rows: int) -> Costs:
        """What is measured at `rows` rows, or a guess from the nearest number of them.

        Empty where nothing is measured.
        """
        own = self.costs.get(rows)
        if own is not None and 1 in own.score.medians:
            return own
        entries = list(self.costs.items())  # at once: other threads add to it
        others = [n for n, costs in entries if len(costs.score.medians) > 1]
        if not others:
            return own or Costs()
        nearest = min(others, key=lambda n: abs(n - rows))
        return self.costs[nearest].scaled(rows / nearest)

    def shares(self) -> list[float]:
        """How often each branch drafts."""
        if len(self.drafted) == 1:
            return [1.0]
        first, second = self.drafted
        share = (second + WEIGHT * LOOKED_UP) / (first + second + WEIGHT)
        return [1 - share, share]

    def rates(
        self, branch: int, temperature: float | None, own: Acceptance | None = None
    ) -> list[float]:
        """Acceptance by position, given that it is reached; apart from what a stream saw itself."""
        counts = self.acceptance.get((branch, temperature)) or Acceptance.of(self.branches[branch])
        first = None if temperature is None else self.temperatures[0]
        if temperature != first:
            return counts.rates(self.rates(branch, first, own), WEIGHT)
        return (counts if own is None else counts.without(own)).chained(EXPECTED, WEIGHT)

    def observe_acceptance(
        self,
        branch: int,
        temperature: float | None,
        reached: Sequence[float],
        accepted: Sequence[float],
    ) -> None:
        """Shares of a round's rows in which each position of a branch was reached, and accepted."""
        old = self.acceptance.get((branch, temperature)) or Acceptance.of(self.branches[branch])
        self.acceptance[branch, temperature] = old.following(reached, accepted, FADING)

    def observe_branches(self, shares: Sequence[float]) -> None:
        """Shares of a round's rows that each branch drafted for."""
        self.drafted = faded(self.drafted, shares, FADING)


def faded(old: Sequence[float], new: Sequence[float], weight: float) -> list[float]:
    """`new` added to the `weight` of `old`."""
    return [weight * a + b for a, b in zip(old, new, strict=True)]


def lengths(draft_len: int) -> list[int]:
    """0, those of LENGTHS below `draft_len`, and `draft_len`."""
    return sorted({0, draft_len, *(n for n in LENGTHS if n < draft_len)})


def interpolated(curve: Mapping[int, float], n: int) -> float:
    """On the line through the neighbors; past the longest, on the line through the last two.

    Through a single point a line of SLOPE; 0 without any.
    """
    points = sorted(curve)
    if len(points) < 2:
        return sum(curve[k] * max(1 + SLOPE * (n - k), LEAST) for k in points)
    above = min(bisect(points, n), len(points) - 1)
    left = points[max(above - 1, 0)]
    right = points[max(above, 1)]
    slope = (curve[right] - curve[left]) / (right - left)
    seconds = curve[left] + max(slope, 0) * (n - left)
    return max(seconds, LEAST * min(curve.values()))  # a steep line would reach zero
