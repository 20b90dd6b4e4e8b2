"""`specdiff bench`: speed of drafters on this machine, against the alternatives."""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import bench_paper, params, terminal
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import MissingExtraError, UsageError
from specdiff.unicode import valid

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.bench.journal import Journal
    from specdiff.bench.results import BenchResults
    from specdiff.bench.settings import BenchSettings, Part

RUN = "Run"  # a panel of --help
PAPER = "Suite paper"
SUITES = "embedded (default), paper, or KIND:FILE, such as jsonl:FILE."
SAVE_SECONDS = 10  # between two writes of the files while measuring
QUICK: dict[str, Any] = {
    "prompts": 5,
    "max_tokens": 24,
    "batch": (1,),
    "gammas": (2, 4),
    "steps": (1,),
    "contexts": (256,),
    "widths": (1, 2, 4, 8, 16),
    "sweeps": False,
    "sample": 2,
    "tuning_tokens": 16,
    "tune_each": False,
}
SMOKE: dict[str, Any] = {
    "max_tokens": 8,
    "prompts": 2,
    "gammas": (2, 40),
    "steps": (1, 2),
    "batch": (1, 2),
    "contexts": (16,),
    "widths": (1, 2, 8),
}


def bench(
    ctx: typer.Context,
    suite: Annotated[str, params.option(SUITES, panel=RUN, show_default=False)] = "embedded",
    model: params.OptionalModel = None,
    drafter: Annotated[
        list[str] | None,
        params.option("Another drafter, as SPEC or NAME=SPEC; repeatable.", panel=params.DRAFTING),
    ] = None,
    only: Annotated[
        str, params.option("Baselines NAME,... besides hf and ours-vanilla.", panel=params.DRAFTING)
    ] = "",
    peers: Annotated[
        str,
        params.option("Another engine: llama.cpp.", "--baselines", panel=params.DRAFTING),
    ] = "",
    quick: Annotated[
        bool, params.flag("A table in minutes: 5 prompts, 24 tokens.", "--quick", panel=RUN)
    ] = False,
    temperatures: Annotated[
        str, params.option("T,T,... (default: 0,1; paper: 1).", panel=RUN)
    ] = "",
    max_tokens: Annotated[
        int | None, params.option("Maximum tokens of an answer (default: 64).", panel=RUN)
    ] = None,
    prompts: Annotated[
        int | None, params.option("Number of prompts, over all tasks (default: all).", panel=RUN)
    ] = None,
    per_task: Annotated[
        int | None, params.option("Number of prompts of each task.", panel=RUN)
    ] = None,
    times: Annotated[
        int | None, params.option("Turns per prompt; at least 5 turns in all.", panel=RUN)
    ] = None,
    batch: Annotated[
        str, params.option("Batch sizes N,N,... (default: 1,2,4,8,16,32).", panel=RUN)
    ] = "",
    gammas: Annotated[
        str,
        params.option(
            "Draft lengths to tune and sweep (default: 2,4,8,16).", panel=params.DRAFTING
        ),
    ] = "",
    steps: Annotated[
        str,
        params.option("Network passes to tune and sweep (default: 1,2,4).", panel=params.DRAFTING),
    ] = "",
    draft_temperatures: Annotated[
        str,
        params.option(
            "Also each network at these draft temperatures T,T,...", panel=params.DRAFTING
        ),
    ] = "",
    curves: Annotated[
        bool,
        params.flag("Time scoring 1, 2, ..., 32 tokens, every number.", "--curves", panel=RUN),
    ] = False,
    verifier: Annotated[
        str, params.option("token, block, match or match-gumbel.", panel=params.DRAFTING)
    ] = "token",
    draft_len: Annotated[
        int | None,
        params.option("One draft length for all (default: tuned for each).", panel=params.DRAFTING),
    ] = None,
    seed: Annotated[int, params.option("Seed of all sampling.", panel=RUN)] = 0,
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    quantize: params.Quantize = "auto",
    threads: params.Threads = "auto",
    compile: Annotated[
        bool, params.flag("Measure compiled layers.", "--compile", panel=params.MODEL)
    ] = False,
    config: params.Config = None,
    out: Annotated[
        Path | None,
        params.option("Folder of the results (default: bench-SUITE).", panel=params.OUTPUT),
    ] = None,
    resume: Annotated[
        bool, params.flag("Resume the run in --out, with the same settings.", "--resume", panel=RUN)
    ] = False,
    smoke: Annotated[
        bool, params.flag("Suite paper on tiny random models.", "--smoke", panel=PAPER)
    ] = False,
    scale: Annotated[
        str, params.option("paper (default) or embedded.", panel=PAPER, show_default=False)
    ] = "paper",
    texts: Annotated[
        list[str] | None,
        params.option("NAME=FILE of a data set's prompts; repeatable.", panel=PAPER),
    ] = None,
    finetune: Annotated[
        list[str] | None,
        params.option("NAME=FILE to finetune on, as the paper does; repeatable.", panel=PAPER),
    ] = None,
    finetune_steps: Annotated[
        int, params.option("Steps of target and drafters each.", panel=PAPER)
    ] = 200,
    as_json: Annotated[
        bool, params.flag("Print a summary as one JSON object.", "--json", panel=params.OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, params.flag("No live table and no notes.", "-q", "--quiet", panel=params.OUTPUT)
    ] = False,
) -> None:
    """Measure drafters against plain decoding and transformers' own speculation, interleaved in
    one process.

    It can be stopped at any time: --resume continues from what was measured.

    Example:  specdiff bench --quick --drafter mine=./my-drafter
    """
    if ctx.invoked_subcommand is not None:
        return _refuse_options(ctx)
    if peers and suite == "paper":
        raise UsageError("--baselines measures other engines on one target, not on --suite paper")
    if smoke and suite != "paper":
        raise UsageError(f"--smoke is for --suite paper; the suite {suite!r} runs on real models")
    if per_task is not None and suite == "paper":
        raise UsageError("--per-task is for suites with tasks; --suite paper takes --prompts")
    if suite != "paper" and (scale != "paper" or texts or finetune):
        raise UsageError(f"--scale, --texts and --finetune are for --suite paper, not {suite!r}")
    options: dict[str, Any] = {
        "temperatures": _numbers("--temperatures", temperatures, float),
        "batch": _numbers("--batch", batch, int),
        "gammas": _numbers("--gammas", gammas, int),
        "steps": _numbers("--steps", steps, int),
        "draft_temperatures": _numbers("--draft-temperatures", draft_temperatures, float),
        "max_tokens": max_tokens,
        "prompts": prompts,
        "per_task": per_task,
        "times": times,
    }
    fixed = {
        "suite": suite,
        "model": model or "",
        "drafters": tuple(drafter or ()),
        "only": tuple(filter(None, only.split(","))),
        "peers": tuple(filter(None, peers.split(","))),
        "verifier": verifier,
        "draft_len": draft_len,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "threads": params.thread_count(threads),
        "curves": curves,
        "compile": compile,
        "smoke": smoke,
        "scale": scale,
        "texts": tuple(texts or ()),
        "finetune": tuple(finetune or ()),
        "finetune_steps": finetune_steps,
    }
    base = bench_paper.defaults(scale) if suite == "paper" else {}
    base |= (QUICK if quick else {}) | (SMOKE if smoke else {})
    quiet_libraries()
    kind = "-smoke" if smoke else "-embedded" * (scale == "embedded")
    folder = out or Path(f"bench-{suite.partition(':')[0]}{kind}")
    values = {name: value for name, value in options.items() if value is not None}
    settings, parts = _prepare(base | values | fixed, folder)
    from specdiff import files
    from specdiff.bench.journal import Journal

    about = {"suite": suite, "command": valid(shlex.join(["specdiff", *sys.argv[1:]]))}
    notes = terminal.notes(quiet=quiet)
    lock = files.lock(folder)
    try:
        journal = Journal(folder, asdict(settings), about, resume=resume)
        if settings.finetune:
            _finetune(settings, folder, notes)
        interrupted = _measure(settings, parts, journal, folder, notes)
        _finish(journal, folder, notes, as_json=as_json, finished=not interrupted)
    finally:
        lock.release()


def _refuse_options(ctx: typer.Context) -> None:
    """The subcommands measure nothing, so options of measuring cannot precede them."""
    names = [n for n in ctx.params if str(ctx.get_parameter_source(n)).endswith("COMMANDLINE")]
    if names:
        flag = "--" + names[0].removeprefix("as_").replace("_", "-")
        raise UsageError(
            f"{flag} is for measuring; leave it out, "
            f"or put it after {ctx.invoked_subcommand} if that has it"
        )


def _numbers(flag: str, text: str, kind: Callable[[str], float]) -> tuple[float, ...] | None:
    try:
        return tuple(kind(part) for part in text.split(",")) if text else None
    except ValueError:
        raise UsageError(f"{flag} must be numbers such as 1,2,4, not {text!r}") from None


def _prepare(values: dict[str, Any], folder: Path) -> "tuple[BenchSettings, list[Part]]":
    """Settings and parts; mistakes in them show before anything is loaded or written."""
    from specdiff.bench import llama_cpp, paper, runner, suites
    from specdiff.bench.settings import BenchSettings, Part, baselines
    from specdiff.catalog import DEFAULT_MODEL

    digest = suites.check(values["suite"])
    if values["suite"] == paper.SUITE:
        return bench_paper.prepare(values, folder)
    model = values["model"] or DEFAULT_MODEL
    settings = BenchSettings(**values | {"model": model, "suite_sha256": digest})
    if settings.peers:
        llama_cpp.check(model)
    own = Part(
        values["suite"].partition(":")[0],
        settings.model,
        settings.suite,
        baselines(settings),
        settings.max_tokens,
    )
    runner.read(own, settings)
    return settings, [own]


def _finetune(settings: "BenchSettings", folder: Path, notes: "Console") -> None:
    try:
        bench_paper.finetune(settings, folder, notes)
    except KeyboardInterrupt:
        notes.print("interrupted; to resume, repeat the command with --resume", soft_wrap=True)
        raise typer.Exit(130) from None


def _measure(
    settings: "BenchSettings",
    parts: "list[Part]",
    journal: "Journal",
    folder: Path,
    notes: "Console",
) -> bool:
    """Measure under a live table. Returns whether it was interrupted."""
    from rich.live import Live

    from specdiff.bench import runner
    from specdiff.bench.table import Screen

    screen = Screen()
    saved = time.monotonic()
    try:
        # drawn between measurements only: a thread that draws would be measured too
        with Live(console=notes, auto_refresh=False, transient=True) as live:
            for event in runner.run(settings, parts, journal):
                # the journal has the record already
                if event.record is not None and time.monotonic() - saved > SAVE_SECONDS:
                    _save(journal, folder, finished=False)
                    saved = time.monotonic()
                if notes.is_terminal:
                    live.update(screen.render(event, journal.records, notes.width), refresh=True)
                elif event.record is None:
                    notes.print(f"{event.part}: {event.title}", soft_wrap=True)
    except KeyboardInterrupt:
        return True
    return False


def _save(journal: "Journal", folder: Path, *, finished: bool) -> "BenchResults":
    """Write results.json and results.csv."""
    from specdiff.bench import paper, results, table

    run = paper.with_tables(results.fold(journal.records, finished=finished))
    results.write(folder, run)
    table.write_csv(folder, run)
    return run


def _finish(
    journal: "Journal", folder: Path, notes: "Console", *, as_json: bool, finished: bool
) -> None:
    """Write and print the results; exit code 130 if interrupted, 1 if anything failed."""
    from specdiff.bench import results, table

    run = _save(journal, folder, finished=finished)
    problems = results.problems(run)
    if as_json:
        terminal.print_json(table.summary(run) | {"out": str(folder), "problems": problems})
    else:
        out = terminal.page(table.WIDE)
        for renderable in table.whole(run, out.width):
            out.print(renderable)
    for line in problems:
        notes.print(f"problem: {line}", style="red", soft_wrap=True)
    notes.print(f"results: {folder / 'results.json'}", soft_wrap=True)
    _write_report(run, folder, notes)
    if not finished:
        notes.print("interrupted; to resume, repeat the command with --resume", soft_wrap=True)
        raise typer.Exit(130)
    if problems:
        raise typer.Exit(1)


def _write_report(run: "BenchResults", folder: Path, notes: "Console") -> None:
    """Write the page; the results do not depend on it."""
    from specdiff.bench import report

    try:
        path = report.write(folder, run)
    except MissingExtraError as error:
        notes.print(f"no report.html: {error}", soft_wrap=True)
    else:
        notes.print(f"report: {path}", soft_wrap=True)
