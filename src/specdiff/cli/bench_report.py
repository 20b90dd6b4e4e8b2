"""`specdiff bench report`, `compare` and `law`: what measures no speed."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from specdiff.cli import terminal
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import MissingExtraError, SpecdiffError

JSON = typer.Option("--json", help="Print one JSON object.")
MINUS = "·"


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that holds results.json.")],
) -> None:
    """Write report.html again from results.json.

    Example:  specdiff bench report bench-embedded
    """
    from specdiff.bench import report as page
    from specdiff.bench import stored

    told = stored.read(folder)
    print(page.write(folder if folder.is_dir() else folder.parent, told))


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of the run to compare with.")],
    second: Annotated[Path, typer.Argument(help="Folder of the run to judge.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Set two runs side by side, cell by cell: SECOND over FIRST. A verdict only where the spreads do not overlap.

    Example:  specdiff bench compare bench-before bench-after
    """
    from specdiff.bench import compare as pair
    from specdiff.bench import stored

    found = pair.compare(stored.read(first), stored.read(second))
    if as_json:
        terminal.print_json(found)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = terminal.page(160)
    for line in _differences(found["differences"]):
        out.print(line, soft_wrap=True)
    table = Table(
        title=f"{second} over {first}: above 1, {second} is larger",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in (
        "cell",
        "tok/s",
        "",
        "ratio (min-max)",
        "",
        "vs vanilla, ratio",
        "tau, ratio",
        "alpha, ratio",
    ):
        table.add_column(name, justify="left" if name in ("cell", "") else "right")
    for row in found["cells"]:
        speed = row["tokens_per_second"]
        both = (f"{speed['first']:.1f}", f"→ {speed['second']:.1f}") if speed else (MINUS, "")
        said = " and ".join(f"{side} failed" for side in row["failed"]) or row["verdict"] or ""
        colour = {"faster": "green", "slower": "red"}.get(said, "red" if row["failed"] else "")
        ratios = [_ratio(row[name]) for name in ("speedup_vs_vanilla", "tau", "alpha")]
        table.add_row(_named(row), *both, _ratio(speed), Text(said, style=colour), *ratios)
    if found["cells"]:
        out.print(table)
        out.print(
            "no word: the spreads overlap, or are not known. Spreads of tok/s are over turns, of tau over tasks."
        )
    else:
        out.print("no cell is in both")
    for side, folder in (("only_first", first), ("only_second", second)):
        for row in found[side]:
            out.print(f"only in {folder}: {_named(row)}", soft_wrap=True)


def _differences(found: Iterable[Mapping[str, Any]]) -> list[str]:
    told = [f"differs: {d['what']}: {d['first']} → {d['second']}" for d in found]
    return told or ["environment and settings are the same"]


def _named(row: Mapping[str, Any]) -> str:
    more = "" if row["batch"] == 1 else f" batch {row['batch']}"
    before = f" (first{_setting(row['before'])})" if row.get("before") else ""
    return f"{row['part']} {row['stage']}: {row['baseline']}{_setting(row)} T={row['temperature']:g}{more}{before}"


def _setting(row: Mapping[str, Any]) -> str:
    length = "" if row["draft_len"] is None else f" K={row['draft_len']}"
    return length + ("" if row["steps"] is None else f" steps={row['steps']}")


def _ratio(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return MINUS
    return f"{value['ratio']:.2f}" + (
        "" if value["min"] is None else f" ({value['min']:.2f}-{value['max']:.2f})"
    )


def law(
    out: Annotated[Path, typer.Option(help="Folder of law.json and law.html.")] = Path("bench-law"),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Enumerate how far each way of drafting moves the law of the text, under each verifier.

    Example:  specdiff bench law --out bench-law
    """
    from specdiff.bench import law as study

    quiet_libraries()
    found = list(study.rows())
    written = study.write(out, found)
    if as_json:
        terminal.print_json(found)
    else:
        _show(found)
    print(f"results: {written}", file=sys.stderr)
    try:
        print(f"page: {study.page(out, found)}", file=sys.stderr)
    except MissingExtraError as error:
        print(f"no law.html: {error}", file=sys.stderr)
    wrong = [row["draft"] for row in found if row["lawful"] is row["biased"]]
    if wrong:
        raise SpecdiffError(f"not as they are said to be: {'; '.join(wrong)}")


def _show(found: Iterable[Mapping[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from specdiff.bench.law import VERIFIERS, shown

    table = Table(
        title="total variation from the target's law", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("a draft made by")
    for name in (*VERIFIERS, ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    last = None
    for row in found:
        if last not in (None, row["group"]):
            table.add_section()
        last = row["group"]
        cells = [shown(row, v) for v in VERIFIERS]
        outcome = Text("biased", style="red") if row["biased"] else Text("lawful", style="green")
        table.add_row(row["draft"], *cells, outcome)
    terminal.page(140).print(table)
