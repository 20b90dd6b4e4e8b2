"""Benchmark results: results.json, folded from the journal.

results.json (schema 1) is the JSON form of `BenchResults`, in seconds, bytes and tokens per second;
null stands for what was not, or cannot be, measured. Of a cell (`metrics.CellResult`):

    stage "main" | "sweep" | "batch" · draft_len int | "auto" | null · status "ok" | "failed"
    tau tokens per round, tau_before_loop before the first repeated 8-gram · alpha accepted/drafted
    per_position acceptance given that the position was reached (`reached` times)
    break_even_tau a mean round over a plain one · free_limit tau T(1) / T(K + 1), of the scoring
        passes of these turns, null on a GPU · free_fraction decode_speedup_vs_vanilla / free_limit
    seconds by stage; "host" is the remainder of "total"; on a GPU all are the host's seconds
    memory the process's high-water mark while the cell ran, and its growth; the largest of the runs
    exact share of greedy answers equal to the reference's
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from specdiff import files, strict_json
from specdiff.bench import metrics
from specdiff.bench.costs import Conditional, CostCurves, CostRecord
from specdiff.bench.equality import Divergence
from specdiff.bench.journal import (
    BaselineStatus,
    FailureRecord,
    PartRecord,
    PromptFacts,
    Tuning,
    Turn,
    parse,
)
from specdiff.bench.metrics import CellResult, TimedRun
from specdiff.bench.settings import HF, PEERS, VANILLA, Cell
from specdiff.bench.timing import RunRecord
from specdiff.errors import UsageError

SCHEMA = 1
KEY = tuple(f.name for f in fields(Cell))
AGAIN = "measure again, or take the folder of another run"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchPoint:
    """Speeds at one batch size; None was not measured."""

    batch: int
    tokens_per_second: float | None
    vanilla_tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class BatchCurve:
    """break_even: the first size at which drafting is no faster than ours-vanilla; None if it is
    faster at every size that was measured."""

    baseline: str
    temperature: float
    sizes: list[BatchPoint]
    break_even: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A cost curve or an acceptance count that could not be taken."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Output:
    """An answer; `pieces` are (text, accepted from the draft?)."""

    prompt: str
    task: str
    baseline: str
    draft_len: int | str | None
    temperature: float
    text: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class PartResult:
    """missing: why this part did not run, and how to get what it lacks."""

    name: str
    model: str
    notes: list[str]
    missing: str | None
    prompts: list[PromptFacts]
    baselines: list[BaselineStatus]
    tuning: list[Tuning]
    cells: list[CellResult]
    costs: CostCurves
    conditional: list[Conditional]
    batches: list[BatchCurve]
    divergences: list[Divergence]
    failures: list[Failure]
    outputs: list[Output]
    dataset: str | None = None
    max_tokens: int | None = None
    dtype: str | None = None

    def stage(self, name: str) -> list[CellResult]:
        """The cells of a stage."""
        return [cell for cell in self.cells if cell.stage == name]


@dataclass(frozen=True, slots=True)
class Table2Row:
    """`paper` is the reported speed-up over plain decoding, None if none is known."""

    target: str
    dataset: str
    baseline: str
    paper: float | None
    draft_len: int | str | None
    vs_hf: float | None
    vs_vanilla: float | None
    tau: float | None
    accepted_per_draft: float | None
    why: str | None


@dataclass(frozen=True, slots=True)
class AppendixRow:
    """A setting of the sweeps. `paper` is always None: its figures are not known here."""

    target: str
    dataset: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    alpha: float | None
    vs_hf: float | None
    vs_vanilla: float | None
    tau: float | None
    accepted_per_draft: float | None
    paper: float | None = None


@dataclass(frozen=True, slots=True)
class PaperTables:
    """Table 2 and Appendix A of the paper, with our measurements."""

    table2: list[Table2Row]
    appendix_a: list[AppendixRow]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class BenchResults:
    """A whole run. `environment` is that of the last session if a run was resumed."""

    schema: int
    status: str
    suite: str
    command: str
    settings: dict[str, Any]
    environment: dict[str, Any] | None
    seconds: float
    parts: list[PartResult]
    paper: PaperTables | None


def fold(records: Sequence[Mapping[str, Any]], *, finished: bool) -> BenchResults:
    """Everything but the paper's tables. `finished`: nothing is left to measure.

    Raises UsageError for records of another version.
    """
    begin = records[0]
    try:
        abouts = {about.part: about for about in _parsed(PartRecord, records)}  # the last counts
        results = [
            _part(about, [r for r in records if r.get("part") == name])
            for name, about in abouts.items()
        ]
    except ValueError as error:
        raise UsageError(f"the journal is damaged ({error}); choose another --out") from None
    environments = [about.environment for about in abouts.values() if about.environment]
    return BenchResults(
        schema=SCHEMA,
        status="complete" if finished else "partial",
        suite=begin["suite"],
        command=begin["command"],
        settings=begin["settings"],
        environment=environments[-1] if environments else None,
        seconds=sum(r.get("took", 0.0) for r in records),
        parts=results,
        paper=None,
    )


def _part(about: PartRecord, records: Sequence[Mapping[str, Any]]) -> PartResult:
    turns = _parsed(Turn, records)
    costs = _parsed(CostRecord, records)
    cells = cell_results(turns)
    failures = [r for r in records if r["kind"] == FailureRecord.kind]
    return PartResult(
        name=about.part,
        model=about.model,
        dataset=about.dataset,
        notes=about.notes,
        missing=about.missing,
        prompts=about.prompts,
        baselines=about.baselines,
        max_tokens=about.max_tokens,
        dtype=about.dtype,
        tuning=_parsed(Tuning, records),
        cells=cells,
        costs=CostCurves(
            target=[point for record in costs for point in record.target],
            draft=[point for record in costs for point in record.draft],
        ),
        conditional=_parsed(Conditional, records),
        batches=batch_curves(cells),
        divergences=[d for turn in turns for d in turn.divergences],
        outputs=[output for turn in turns for output in _outputs(turn)],
        failures=[Failure(r["key"], r["why"]) for r in failures],
    )


def _parsed(kind: type[T], records: Sequence[Mapping[str, Any]]) -> list[T]:
    tag: Any = kind
    return [parse(kind, dict(r), r["key"]) for r in records if r["kind"] == tag.kind]


def _outputs(turn: Turn) -> Iterator[Output]:
    for run in turn.runs:
        if run.pieces is not None:
            text = "".join(piece for piece, _ in run.pieces)
            about = (run.cell.baseline, run.cell.draft_len, run.cell.temperature)
            yield Output(turn.prompt, turn.task, *about, text, run.pieces)


def cell_results(turns: Sequence[Turn]) -> list[CellResult]:
    """One entry per cell, in the order they first ran.

    A cell that failed once has failed, with the reason; its other runs still count.
    """
    grouped: dict[Cell, list[tuple[Turn, RunRecord]]] = {}
    for turn in turns:
        for run in turn.runs:
            grouped.setdefault(run.cell, []).append((turn, run))
    return [_cell(cell, runs) for cell, runs in grouped.items()]


def _cell(cell: Cell, runs: Sequence[tuple[Turn, RunRecord]]) -> CellResult:
    able = [(turn, run) for turn, run in runs if run.why is None]
    every = [d for turn, _ in able for d in turn.divergences]
    wrong = [d for d in every if all(getattr(d, name) == getattr(cell, name) for name in KEY)]
    why = next((run.why for _, run in runs if run.why is not None), None) or _wrong(wrong)
    exact = None
    if cell.temperature == 0 and able and cell.baseline not in PEERS:
        exact = 1 - len(wrong) / (len(able) * cell.batch)
    rows = [
        TimedRun(run, turn.task, _reference(turn, HF), _reference(turn, VANILLA))
        for turn, run in able
    ]
    return metrics.cell_result(cell, rows, why=why, exact=exact)


def _reference(turn: Turn, name: str) -> RunRecord | None:
    return next((r for r in turn.runs if r.cell.baseline == name and r.why is None), None)


def _wrong(divergences: Sequence[Divergence]) -> str | None:
    """The message of a cell whose answers are not the target's own, apart from near-ties."""
    bad = next((d for d in divergences if not d.near_tie), None)
    if bad is None:
        return None
    gap = "unknown" if bad.top2_gap is None else f"{bad.top2_gap:.3g}"
    return (
        f"not the target's own tokens: prompt {bad.prompt}, position {bad.position}, "
        f"where the two largest logits are {gap} apart"
    )


