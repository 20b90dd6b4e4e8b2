"""Progress and closing summary of `specdiff data`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.data.forecast import CorpusForecast
    from specdiff.data.ledger import CorpusSummary
    from specdiff.data.write import CorpusProgress, Report

FIRST_SECONDS = 5.0  # between lines before the first token, where stderr is no terminal
REPORT_SECONDS = 60.0  # between later lines


@contextmanager
def progress_bar(notes: "Console", title: str) -> "Iterator[Report]":
    """A progress bar.

    Where stderr is no terminal: a line at once, one with the first prompt, one every few seconds
    until tokens come, then one a minute.
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
    reading = False
    with Progress(
        *columns,
        console=notes,
        disable=not notes.is_terminal,
        transient=True,
        speed_estimate_period=300,
    ) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(progress: "CorpusProgress") -> None:
            nonlocal begin, due, reading
            now = time.perf_counter()
            begin = begin or now
            note = _note(progress, now - begin)
            completed = min(progress.total or progress.tokens, progress.tokens)
            bar.update(task, total=progress.total or None, completed=completed, note=note)
            first_prompt = bool(progress.prompts) and not reading
            reading = reading or first_prompt
            if not notes.is_terminal and (now >= due or first_prompt):
                later = due and progress.processed
                due = now + (REPORT_SECONDS if later else FIRST_SECONDS)
                state = f"{title}: {progress.tokens} of {progress.total or 'all'} tokens"
                notes.print(", ".join(filter(None, (state, note))), soft_wrap=True)

        yield report


def _note(progress: "CorpusProgress", seconds: float) -> str:
    """Speed and counts; before the first token, the number of prompts that are being read."""
    if not progress.processed:
        return f"reading prompts, {progress.prompts} so far" if progress.prompts else ""
    parts = [f"{progress.processed / max(seconds, 1e-9):.0f} tok/s"]
    if progress.unsettled is not None:
        parts.append(f"{progress.unsettled} tokens in unfinished rows")
    if progress.rows is not None:
        parts.append(f"{progress.rows} rows stored, {progress.dropped} dropped")
    return ", ".join(parts)


def lines(out: Path, summary: "CorpusSummary | CorpusForecast") -> list[str]:
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
