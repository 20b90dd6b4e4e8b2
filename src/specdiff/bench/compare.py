"""RunComparison of two runs: ratios of the second run's figures over the first's.

A baseline is compared with itself at the settings that each run's tuning chose; sweeps are compared
point by point.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from specdiff.bench.metrics import CellResult, Spread
from specdiff.bench.results import BenchResults, PartResult
from specdiff.bench.settings import Cell

IGNORED = ("date",)  # always differs


@dataclass(frozen=True, slots=True)
class Difference:
    """Something other than the code that can make figures differ."""

    what: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class CellName:
    """A cell and its part."""

    part: str
    stage: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    verifier: str | None
    temperature: float
    batch: int


@dataclass(frozen=True, slots=True)
class DraftSetting:
    """How a cell drafted; None where its baseline has no such setting."""

    draft_len: int | str | None
    steps: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """The second median over the first; min and max are what the two spreads allow."""

    first: float
    second: float
    ratio: float
    min: float | None
    max: float | None

    def verdict(self, more: str, less: str) -> str | None:
        """`more` or `less` if the spreads do not overlap; None if they do, or are unknown."""
        if self.min is None or self.max is None:
            return None
        if self.min > 1:
            return more
        return less if self.max < 1 else None


@dataclass(frozen=True, slots=True)
class ComparedCell:
    """The second run's cell; `before` is the first's setting if it differs.

    failed: the runs ("first", "second") in which the cell failed.
    """

    part: str
    stage: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    verifier: str | None
    temperature: float
    batch: int
    before: DraftSetting | None
    tokens_per_second: Change | None
    speedup_vs_vanilla: Change | None
    tau: Change | None
    alpha: Change | None
    verdict: str | None
    tau_verdict: str | None
    failed: list[str]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs side by side: what differs around them, and their common cells."""

    differences: list[Difference]
    cells: list[ComparedCell]
    only_first: list[CellName]
    only_second: list[CellName]


def compare(first: BenchResults, second: BenchResults) -> RunComparison:
    """Match the cells of two runs, and compare their figures."""
    ours = _cells(first)
    theirs = _cells(second)
    return RunComparison(
        differences=list(differences(first, second)),
        cells=[_compare(k[0], ours[k], theirs[k]) for k in ours if k in theirs],
        only_first=[_name(k[0], ours[k]) for k in ours if k not in theirs],
        only_second=[_name(k[0], theirs[k]) for k in theirs if k not in ours],
    )


def differences(first: BenchResults, second: BenchResults) -> Iterator[Difference]:
    """Differing environments, settings, models, and runs that were interrupted."""
    if first.status != second.status:
        yield Difference("status", first.status, second.status)
    if first.suite != second.suite:
        yield Difference("suite", first.suite, second.suite)
    groups = {
        "environment": (first.environment or {}, second.environment or {}),
        "settings": (first.settings, second.settings),
    }
    for group, (a, b) in groups.items():
        for name in dict.fromkeys([*a, *b]):
            if a.get(name) != b.get(name) and name not in IGNORED:
                yield Difference(f"{group}: {name}", a.get(name), b.get(name))
    others = {part.name: part for part in second.parts}
    for part in first.parts:
        if part.name in others:
            yield from _part_differences(part, others[part.name])


def _part_differences(a: PartResult, b: PartResult) -> Iterator[Difference]:
    for name in ("model", "dtype", "max_tokens"):
        if getattr(a, name) != getattr(b, name):
            yield Difference(f"{a.name}: {name}", getattr(a, name), getattr(b, name))
    if a.prompts != b.prompts:
        yield Difference(f"{a.name}: prompts", len(a.prompts), len(b.prompts))


def _cells(results: BenchResults) -> dict[tuple[str, Cell], CellResult]:
    """(part, cell) -> result; tuned settings are left out of the cell."""
    return {(p.name, _identity(cell)): cell for p in results.parts for cell in p.cells}


def _identity(cell: CellResult) -> Cell:
    tuned = cell.stage != "sweep" and isinstance(cell.draft_len, int)
    return replace(cell.cell, draft_len=None, steps=None) if tuned else cell.cell


def _name(part: str, cell: CellResult) -> CellName:
    return CellName(part, **asdict(cell.cell))


def _compare(part: str, a: CellResult, b: CellResult) -> ComparedCell:
    before = DraftSetting(a.draft_len, a.steps)
    speed = _change(a.tokens_per_second, b.tokens_per_second)
    tau = _change(_over_tasks(a), _over_tasks(b))
    return ComparedCell(
        part=part,
        **asdict(b.cell),
        before=None if before == DraftSetting(b.draft_len, b.steps) else before,
        tokens_per_second=speed,
        speedup_vs_vanilla=_change(_speedup(a), _speedup(b)),
        tau=tau,
        alpha=_change(a.alpha, b.alpha),
        verdict=speed.verdict("faster", "slower") if speed else None,
        tau_verdict=tau.verdict("longer", "shorter") if tau else None,
        failed=[name for name, c in (("first", a), ("second", b)) if c.status == "failed"],
    )


def _speedup(cell: CellResult) -> Spread | None:
    ratio = cell.speedup_vs_vanilla
    return Spread(ratio.ratio, ratio.min, ratio.max) if ratio else None


def _over_tasks(cell: CellResult) -> Spread | float | None:
    """tau with its least and largest task; without a spread if there are fewer than two tasks."""
    taus = [task.tau for task in cell.tasks.values() if task.tau is not None]
    if cell.tau is None or len(taus) < 2:
        return cell.tau
    return Spread(cell.tau, min(taus), max(taus))


def _change(a: Spread | float | None, b: Spread | float | None) -> Change | None:
    first = a.median if isinstance(a, Spread) else a
    second = b.median if isinstance(b, Spread) else b
    if not first or second is None:
        return None
    least = None
    most = None
    if isinstance(a, Spread) and isinstance(b, Spread) and a.min > 0:
        least = b.min / a.max
        most = b.max / a.min
    return Change(first, second, second / first, least, most)
