"""HTML report: all of results.json in one file that needs no network and no JavaScript."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdiff import files
from specdiff.bench import details, results, table
from specdiff.bench.metrics import CellResult, Speedup
from specdiff.bench.report_figures import FigureView, figures, missing_extra, paper_figures
from specdiff.bench.results import BenchResults, Output, PartResult
from specdiff.bench.settings import ASSISTED, DFLASH, HF, LOOKUP, VANILLA
from specdiff.unicode import valid

NAME = "report.html"
ASSISTANTS = (ASSISTED, DFLASH, LOOKUP)
AGREE = 0.8  # of the turns
UNCLEAR = "no clear difference"
UNITS = {  # of the table's columns
    "K": "tokens",
    "steps": "passes",
    "tok/s": "end to end",
    "decode": "tok/s",
    "vs hf": "ratio (min-max)",
    "vs vanilla": "ratio (min-max)",
    "tau": "tok/round",
    "fresh": "tau",
    "alpha": "share",
    "even": "tau",
    "limit": "share",
    "TTFT": "ms",
    "exact": "share",
}


@dataclass(frozen=True, slots=True)
class RowView:
    """A line of the main table."""

    cells: dict[str, str]
    failed: str | None
    verdict: str


@dataclass(frozen=True, slots=True)
class TaskView:
    """Each drafter's speed-up over plain decoding, a column per task."""

    heads: list[str]
    rows: list[tuple[str, list[Speedup | None]]]


@dataclass(frozen=True, slots=True)
class PartView:
    """A part's section; `raw` is the part itself."""

    raw: PartResult
    summary: list[str]
    heads: dict[str, str]
    rows: list[RowView]
    details: list[dict[str, str]]
    tasks: TaskView | None
    figures: list[FigureView]
    absent: list[str]
    compared: bool
    outputs: list[tuple[str, list[Output]]]


def write(folder: Path, run: BenchResults) -> Path:
    """Write report.html next to results.json, whole or not at all.

    Raises MissingExtraError or StorageError.
    """
    return files.write_text(folder / NAME, valid(page(run)))


def page(run: BenchResults) -> str:
    """The page of a run, whole or partial, with everything from outside escaped.

    Raises MissingExtraError.
    """
    try:
        import jinja2
    except ImportError:
        raise missing_extra("Jinja2") from None
    smoke = run.settings["smoke"]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html").render(
        run=run,
        parts=[_view(part, f"p{i}", smoke=smoke) for i, part in enumerate(run.parts)],
        problems=results.problems(run),
        paper_figures=list(paper_figures(run)) if run.paper else [],
        drafters=_drafters(run),
    )


def _view(part: PartResult, name: str, *, smoke: bool) -> PartView:
    return PartView(
        raw=part,
        summary=[] if smoke else list(sentences(part)),
        heads=UNITS,
        rows=[_row(cell) for cell in _main(part)],
        details=details.rows(part),
        tasks=tasks(part),
        figures=list(figures(part, name)) if part.cells or part.missing is None else [],
        absent=table.absent(part),
        compared=any(cell.exact is not None for cell in part.cells),
        outputs=_by_prompt(part.outputs),
    )


def _row(cell: CellResult) -> RowView:
    ratio = cell.speedup_vs_vanilla
    return RowView(
        cells={name: show(cell) for name, show in table.COLUMNS.items()},
        failed=cell.why,
        verdict=verdict(ratio) if ratio and cell.baseline != VANILLA else "",
    )


def _main(part: PartResult) -> list[CellResult]:
    return sorted(part.stage("main"), key=lambda cell: cell.temperature)


def tasks(part: PartResult) -> TaskView | None:
    """None if there are fewer than two tasks."""
    cells = []
    for cell in _main(part):
        ratios = [task.speedup_vs_vanilla for task in cell.tasks.values()]
        if cell.tau is not None and any(ratios):
            cells.append(cell)
    heads = list(dict.fromkeys(task for cell in cells for task in cell.tasks))
    rows = [(f"{label(c)}, T={c.temperature:g}", _by_task(c, heads)) for c in cells]
    return TaskView(heads, rows) if len(heads) > 1 else None


def _by_task(cell: CellResult, heads: Sequence[str]) -> list[Speedup | None]:
    return [cell.tasks[h].speedup_vs_vanilla if h in cell.tasks else None for h in heads]


