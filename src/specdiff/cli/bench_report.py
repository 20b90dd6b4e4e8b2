"""`specdiff bench report` and `compare`: the verbs that measure nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdiff.cli import terminal
from specdiff.unicode import valid

if TYPE_CHECKING:
    from rich.table import Table

    from specdiff.bench.compare import CellName, Change, ComparedCell, DraftSetting, RunComparison

JSON = typer.Option("--json", help="Print one JSON object.")
MINUS = "·"
COLUMNS = (
    "cell",
    "tok/s",
    "",
    "ratio (min-max)",
    "",
    "vs vanilla, ratio",
    "tau, ratio",
    "alpha, ratio",
)
LEGEND = (
    "no verdict: the spreads overlap, or are not known. "
    "Spreads of tok/s are over turns, of tau over tasks."
)


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that holds results.json.")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the main table as Markdown instead.")
    ] = False,
) -> None:
    """Write report.html again from results.json.

    Example:  specdiff bench report bench-embedded
    """
    from specdiff.bench import details, results
    from specdiff.bench import report as page

    run = results.read(folder)
    if markdown:
        print(valid("\n".join(details.markdown(run))))
        return
    print(page.write(folder if folder.is_dir() else folder.parent, run))


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of the run to compare with.")],
    second: Annotated[Path, typer.Argument(help="Folder of the run to judge.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Compare two runs cell by cell: SECOND over FIRST.

    A verdict is given if the spreads do not overlap.

    Example:  specdiff bench compare bench-before bench-after
    """
    from specdiff.bench import results
    from specdiff.bench.compare import compare as compare_runs

    comparison = compare_runs(results.read(first), results.read(second))
    if as_json:
        terminal.print_json(asdict(comparison))
        return
    out = terminal.page(160)
    for line in _differences(comparison):
        out.print(line, soft_wrap=True)
    if comparison.cells:
        out.print(_table(comparison.cells, f"{second} over {first}: above 1, {second} is larger"))
        out.print(LEGEND)
    else:
        out.print("no cell is in both")
    for folder, cells in ((first, comparison.only_first), (second, comparison.only_second)):
        for cell in cells:
            out.print(f"only in {folder}: {_name(cell)}", soft_wrap=True)


def _table(cells: "Sequence[ComparedCell]", title: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("cell", "") else "right")
    for row in cells:
        speed = row.tokens_per_second
        outcome = " and ".join(f"{run} failed" for run in row.failed) or row.verdict or ""
        table.add_row(
            _name(row),
            f"{speed.first:.1f}" if speed else MINUS,
            f"→ {speed.second:.1f}" if speed else "",
            _ratio(speed),
            Text(outcome, style="green" if outcome == "faster" else "red"),
            _ratio(row.speedup_vs_vanilla),
            _ratio(row.tau),
            _ratio(row.alpha),
        )
    return table


def _differences(comparison: "RunComparison") -> list[str]:
    lines = [f"differs: {d.what}: {d.first} → {d.second}" for d in comparison.differences]
    return lines or ["environment and settings are the same"]


def _name(row: "CellName | ComparedCell") -> str:
    batch = "" if row.batch == 1 else f" batch {row.batch}"
    before = getattr(row, "before", None)
    first = f" (first{_setting(before)})" if before else ""
    place = f"{row.part} {row.stage}: {row.baseline}{_setting(row)}"
    return f"{place} T={row.temperature:g}{batch}{first}"


def _setting(row: "CellName | ComparedCell | DraftSetting") -> str:
    length = "" if row.draft_len is None else f" K={row.draft_len}"
    return length + ("" if row.steps is None else f" steps={row.steps}")


def _ratio(change: "Change | None") -> str:
    if change is None:
        return MINUS
    if change.min is None or change.max is None:
        return f"{change.ratio:.2f}"
    return f"{change.ratio:.2f} ({change.min:.2f}-{change.max:.2f})"
