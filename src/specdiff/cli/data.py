"""`specdiff data`: the target writes the corpus its drafters learn from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import terminal
from specdiff.cli.options import quiet_libraries
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.data.forecast import CorpusForecast
    from specdiff.data.generate import CorpusSettings
    from specdiff.data.ledger import CorpusSummary
    from specdiff.data.sources import Source
    from specdiff.data.write import CorpusProgress, Report
    from specdiff.text.lm import SpeculativeLM

FIRST_SECONDS = 5.0  # until the second line of progress where stderr is no terminal
REPORT_SECONDS = 60.0  # between later lines
TEMPERATURES = "1.0,0.7,0"
SHARES = "0.4,0.2,0.4"  # of TEMPERATURES


def data(
    out: Annotated[
        Path,
        typer.Option(
            help="Corpus folder; an interrupted run is resumed.", rich_help_panel="Output"
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="Hub id, folder, file.gguf or built-in name.", rich_help_panel="Model"),
    ] = "smollm2-135m",
    drafter: Annotated[
        str,
        typer.Option(help="Changes the speed only; see generate.", rich_help_panel="Model"),
    ] = "none",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, ...", rich_help_panel="Model")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel="Model")
    ] = "auto",
    max_model_len: Annotated[
        int,
        typer.Option(help="Most tokens of prompt and answer together.", rich_help_panel="Model"),
    ] = 1024,
    tokens: Annotated[
        int,
        typer.Option(help="Tokens of the corpus, prompts included.", rich_help_panel="Data"),
    ] = 0,
    source: Annotated[
        str,
        typer.Option(
            help="self (the target writes the questions too), jsonl or text.",
            rich_help_panel="Data",
        ),
    ] = "self",
    input_path: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="The JSONL file; the text file, or folder of *.txt.",
            rich_help_panel="Data",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="cnn_dailymail, openwebtext, lm1b, or any Hugging Face data set.",
            rich_help_panel="Data",
        ),
    ] = None,
    from_tokens: Annotated[
        Path | None,
        typer.Option(
            help="Import rows of a safetensors file instead of generating.",
            rich_help_panel="Data",
        ),
    ] = None,
    verbatim: Annotated[
        bool,
        typer.Option(
            "--verbatim",
            help="Store the texts themselves, packed; generate nothing.",
            rich_help_panel="Data",
        ),
    ] = False,
    temperatures: Annotated[
        str,
        typer.Option(
            help="Of the answers, separated by commas; 0 is greedy.", rich_help_panel="Data"
        ),
    ] = TEMPERATURES,
    shares: Annotated[
        str,
        typer.Option(
            help="Share of rows at each temperature (default: 0.4,0.2,0.4, or equal shares).",
            rich_help_panel="Data",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Same seed, same corpus.", rich_help_panel="Data")] = 0,
    rows: Annotated[
        str,
        typer.Option(
            help="Texts written at a time, or auto: the fastest number.", rich_help_panel="Data"
        ),
    ] = "auto",
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer.", rich_help_panel="Data")
    ] = 256,
    text_tokens: Annotated[
        int,
        typer.Option(help="Tokens of a document that become its prompt.", rich_help_panel="Data"),
    ] = 64,
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            help="Store the target's final states too, for training on a CPU.",
            rich_help_panel="Data",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at the first unusable record instead of dropping it.",
            rich_help_panel="Data",
        ),
    ] = False,
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens per file.", rich_help_panel="Output")
    ] = 1 << 20,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate time and disk space; write nothing.",
            rich_help_panel="Output",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the closing summary as one JSON object.", rich_help_panel="Output"
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Let the target write its own training corpus. Stop any time; the same command resumes it.

    Example:  specdiff data --out corpus --tokens 2000000 --features
    """
    if tokens < 1 and not (from_tokens or features or verbatim):
        raise UsageError("say how many tokens to write: --tokens N")
    if dry_run and (tokens < 1 or from_tokens or verbatim):
        raise UsageError(
            "--dry-run measures how fast the target generates; "
            "give --tokens N, and neither --from-tokens nor --verbatim"
        )
    if shard_tokens < 1:
        raise UsageError(f"--shard-tokens must be at least 1, not {shard_tokens}")
    batch = _batch(rows)
    quiet_libraries()
    import specdiff
    from specdiff.data import sources, write
    from specdiff.data.corpus import check_folder
    from specdiff.devices import keep_freed_memory

    keep_freed_memory()
    check_folder(out)
    settings = _settings(seed, max_tokens, temperatures, shares)
    notes = terminal.notes(quiet=quiet)
    with terminal.status(notes, f"loading {model}", log=True):
        lm = specdiff.load(model, drafter, device=device, dtype=dtype, max_len=max_model_len)
    longest = lm.max_len if verbatim else lm.max_len - max_tokens
    begin = time.perf_counter()
    summary: CorpusSummary | CorpusForecast | None = None
    stored = 0
    try:
        if from_tokens:
            with _progress(notes, "importing") as report:
                summary = write.write_imported(
                    lm, from_tokens, out, shard_tokens=shard_tokens, report=report
                )
        elif verbatim or tokens:
            origin = sources.source(
                lm,
                source,
                input_path,
                dataset,
                longest=longest,
                text_tokens=text_tokens,
                strict=strict,
            )
            if verbatim:
                summary = _pack(lm, origin, out, tokens, shard_tokens, notes)
            elif dry_run:
                summary = _forecast(lm, origin, settings, tokens, batch, features, notes)
            else:
                summary = _generate(lm, origin, settings, out, tokens, batch, shard_tokens, notes)
        if features and not dry_run:
            stored = _features(lm, out, notes)
    except KeyboardInterrupt:
        notes.print(
            f"stopped; finished rows are in {out}. To resume, repeat the command.", soft_wrap=True
        )
        raise typer.Exit(130) from None
    seconds = round(time.perf_counter() - begin, 2)
    lines = [] if summary is None else _lines(out, summary)
    fields: dict[str, Any] = {"out": str(out), "target": model, "seconds": seconds}
    if summary is not None:
        fields |= ({"dry_run": True} if dry_run else {}) | asdict(summary)
    if stored:
        lines.append(f"final states of {stored} tokens are stored")
        fields["feature_tokens"] = stored
    notes.print("\n".join(lines), soft_wrap=True)
    if as_json:
        terminal.print_json(fields)