def batch_curves(cells: Sequence[CellResult]) -> list[BatchCurve]:
    """Throughput of each baseline against batch size."""
    speeds: dict[tuple[str, float], dict[int, float | None]] = {}
    for cell in cells:
        if cell.stage == "batch":
            speed = cell.tokens_per_second
            sizes = speeds.setdefault((cell.baseline, cell.temperature), {})
            sizes[cell.batch] = speed.median if speed else None
    curves = []
    for (baseline, temperature), sizes in speeds.items():
        plain = speeds.get((VANILLA, temperature), {})
        points = [BatchPoint(b, speed, plain.get(b)) for b, speed in sorted(sizes.items())]
        drafting = baseline not in (HF, VANILLA)
        slower = [p.batch for p in points if drafting and _no_faster(p)]
        curves.append(BatchCurve(baseline, temperature, points, next(iter(slower), None)))
    return curves


def _no_faster(point: BatchPoint) -> bool:
    own = point.tokens_per_second
    plain = point.vanilla_tokens_per_second
    return bool(own and plain and own <= plain)


def problems(results: BenchResults) -> list[str]:
    """Why a run has failed: parts, baselines and cells without a result, and wrong tokens."""
    lines: list[str] = []
    for part in results.parts:
        if part.missing:
            lines.append(f"{part.name}: {part.missing}")
        failed = [b for b in part.baselines if b.status == "failed"]
        lines += [f"{part.name}: {b.name}: {b.why}" for b in failed]
        lines += [f"{part.name}: tuning {t.baseline}: {t.why}" for t in part.tuning if t.why]
        for cell in part.cells:
            # a sweep may try drafts that are too long
            wrong = cell.stage != "sweep" or cell.exact not in (None, 1)
            if cell.status == "failed" and wrong:
                about = f"{cell.stage}, {cell.baseline}, batch {cell.batch}"
                lines.append(f"{part.name}: {about}: {cell.why}")
        lines += [f"{failure.what}: {failure.why}" for failure in part.failures]
    return list(dict.fromkeys(lines))


def write(folder: Path, results: BenchResults) -> Path:
    """Write results.json, whole or not at all. Raises StorageError."""
    return files.write_json(folder / "results.json", strict_json.plain(asdict(results)))


def read(folder: Path) -> BenchResults:
    """The results in a folder, or in the file itself. Raises UsageError for a damaged file."""
    file = folder / "results.json" if folder.is_dir() else folder
    if not file.is_file():
        raise UsageError(
            f"no results in {folder}: there is no {file.name}; "
            f"`specdiff bench --out {folder}` writes it"
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema == SCHEMA:
            return parse(BenchResults, value)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged ({error}); {AGAIN}") from None
    raise UsageError(
        f"{file} has schema {schema!r}, and this version reads {SCHEMA}; "
        "use the specdiff that wrote it, or measure again"
    )
