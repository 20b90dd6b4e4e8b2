"""`specdiff bench`: how much faster, on this machine, than what else there is."""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params, terminal
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import MissingExtraError, UsageError
from specdiff.unicode import valid

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.bench.journal import Journal
    from specdiff.bench.plan import Part, Settings

PATIENCE = 10  # seconds between two writes of the files, for who looks at them meanwhile
QUICK: dict[str, Any] = {"prompts": 5, "max_tokens": 24, "batch": (1,), "gammas": (2, 4), "steps": (1,), "contexts": (256,),
                         "widths": (1, 2, 4, 8, 16), "sweeps": False, "sample": 2, "tuning_tokens": 16,
                         "tune_each": False}  # fmt: skip
PAPER: dict[str, Any] = {
    "temperatures": (1.0,),
    "max_tokens": 1024,
    "prompts": 16,
    "gammas": (5, 10, 20, 30, 40, 50),
}
SMOKE: dict[str, Any] = {"max_tokens": 8, "prompts": 2, "gammas": (2, 40), "steps": (1, 2), "batch": (1, 2), "contexts": (16,),
                         "widths": (1, 2, 8)}  # fmt: skip


def bench(
    ctx: typer.Context,
    suite: Annotated[
        str, typer.Option(help="embedded, paper, jsonl:FILE, humaneval:FILE or gsm8k:FILE.")
    ] = "embedded",
    model: params.OptionalModel = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="One more drafter, as SPEC or NAME=SPEC; may be given again."),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Leave out all but NAME,NAME,...; hf and ours-vanilla always run.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="A table in minutes: 5 prompts, 24 tokens, no sweeps.")
    ] = False,
    temperatures: Annotated[str, typer.Option(help="T,T,...; default 0,1 (paper: 1).")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; default 64.")
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(help="So many prompts, spread over the suite's tasks; default all."),
    ] = None,
    times: Annotated[
        int | None, typer.Option(help="Turns on each prompt; at least 5 turns are taken in all.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes N,N,...; default 1,2,4,8,16,32.")] = "",
    gammas: Annotated[
        str, typer.Option(help="Draft lengths to tune and sweep over, K,K,...; default 2,4,8,16.")
    ] = "",
    steps: Annotated[
        str,
        typer.Option(
            help="Network passes per draft to tune and sweep over, T,T,...; default 1,2,4."
        ),
    ] = "",
    verifier: Annotated[str, typer.Option(help="token, block, match or match-gumbel.")] = "token",
    draft_len: Annotated[
        int | None,
        typer.Option(help="One draft length for all; default: each drafter's best is found."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all sampling.")] = 0,
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    config: params.Config = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of results.json, results.csv and report.html; default bench-SUITE."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds, by the same settings.")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Suite paper on tiny random models: only to see that it runs."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a summary as one JSON object instead of the table."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No live table and no notes.")
    ] = False,
) -> None:
    """Measure drafters against plain decoding and transformers' own ways, all in one process, taking turns on the same prompts.

    Stop it any time: what was measured is kept, and --resume goes on.

    Example:  specdiff bench --quick --drafter mine=./my-drafter
    """
    if ctx.invoked_subcommand is not None:
        return _alone(ctx)
    if smoke and suite != "paper":
        raise UsageError(f"--smoke is for --suite paper; the suite {suite!r} runs on real models")
    chosen: dict[str, Any] = {
        "temperatures": _numbers("--temperatures", temperatures, float),
        "batch": _numbers("--batch", batch, int),
        "gammas": _numbers("--gammas", gammas, int),
        "steps": _numbers("--steps", steps, int),
        "max_tokens": max_tokens,
        "prompts": prompts,
        "times": times,
    }
    base = (PAPER if suite == "paper" else {}) | (QUICK if quick else {}) | (SMOKE if smoke else {})
    fixed = {
        "suite": suite,
        "drafters": tuple(drafter or ()),
        "verifier": verifier,
        "draft_len": draft_len,
        "seed": seed,
    }
    fixed |= {
        "only": tuple(filter(None, only.split(","))),
        "device": device,
        "dtype": dtype,
        "smoke": smoke,
        "model": model or "",
    }
    quiet_libraries()
    folder = out or Path(f"bench-{suite.partition(':')[0]}" + ("-smoke" if smoke else ""))
    settings, parts = _plan(
        base | {n: v for n, v in chosen.items() if v is not None} | fixed, folder
    )
    from specdiff import files
    from specdiff.bench.journal import Journal

    about = {"suite": suite, "command": valid(shlex.join(["specdiff", *sys.argv[1:]]))}
    notes = terminal.notes(quiet=quiet)
    lock = files.lock(folder)
    try:
        journal = Journal(folder, asdict(settings), about, resume=resume)
        interrupted = _watch(settings, parts, journal, folder, notes)
        _tell(journal, folder, notes, as_json=as_json, finished=not interrupted)
    finally:
        lock.release()