def _by_prompt(outputs: Sequence[Output]) -> list[tuple[str, list[Output]]]:
    prompts: dict[str, list[Output]] = {}
    for output in outputs:
        prompts.setdefault(f"{output.prompt} ({output.task})", []).append(output)
    return list(prompts.items())


def _drafters(run: BenchResults) -> list[str]:
    """Name and spec of every drafter, over all parts."""
    names: dict[str, None] = {}
    for part in run.parts:
        for b in part.baselines:
            if b.kind == "ours" and b.spec not in (None, "none"):
                names[b.name if b.name == b.spec else f"{b.name} = {b.spec}"] = None
    return list(names)


def sentences(part: PartResult) -> Iterator[str]:
    """A summary in a few lines per temperature, which state a slow-down as plainly as a gain."""
    main = [c for c in part.stage("main") if c.status == "ok"]
    for temperature in sorted({c.temperature for c in main}):
        rows = [c for c in main if c.temperature == temperature]
        others = (HF, VANILLA, *ASSISTANTS)
        ours = [c for c in rows if c.baseline not in others and c.speedup_vs_vanilla]
        ranked = sorted(ours, key=_gain, reverse=True)
        begin = f"At temperature {temperature:g}, "
        if not ranked:
            yield begin + "no drafter was compared with plain decoding."
            continue
        best = ranked[0]
        yield f"{begin}the best of our drafters is {label(best)}: {_against_plain(best)}"
        if ranked[1:]:
            gains = "; ".join(f"{label(c)} {_times(c)}" for c in ranked[1:])
            yield f"The others, against plain decoding in our engine: {gains}."
        yield from _against_transformers(best, rows)


def label(cell: CellResult) -> str:
    """A baseline with its draft length."""
    return cell.baseline + ("" if cell.draft_len is None else f" (K={cell.draft_len})")


def _gain(cell: CellResult) -> float:
    return cell.speedup_vs_vanilla.ratio if cell.speedup_vs_vanilla else 0.0


def _times(cell: CellResult) -> str:
    ratio = cell.speedup_vs_vanilla
    return f"{ratio.ratio:.2f}x ({agreement(ratio)})" if ratio else ""


def verdict(ratio: Speedup) -> str:
    """Faster or slower if the medians say so and four turns in five agree."""
    enough = AGREE * ratio.turns
    if ratio.ratio > 1 and ratio.faster >= enough:
        return "faster"
    if ratio.ratio < 1 and ratio.turns - ratio.faster >= enough:
        return "slower"
    return UNCLEAR


def agreement(ratio: Speedup) -> str:
    """The verdict with the turns that support it."""
    outcome = verdict(ratio)
    if outcome == UNCLEAR:
        return f"{outcome}: faster in {ratio.faster} of {ratio.turns} turns"
    count = ratio.faster if outcome == "faster" else ratio.turns - ratio.faster
    return f"{outcome} in {count} of {ratio.turns} turns"


def _against_plain(cell: CellResult) -> str:
    """The gain over plain decoding in the same engine, or the loss and what breaks even."""
    ratio = cell.speedup_vs_vanilla
    assert ratio is not None
    text = (
        f"{ratio.ratio:.2f}x plain decoding in our engine "
        f"({ratio.min:.2f} to {ratio.max:.2f}), {agreement(ratio)}."
    )
    if verdict(ratio) == "slower":
        text += " A slow-down: plain decoding is the better choice here."
    if cell.tau is not None and cell.break_even_tau is not None:
        text += (
            f" It writes {cell.tau:.2f} tokens a round and needs {cell.break_even_tau:.2f} "
            "to break even."
        )
    return text


def _against_transformers(best: CellResult, rows: Sequence[CellResult]) -> Iterator[str]:
    """The gain over transformers, and how much of it is the engine's."""
    ratios = {c.baseline: c.speedup_vs_hf.ratio for c in rows if c.speedup_vs_hf}
    if best.speedup_vs_hf:
        text = f"Against transformers' generate it is {best.speedup_vs_hf.ratio:.2f}x"
        if VANILLA in ratios:
            text += f"; our engine without any drafter is {ratios[VANILLA]:.2f}x"
        yield f"{text}."
    own = "; ".join(f"{name} {ratios[name]:.2f}x" for name in ASSISTANTS if name in ratios)
    if own:
        yield f"Transformers' own speculation, against its generate: {own}."
