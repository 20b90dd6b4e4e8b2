"""`specdiff check`: whether a drafter, a verifier or a target is lossless."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params, terminal
from specdiff.errors import SpecdiffError, UsageError

if TYPE_CHECKING:
    from specdiff.check import Finding
    from specdiff.targets.base import Target

RATIO_AND_MATCH = ("token", "block", "match")


def check(
    drafter: Annotated[
        str | None,
        typer.Argument(
            help="./file.py:Class[:json], module:Class[:json], a name, a folder or a hub id.",
            metavar="DRAFTER",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Target of the drafter (default: its own, or a toy)."),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(help="Check this verifier: a name or ./file.py:function."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Check this target: name, folder, hub id, file.py:Class or table."),
    ] = None,
    as_json: params.Json = False,
    recipes: Annotated[
        bool,
        typer.Option(
            "--recipes", metavar="", help="Enumerate which ways of making a draft are lawful."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="With --recipes: folder for bias.html and bias.json."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", metavar="", help="Fewer samples: coarse bugs only.")
    ] = False,
    config: params.Config = None,
) -> None:
    """Check that DRAFTER (or --verifier, or --target) preserves the target's law.

    Exit code 1 if a check fails.

    Example:  specdiff check ./mine.py:Mine
    """
    if recipes:
        if drafter or verifier or target:
            raise UsageError(
                "--recipes enumerates toy drafts of its own; "
                "leave out the drafter, --verifier and --target"
            )
        return _recipes(as_json) if out is None else _bias(out, as_json)
    if out is not None:
        raise UsageError("--out is for --recipes; add it, or leave --out out")
    if drafter is None and verifier is None and target is None:
        raise UsageError(
            "nothing to check; give a drafter like ./mine.py:Mine, or --verifier NAME, "
            "or --target SPEC, or --recipes"
        )
    if drafter is None and model is not None:
        raise UsageError(
            "--model is the target a drafter is checked with; "
            "to check a target itself give --target"
        )
    terminal.quiet_libraries()
    findings: list[Finding] = []
    progress = not as_json and sys.stderr.isatty()
    try:
        for finding in _findings(drafter, model, verifier, target, quick):
            findings.append(finding)
            if progress:
                print(f"\r{len(findings)} checks done", end="", file=sys.stderr, flush=True)
    finally:
        if progress and findings:
            print(file=sys.stderr)
    passed = all(f.passed for f in findings)
    if as_json:
        terminal.print_json({"passed": passed, "findings": [f.as_dict() for f in findings]})
    else:
        _show(findings)
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
        subject: Target[Any]
        if target == "table":
            subject = TableTarget.random(5)
        elif ":" in target:
            subject = catalog.custom_target(target)
        else:
            subject = catalog.target(target, torch.float32, cpu)[0]
        yield from check_target(subject, quick=quick)
    if drafter is None:
        if verifier is not None:
            yield from check_verifier(catalog.verifier(verifier), quick=quick)
        return
    names: tuple[str, ...] = RATIO_AND_MATCH if verifier is None else (verifier,)
    model = model or catalog.target_of(drafter)
    options = {} if model is None else {"target": catalog.target(model, torch.float32, cpu)[0]}
    pair = Subject(lambda info: catalog.drafter(drafter, info), **options)
    if verifier is None and pair.build(pair.target.info).trees:
        names = tuple(name for name in names if name != "block")  # it takes chains only
    yield from check_drafter(pair, {name: catalog.verifier(name) for name in names}, quick=quick)


def _recipes(as_json: bool) -> None:
    """The table of docs/exactness.md: range of the total variation from the target's law."""
    from specdiff.check.constructions import table

    if as_json:
        terminal.print_json(
            [
                {"draft": name, "lawful": lawful, "distance": distances}
                for name, lawful, distances in table()
            ]
        )
        return
    print("| a draft made by | `token` | `block` | `match` |\n|---|---|---|---|")
    for name, lawful, distances in table():
        cells = [
            "0" if most < 1e-12 else f"{least:.3f} to {most:.2f}"
            for least, most in distances.values()
        ]
        print(" | ".join([f"| {name if lawful else f'**{name}**'}", *cells]) + " |")


def _bias(out: Path, as_json: bool) -> None:
    """Recipes and this library's drafters, with a page of the table."""
    from specdiff.check import bias

    terminal.quiet_libraries()
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


def _show(findings: "Iterable[Finding]") -> None:
    """A table on a terminal, plain lines in a pipe."""
    from rich.table import Table
    from rich.text import Text

    out = terminal.page()
    if not out.is_terminal:
        for f in findings:
            print(f"{'passed' if f.passed else 'FAILED'}  {f.name}: {f.message}")
        return
    table = Table("check", "", "finding", "statistic", "threshold", box=None, padding=(0, 2, 0, 0))
    for f in findings:
        numbers = ["" if x is None else f"{x:.3g}" for x in (f.statistic, f.threshold)]
        outcome = Text("passed", style="green") if f.passed else Text("FAILED", style="red")
        table.add_row(f.name, outcome, f.message, *numbers)
    out.print(table)
