"""Tables of a run: the live screen, the printed table, results.csv and the --json summary."""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specdiff import files
from specdiff.bench import results
from specdiff.bench.metrics import CellResult, Speedup, Spread
from specdiff.bench.results import BenchResults, PaperTables, PartResult
from specdiff.bench.runner import BenchEvent
from specdiff.unicode import valid

COLUMNS: dict[str, Callable[[CellResult], str]] = {
    "baseline": lambda c: c.baseline,
    "T": lambda c: f"{c.temperature:g}",
    "K": lambda c: str(c.draft_len or ""),
    "steps": lambda c: str(c.steps or ""),
    "tok/s": lambda c: _spread(c.tokens_per_second),
    "decode": lambda c: _spread(c.decode_tokens_per_second),
    "vs hf": lambda c: _ratio(c.speedup_vs_hf),
    "vs vanilla": lambda c: _ratio(c.speedup_vs_vanilla),
    "tau": lambda c: _number(c.tau),
    "fresh": lambda c: _number(c.tau_before_loop),
    "alpha": lambda c: _number(c.alpha),
    "even": lambda c: _number(c.break_even_tau),
    "limit": lambda c: _number(c.free_fraction),
    "TTFT": lambda c: _spread(c.ttft, 1000, 0),
    "exact": lambda c: "" if c.exact is None else f"{100 * c.exact:.0f} %",
}
FEW = ("baseline", "T", "K", "tok/s", "vs hf", "vs vanilla", "tau", "exact")
WIDE = 140  # characters that all columns need
LEGEND = (
    "T temperature; K draft length; medians over turns, for speed-ups (min-max of single turns);\n"
    "fresh: tau before the first repeated 8-gram; even: break-even tau; limit: share of the\n"
    "speed-up of free drafting; TTFT in ms; exact: share of greedy answers equal to transformers'"
)
BAR = 30  # characters of the progress bar
WORDS = ("data set", "target", "drafter", "")  # columns that hold text
PLAIN = ("seconds", "memory", "tasks", "per_position", "reached")  # neither in CSV nor in --json


class Screen:
    """The live table, folded from events.

    The remaining time is estimated from what this process measured itself.
    """

    def __init__(self) -> None:
        self.part = ""
        self.begin = 0.0
        self.left = ""

    def render(self, event: BenchEvent, records: Sequence[dict[str, Any]], width: int) -> Group:
        """What to show now, in `width` columns."""
        here = event.done - event.skipped
        if event.part != self.part or here <= 0:
            self.part = event.part
            self.begin = time.monotonic()
            self.left = ""
        elif event.record is not None:
            seconds = (time.monotonic() - self.begin) * (event.total - event.done) / here
            self.left = f", about {remaining(seconds)} left"
        parts = results.fold(records, finished=False).parts
        tables = [main(p, width) for p in parts if p.name == event.part and p.cells]
        share = min(1.0, event.done / max(event.total, 1e-9))
        full = round(BAR * share)
        bar = f"{'━' * full}{'·' * (BAR - full)} {100 * share:3.0f} %"
        line = f"{bar}  {event.part}: {event.title}{self.left}"
        return Group(*tables, Text(line, no_wrap=True, overflow="ellipsis"))