def _batch(rows: str) -> int | None:
    """--rows as a number; None for auto."""
    if rows == "auto":
        return None
    if not rows.isdecimal() or not int(rows):
        raise UsageError(f"--rows must be a whole number of at least 1 or 'auto', not {rows!r}")
    return int(rows)


def _settings(seed: int, max_tokens: int, temperatures: str, shares: str) -> "CorpusSettings":
    from specdiff.data.generate import CorpusSettings

    values = _numbers("--temperatures", temperatures)
    if not shares and temperatures == TEMPERATURES:
        shares = SHARES
    parts = _numbers("--shares", shares) if shares else (1 / len(values),) * len(values)
    return CorpusSettings(seed, max_tokens, values, parts)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be numbers separated by commas, not {text!r}") from None


def _forecast(
    lm: "SpeculativeLM",
    source: "Source",
    settings: "CorpusSettings",
    tokens: int,
    rows: int | None,
    features: bool,
    notes: "Console",
) -> "CorpusForecast":
    from specdiff.data.forecast import forecast

    with terminal.status(notes, "measuring", log=True):
        return forecast(lm, source, settings, tokens=tokens, rows=rows, features=features)


def _generate(
    lm: "SpeculativeLM",
    source: "Source",
    settings: "CorpusSettings",
    out: Path,
    tokens: int,
    rows: int | None,
    shard_tokens: int,
    notes: "Console",
) -> "CorpusSummary":
    from specdiff.data.forecast import trial
    from specdiff.data.write import write_generated

    if rows is None:
        with terminal.status(notes, "measuring how many rows at a time are fastest", log=True):
            rows = trial(lm, source, settings).rows
    with _progress(notes, f"writing, {rows} rows at a time") as report:
        return write_generated(
            lm,
            source,
            settings,
            out,
            tokens=tokens,
            rows=rows,
            shard_tokens=shard_tokens,
            report=report,
        )


