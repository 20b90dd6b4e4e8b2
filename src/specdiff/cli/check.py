"""`specdiff check`: is a drafter, a verifier or a target lossless?"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdiff.cli import terminal
from specdiff.cli.options import quiet_libraries
from specdiff.errors import SpecdiffError, UsageError

if TYPE_CHECKING:
    from specdiff.check import Finding

RATIO_AND_MATCH = ("token", "block", "match")


def check(
    drafter: Annotated[
        str | None,
        typer.Argument(
            help="./file.py:Class[:json], module:Class[:json], a folder or hub id, sedd, autoregressive, none."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The target to draft for. Default: a toy, or the one the drafter was trained for."
        ),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Name or ./file.py:function: check it (with a drafter: check the drafter under it)."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Check this target: hub id, folder, built-in name, ./file.py:Class, table."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    recipes: Annotated[
        bool,
        typer.Option(
            "--recipes", help="Instead: which ways of making a draft are lawful, enumerated."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --recipes: folder of bias.json and bias.html; includes our own drafters."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer samples: coarse bugs only.")
    ] = False,
) -> None:
    """Check that DRAFTER (or --verifier, or --target) leaves the target's law as it is. Exit code 1 if a check fails.

    Example:  specdiff check ./mine.py:Mine
    """
    if recipes:
        if drafter or verifier or target:
            raise UsageError(
                "--recipes enumerates toy drafts of its own; leave out the drafter, --verifier and --target"
            )
        return _recipes(as_json) if out is None else _bias(out, as_json)
    if out is not None:
        raise UsageError("--out is for --recipes; add it, or leave --out out")
    if drafter is None and verifier is None and target is None:
        raise UsageError(
            "nothing to check; give a drafter like ./mine.py:Mine, or --verifier NAME, or --target SPEC, or --recipes"
        )
    if drafter is None and model is not None:
        raise UsageError(
            "--model is the target a drafter is checked with; to check a target itself give --target"
        )
    quiet_libraries()
    found: list[Finding] = []
    progress = not as_json and sys.stderr.isatty()
    try:
        for finding in _findings(drafter, model, verifier, target, quick):
            found.append(finding)
            if progress:
                print(f"\r{len(found)} checks done", end="", file=sys.stderr, flush=True)
    finally:
        if progress and found:
            print(file=sys.stderr)
    passed = all(f.passed for f in found)
    if as_json:
        terminal.print_json({"passed": passed, "findings": [f.as_dict() for f in found]})
    else:
        _show(found)
    raise typer.Exit(0 if passed else 1)


def _findings(
    drafter: str | None, model: str | None, verifier: str | None, target: str | None, quick: bool
) -> "Iterator[Finding]":
    import torch

    from specdiff import catalog
    from specdiff.check import Subject, check_drafter, check_target, check_verifier
    from specdiff.targets.table import TableTarget

    cpu = torch.device("cpu")
    if target is not None:
        toy = (
            TableTarget.random(5)
            if target == "table"
            else catalog.custom_target(target)
            if ":" in target
            else None
        )
        yield from check_target(toy or catalog.target(target, torch.float32, cpu)[0], quick=quick)
    if drafter is None:
        if verifier is not None:
            yield from check_verifier(catalog.verifier(verifier), quick=quick)
        return
    names = RATIO_AND_MATCH if verifier is None else (verifier,)
    trained_for = model or catalog.target_of(drafter)
    chosen = (
        {}
        if trained_for is None
        else {"target": catalog.target(trained_for, torch.float32, cpu)[0]}
    )
    subject = Subject(lambda info: catalog.drafter(drafter, info), **chosen)
    yield from check_drafter(subject, {name: catalog.verifier(name) for name in names}, quick=quick)


def _recipes(as_json: bool) -> None:
    """The table of docs/exactness.md: total variation from the target's law, least and most over random cases."""
    from specdiff.check.constructions import table

    if as_json:
        terminal.print_json(
            [
                {"draft": name, "lawful": lawful, "distance": found}
                for name, lawful, found in table()
            ]
        )
        return
    print("| a draft made by | `token` | `block` | `match` |\n|---|---|---|---|")
    for name, lawful, found in table():
        cells = [
            "0" if most < 1e-12 else f"{least:.3f} to {most:.2f}" for least, most in found.values()
        ]
        print(" | ".join([f"| {name if lawful else f'**{name}**'}", *cells]) + " |")


def _bias(out: Path, as_json: bool) -> None:
    """Recipes and this library's drafters, with a page of the table."""
    from specdiff.check import bias

    quiet_libraries()
    study = list(bias.rows())
    record, page = bias.write(out, study)
    if as_json:
        terminal.print_json([asdict(row) for row in study])
    else:
        print("| a draft made by | `token` | `block` | `match` |\n|---|---|---|---|")
        for row in study:
            name = f"**{row.draft}**" if row.biased else row.draft
            print(" | ".join([f"| {name}", *(row.text(v) for v in bias.VERIFIERS)]) + " |")
    print(f"results: {record}", file=sys.stderr)
    print(f"page: {page}", file=sys.stderr)
    wrong = bias.wrong(study)
    if wrong:
        raise SpecdiffError(f"not as claimed: {'; '.join(wrong)}")


def _show(found: "Iterable[Finding]") -> None:
    """A table on a terminal, plain lines in a pipe."""
    from rich.table import Table
    from rich.text import Text

    out = terminal.page()
    if not out.is_terminal:
        for f in found:
            print(f"{'passed' if f.passed else 'FAILED'}  {f.name}: {f.message}")
        return
    table = Table(
        "check", "", "what was seen", "statistic", "threshold", box=None, padding=(0, 2, 0, 0)
    )
    for f in found:
        numbers = ["" if x is None else f"{x:.3g}" for x in (f.statistic, f.threshold)]
        outcome = Text("passed", style="green") if f.passed else Text("FAILED", style="red")
        table.add_row(f.name, outcome, f.message, *numbers)
    out.print(table)
