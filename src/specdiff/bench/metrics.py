"""Metrics: the figures of one cell, computed from its turns.

Arithmetic only: nothing here runs a model or reads a clock.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from specdiff.bench.settings import Cell
from specdiff.bench.timing import Medians, Memory, RunRecord

Rate = Callable[[RunRecord], float | None]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with minimum and maximum."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Speedup:
    """Ratio of two medians over the turns that both ran in.

    min, max: of the ratios of single turns; `faster` of the `turns` were above 1.
    """

    ratio: float
    min: float
    max: float
    turns: int
    faster: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The main figures of a cell on one task."""

    turns: int
    tokens_per_second: Spread | None
    tau: float | None
    speedup_vs_hf: Speedup | None
    speedup_vs_vanilla: Speedup | None


@dataclass(frozen=True, slots=True)
class CellResult:
    """A cell with its figures: see the schema in results.py."""

    stage: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    verifier: str | None
    temperature: float
    batch: int
    status: str
    why: str | None
    exact: float | None
    turns: int
    tokens: int
    tokens_per_second: Spread | None
    speedup_vs_hf: Speedup | None
    speedup_vs_vanilla: Speedup | None
    tau: float | None
    alpha: float | None
    per_position: list[float] | None
    reached: list[int] | None
    break_even_tau: float | None
    seconds: dict[str, float]
    tasks: dict[str, TaskResult]
    decode_tokens_per_second: Spread | None = None
    ttft: Spread | None = None
    tpot: Spread | None = None
    decode_speedup_vs_hf: Speedup | None = None
    decode_speedup_vs_vanilla: Speedup | None = None
    tau_before_loop: float | None = None
    accepted_per_draft: float | None = None
    rounds: int | None = None
    plain_rounds: int | None = None
    free_limit: float | None = None
    free_fraction: float | None = None
    memory: Memory | None = None
    joules_per_token: float | None = None

    @property
    def cell(self) -> Cell:
        """The cell without its figures."""
        return Cell(
            self.stage,
            self.baseline,
            self.draft_len,
            self.steps,
            self.verifier,
            self.temperature,
            self.batch,
        )


@dataclass(frozen=True, slots=True)
class TimedRun:
    """A run with its task and the same turn's references."""

    run: RunRecord
    task: str
    hf: RunRecord | None
    vanilla: RunRecord | None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Drafting statistics summed over turns; None for baselines that do not report them."""

    tau: float | None = None
    tau_before_loop: float | None = None
    alpha: float | None = None
    accepted_per_draft: float | None = None
    per_position: list[float] | None = None
    reached: list[int] | None = None
    rounds: int | None = None
    plain_rounds: int | None = None


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are not None; None of nothing."""
    numbers = [value for value in values if value is not None]
    return Spread.of(numbers) if numbers else None


def rate(run: RunRecord) -> float | None:
    """Tokens per second, end to end."""
    return run.size / run.seconds if run.size and run.seconds > 0 else None


def decode_rate(run: RunRecord) -> float | None:
    """Tokens per second after the first emission; None if nothing followed it."""
    tokens = run.size - run.first_tokens
    seconds = run.seconds - run.first_seconds
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def speedup(
    runs: Sequence[RunRecord], references: Sequence[RunRecord | None], of: Rate
) -> Speedup | None:
    """How much faster `runs` are than the same turns' references."""
    pairs: list[tuple[float, float]] = []
    for run, reference in zip(runs, references, strict=True):
        own = of(run)
        other = None if reference is None else of(reference)
        if own and other:
            pairs.append((own, other))
    if not pairs:
        return None
    ratios = [own / other for own, other in pairs]
    middle = statistics.median(own for own, _ in pairs)
    return Speedup(
        ratio=middle / statistics.median(other for _, other in pairs),
        min=min(ratios),
        max=max(ratios),
        turns=len(pairs),
        faster=sum(ratio > 1 for ratio in ratios),
    )