def _alone(ctx: typer.Context) -> None:
    """The other verbs measure nothing, so nothing that says what to measure may stand before them."""
    given = [
        name for name in ctx.params if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")
    ]
    if given:
        flag = "--" + given[0].removeprefix("as_").replace("_", "-")
        raise UsageError(
            f"{flag} is for measuring; leave it out, or give it behind {ctx.invoked_subcommand} if that has it"
        )


def _numbers(flag: str, text: str, kind: Callable[[str], float]) -> tuple[float, ...] | None:
    try:
        return tuple(kind(part) for part in text.split(",")) if text else None
    except ValueError:
        raise UsageError(f"{flag} must be numbers such as 1,2,4, not {text!r}") from None


def _plan(values: dict[str, Any], folder: Path) -> "tuple[Settings, list[Part]]":
    """Settings and parts; mistakes in them show here, before anything is loaded or written."""
    from specdiff.bench import paper, runner, smoke, suites
    from specdiff.bench.plan import Part, Settings, entries
    from specdiff.catalog import DEFAULT_MODEL

    digest = suites.check(values["suite"])
    if values["suite"] != paper.SUITE:
        settings = Settings(
            **values | {"model": values["model"] or DEFAULT_MODEL, "suite_sha256": digest}
        )
        own = Part(
            values["suite"].partition(":")[0],
            settings.model,
            settings.suite,
            entries(settings),
            settings.max_tokens,
        )
        runner.read(own, settings)
        return settings, [own]
    settings = Settings(**values)
    targets = {Path(settings.model).name: settings.model} if settings.model else dict(paper.TARGETS)
    if not settings.smoke:
        return settings, paper.parts(settings, targets, paper.DRAFTERS)
    targets, drafters = smoke.models(folder / "models")
    return settings, paper.parts(settings, targets, drafters, smoke.texts())


def _watch(
    settings: "Settings", parts: "list[Part]", journal: "Journal", folder: Path, notes: "Console"
) -> bool:
    """Measure behind a live table. Returns whether it was cut short."""
    from rich.live import Live

    from specdiff.bench import results, runner
    from specdiff.bench.live import Screen

    screen, written = Screen(), time.monotonic()
    try:
        # drawn between measurements only: a thread that draws would be measured too
        with Live(console=notes, auto_refresh=False, transient=True) as live:
            for event in runner.run(settings, parts, journal):
                if (
                    event.record is not None and time.monotonic() - written > PATIENCE
                ):  # the journal has it already
                    results.write(folder, results.fold(journal.records, finished=False))
                    written = time.monotonic()
                if notes.is_terminal:
                    live.update(screen.of(event, journal.records, notes.width), refresh=True)
                elif event.record is None:
                    notes.print(f"{event.part}: {event.title}", soft_wrap=True)
    except KeyboardInterrupt:
        return True
    return False


def _page(told: dict[str, Any], folder: Path, notes: "Console") -> None:
    """The report; the figures are safe without it."""
    from specdiff.bench import report

    try:
        written = report.write(folder, told)
    except MissingExtraError as error:
        notes.print(f"no report.html: {error}", soft_wrap=True)
    else:
        notes.print(f"report: {written}", soft_wrap=True)


def _tell(
    journal: "Journal", folder: Path, notes: "Console", *, as_json: bool, finished: bool
) -> None:
    """Write the results, print them, and end as they deserve: 130 if cut short, 1 if anything failed."""
    from specdiff.bench import results, table

    told = results.fold(journal.records, finished=finished)
    results.write(folder, told)
    wrong = results.problems(told)
    if as_json:
        terminal.print_json(results.summary(told) | {"out": str(folder), "problems": wrong})
    else:
        out = terminal.page(table.WIDE)
        for shown in table.whole(told, out.width):
            out.print(shown)
    for line in wrong:
        notes.print(f"problem: {line}", style="red", soft_wrap=True)
    notes.print(f"results: {folder / 'results.json'}", soft_wrap=True)
    _page(told, folder, notes)
    if not finished:
        notes.print("interrupted; to go on, repeat the command with --resume", soft_wrap=True)
        raise typer.Exit(130)
    if wrong:
        raise typer.Exit(1)