def _pack(
    lm: "SpeculativeLM",
    source: "Source",
    out: Path,
    tokens: int,
    shard_tokens: int,
    notes: "Console",
) -> "CorpusSummary":
    from specdiff.data.sources import RecordSource
    from specdiff.data.write import write_packed

    if not isinstance(source, RecordSource):
        raise UsageError(
            "--verbatim stores texts as they are: "
            "name them with --source jsonl or text and --input, or with --dataset"
        )
    with _progress(notes, "packing") as report:
        return write_packed(
            lm, source, out, tokens=tokens, shard_tokens=shard_tokens, report=report
        )


def _features(lm: "SpeculativeLM", out: Path, notes: "Console") -> int:
    from specdiff.targets.causal import CausalTarget
    from specdiff.training import features

    assert isinstance(lm.target, CausalTarget)
    with _progress(notes, "final states") as report:
        return features.store(lm.target, out, report)


@contextmanager
def _progress(notes: "Console", title: str) -> "Iterator[Report]":
    """A progress bar.

    Where stderr is no terminal: a line at once, one after the first seconds, then one a minute.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    begin = 0.0
    due = 0.0
    with Progress(
        *columns,
        console=notes,
        disable=not notes.is_terminal,
        transient=True,
        speed_estimate_period=300,
    ) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(progress: "CorpusProgress") -> None:
            nonlocal begin, due
            now = time.perf_counter()
            begin = begin or now
            note = _note(progress, now - begin)
            completed = min(progress.total or progress.tokens, progress.tokens)
            bar.update(task, total=progress.total or None, completed=completed, note=note)
            if not notes.is_terminal and now >= due:
                due = now + (REPORT_SECONDS if due else FIRST_SECONDS)
                state = f"{title}: {progress.tokens} of {progress.total or 'all'} tokens"
                notes.print(", ".join(filter(None, (state, note))), soft_wrap=True)

        yield report


def _note(progress: "CorpusProgress", seconds: float) -> str:
    """Speed and counts; empty before the first token."""
    if not progress.processed:
        return ""
    parts = [f"{progress.processed / max(seconds, 1e-9):.0f} tok/s"]
    if progress.unsettled is not None:
        parts.append(f"{progress.unsettled} tokens in unfinished rows")
    if progress.rows is not None:
        parts.append(f"{progress.rows} rows stored, {progress.dropped} dropped")
    return ", ".join(parts)


def _lines(out: Path, summary: "CorpusSummary | CorpusForecast") -> list[str]:
    """The closing summary in words."""
    from specdiff.data.forecast import CorpusForecast
    from specdiff.data.write import GenerationSummary

    if isinstance(summary, CorpusForecast):
        return [
            f"would write {summary.tokens} tokens ({summary.disk_bytes / 1e6:.0f} MB) to {out} "
            f"in about {summary.estimated_seconds / 60:.0f} min: "
            f"{summary.rows_at_a_time} rows at a time give "
            f"{summary.trial_tokens_per_second} tok/s"
        ]
    dropped = ", ".join(f"{n} {reason}" for reason, n in summary.dropped.items()) or "none"
    lines = [
        f"{out}: {summary.tokens} tokens in {summary.rows} rows, {summary.shards} shards; "
        f"dropped: {dropped}"
    ]
    lines += [f"first {reason}: {detail}" for reason, detail in summary.first_dropped.items()]
    if isinstance(summary, GenerationSummary):
        lines.append(
            f"generated {summary.generated_tokens} tokens at {summary.tokens_per_second} tok/s, "
            f"{summary.rows_at_a_time} rows at a time"
        )
        if summary.source_exhausted:
            lines.append(
                "the source was exhausted before --tokens was reached; "
                "give more prompts, or use --source self"
            )
    for temperature, counts in summary.by_temperature.items():
        lines.append(
            f"temperature {temperature}: {counts['rows']} rows, "
            f"{100 * counts['repeated_share']:.1f} % of answer tokens in repeated 8-grams"
        )
    return lines