def acceptance(runs: Sequence[RunRecord]) -> Acceptance:
    """Drafting statistics of all runs that report counts."""
    counts = [run.counts for run in runs if run.counts is not None]
    if not counts:
        return Acceptance()
    rounds = sum(c.rounds for c in counts)
    plain_rounds = sum(c.plain_rounds for c in counts)
    drafted = sum(c.drafted for c in counts)
    accepted = sum(c.accepted for c in counts)
    fresh_rounds = sum(run.fresh_rounds for run in runs if run.counts is not None)
    fresh_tokens = sum(run.fresh_tokens for run in runs if run.counts is not None)
    reached = _columns([c.reached for c in counts])
    passed = _columns([c.passed for c in counts])
    return Acceptance(
        tau=_ratio(sum(c.tokens for c in counts), rounds),
        tau_before_loop=_ratio(fresh_tokens, fresh_rounds),
        alpha=_ratio(accepted, drafted),
        accepted_per_draft=_ratio(accepted, rounds - plain_rounds),
        per_position=[k / n if n else 0.0 for k, n in zip(passed, reached, strict=True)],
        reached=reached,
        rounds=rounds,
        plain_rounds=plain_rounds,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _columns(rows: Sequence[Sequence[int]]) -> list[int]:
    width = max(map(len, rows), default=0)
    return [sum(row[k] for row in rows if k < len(row)) for k in range(width)]


def break_even_tau(runs: Sequence[RunRecord], vanilla: Sequence[RunRecord]) -> float | None:
    """A mean round over a plain one; medians over turns of each run's median."""
    mean = _mean(runs, lambda m: m.draft_round, lambda m: m.plain_round)
    single = _median(vanilla, lambda m: m.plain_round)
    return mean / single if mean and single else None


def free_limit(
    runs: Sequence[RunRecord], vanilla: Sequence[RunRecord], tau: float | None
) -> float | None:
    """The speed-up of free drafting: tau T_target(1) / T_target(K + 1)."""
    scoring = _mean(runs, lambda m: m.draft_score, lambda m: m.plain_score)
    one = _median(vanilla, lambda m: m.plain_score)
    return tau * one / scoring if tau and one and scoring else None


def _mean(
    runs: Sequence[RunRecord],
    drafting: Callable[[Medians], float | None],
    plain: Callable[[Medians], float | None],
) -> float | None:
    """Mean seconds over drafting rounds and those that a drafter leaves plain; None for a
    baseline that never drafted."""
    draft_seconds = _median(runs, drafting)
    plain_seconds = _median(runs, plain)
    if draft_seconds is None or plain_seconds is None:
        return draft_seconds
    counts = [run.counts for run in runs if run.counts is not None]
    share = sum(c.plain_rounds for c in counts) / max(1, sum(c.rounds for c in counts))
    return draft_seconds * (1 - share) + plain_seconds * share


def _median(runs: Sequence[RunRecord], pick: Callable[[Medians], float | None]) -> float | None:
    values = [pick(run.medians) for run in runs if run.medians is not None]
    positive = [value for value in values if value]
    return statistics.median(positive) if positive else None


def stage_seconds(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Seconds by stage over all turns, and their total."""
    stages: dict[str, float] = {}
    for run in runs:
        for stage, value in (run.counts.seconds if run.counts else {}).items():
            stages[stage] = stages.get(stage, 0.0) + value
    return stages | {"total": sum(run.seconds for run in runs)}


def peak_memory(runs: Sequence[RunRecord]) -> Memory | None:
    """The largest mark and growth of the runs."""
    marks = [run.memory for run in runs if run.memory is not None]
    if not marks:
        return None
    return Memory(marks[0].kind, max(m.peak for m in marks), max(m.growth for m in marks))


def joules_per_token(runs: Sequence[RunRecord]) -> float | None:
    """Energy of the runs that report it, per token."""
    metered = [run for run in runs if run.joules is not None]
    if not metered:
        return None
    return sum(run.joules or 0.0 for run in metered) / max(1, sum(run.size for run in metered))


def _tpot(run: RunRecord) -> float | None:
    decoding = decode_rate(run)
    return None if decoding is None else run.cell.batch / decoding


def task_results(rows: Sequence[TimedRun]) -> dict[str, TaskResult]:
    """The main figures of each task."""
    results: dict[str, TaskResult] = {}
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        runs = [row.run for row in own]
        results[task] = TaskResult(
            turns=len(own),
            tokens_per_second=spread(map(rate, runs)),
            tau=acceptance(runs).tau,
            speedup_vs_hf=speedup(runs, [row.hf for row in own], rate),
            speedup_vs_vanilla=speedup(runs, [row.vanilla for row in own], rate),
        )
    return results


def cell_result(
    cell: Cell, rows: Sequence[TimedRun], *, why: str | None, exact: float | None
) -> CellResult:
    """Every figure of a cell, from its turns. why: it failed."""
    runs = [row.run for row in rows]
    hf = [row.hf for row in rows]
    vanilla = [row.vanilla for row in rows]
    plain = [run for run in vanilla if run is not None]
    stats = acceptance(runs)
    # the limit leaves out the prompt's own pass, and so does this ratio
    gain = speedup(runs, vanilla, decode_rate)
    limit = free_limit(runs, plain, stats.tau)
    return CellResult(
        stage=cell.stage,
        baseline=cell.baseline,
        draft_len=cell.draft_len,
        steps=cell.steps,
        verifier=cell.verifier,
        temperature=cell.temperature,
        batch=cell.batch,
        status="failed" if why else "ok",
        why=why,
        exact=exact,
        turns=len(runs),
        tokens=sum(run.size for run in runs),
        tokens_per_second=spread(map(rate, runs)),
        decode_tokens_per_second=spread(map(decode_rate, runs)),
        ttft=spread(run.first_seconds for run in runs),
        tpot=spread(map(_tpot, runs)),
        speedup_vs_hf=speedup(runs, hf, rate),
        speedup_vs_vanilla=speedup(runs, vanilla, rate),
        decode_speedup_vs_hf=speedup(runs, hf, decode_rate),
        decode_speedup_vs_vanilla=gain,
        tau=stats.tau,
        tau_before_loop=stats.tau_before_loop,
        alpha=stats.alpha,
        accepted_per_draft=stats.accepted_per_draft,
        per_position=stats.per_position,
        reached=stats.reached,
        rounds=stats.rounds,
        plain_rounds=stats.plain_rounds,
        break_even_tau=break_even_tau(runs, plain),
        free_limit=limit,
        free_fraction=gain.ratio / limit if gain and limit else None,
        seconds=stage_seconds(runs),
        memory=peak_memory(runs),
        joules_per_token=joules_per_token(runs),
        tasks=task_results(rows),
    )