def remaining(seconds: float) -> str:
    """A duration in its natural unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(part: PartResult, width: int) -> Table:
    """The main comparison of one part: a line per cell; the columns that fit."""
    table = Table(
        title=f"{part.name}: {part.model}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = COLUMNS if width >= WIDE else {name: COLUMNS[name] for name in FEW}
    for name in columns:
        table.add_column(name, justify="left" if name == "baseline" else "right", no_wrap=True)
    temperature = None
    for cell in part.stage("main"):
        if temperature not in (None, cell.temperature):
            table.add_section()
        temperature = cell.temperature
        style = "red" if cell.status == "failed" else None
        table.add_row(*(show(cell) for show in columns.values()), style=style)
    return table


def absent(part: PartResult) -> list[str]:
    """Why a part, or a baseline of it, is not in the table; failed cells too."""
    lines = [part.missing] if part.missing else []
    lines += [f"{b.name}: {b.why}" for b in part.baselines if b.status != "ok"]
    for cell in part.cells:
        if cell.status == "failed":
            lines.append(f"{cell.stage} {cell.baseline}, batch {cell.batch}: {cell.why}")
    return lines


def _spread(value: Spread | None, times: float = 1, digits: int = 1) -> str:
    return "" if value is None else f"{times * value.median:.{digits}f}"


def _ratio(value: Speedup | None) -> str:
    return "" if value is None else f"{value.ratio:.2f} ({value.min:.2f}-{value.max:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def paper(tables: PaperTables) -> Table:
    """Table 2, ours next to the paper's."""
    names = ("data set", "target", "drafter", "K", "paper", "ours vs hf", "ours vs our plain")
    title = "Table 2: speed-up over plain decoding"
    table = _empty(title, (*names, "accepted per draft", ""))
    for row in tables.table2:
        table.add_row(
            row.dataset,
            row.target,
            row.baseline,
            str(row.draft_len or ""),
            _number(row.paper),
            _number(row.vs_hf),
            _number(row.vs_vanilla),
            _number(row.accepted_per_draft),
            row.why or "",
        )
    return table


def appendix(tables: PaperTables) -> Table:
    """Every setting of the sweeps; Appendix A's own figures are not known."""
    names = ("data set", "target", "drafter", "K", "steps", "alpha", "accepted per draft")
    title = "Appendix A: settings (ours; the paper's figures are not known here)"
    table = _empty(title, (*names, "vs hf", "vs our plain"))
    for row in tables.appendix_a:
        table.add_row(
            row.dataset,
            row.target,
            row.baseline,
            str(row.draft_len or ""),
            str(row.steps or ""),
            _number(row.alpha),
            _number(row.accepted_per_draft),
            _number(row.vs_hf),
            _number(row.vs_vanilla),
        )
    return table


def _empty(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="left" if name in WORDS else "right")
    return table


def whole(run: BenchResults, width: int) -> Iterator[RenderableType]:
    """A table for each part, what is absent from it and why, and the paper's tables."""
    for part in run.parts:
        if part.cells:
            yield main(part, width)
        for line in absent(part):
            yield f"  {line}"
    if any(part.cells for part in run.parts):
        yield LEGEND
    if run.paper:
        yield paper(run.paper)
        yield appendix(run.paper)
        yield from (f"note: {line}" for line in run.paper.notes)


def summary(run: BenchResults) -> dict[str, Any]:
    """The output of --json: without answers, prompts, curves and seconds by stage."""
    everything = asdict(run)
    names = ("schema", "status", "suite", "environment", "paper")
    parts = []
    for part in everything["parts"]:
        about = {name: part[name] for name in ("name", "model", "missing", "baselines", "tuning")}
        parts.append(about | {"cells": [_plain(cell) for cell in part["cells"]]})
    return {name: everything[name] for name in names} | {"parts": parts}


def write_csv(folder: Path, run: BenchResults) -> Path:
    """Write results.csv, whole or not at all. Raises StorageError."""
    return files.write_text(folder / "results.csv", valid(as_csv(run)))


def as_csv(run: BenchResults) -> str:
    """One line per cell; a spread is flattened to name, name_min and name_max."""
    rows = []
    for part in run.parts:
        rows += [{"part": part.name} | _flat(_plain(asdict(cell))) for cell in part.cells]
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _plain(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name not in PLAIN}


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in cell.items():
        if isinstance(value, dict):
            middle = "median" if "median" in value else "ratio"
            flat |= {name: value[middle], f"{name}_min": value["min"], f"{name}_max": value["max"]}
        else:
            flat[name] = value
    return flat
