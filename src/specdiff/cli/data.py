"""`specdiff data`: the target writes the corpus its drafters learn from."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params, terminal
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import CorpusError, StorageError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.data.generate import Settings, Written
    from specdiff.data.ledger import Ledger
    from specdiff.data.sources import Document, Source
    from specdiff.text.lm import SpeculativeLM

FIRST_SECONDS = 5.0  # to the first progress line where stderr is no terminal
REPORT_SECONDS = 60.0  # between the others


def data(
    out: Annotated[Path, typer.Option(help="Corpus folder; an interrupted run is resumed.")],
    model: params.Model = "smollm2-135m",
    tokens: Annotated[
        int, typer.Option(help="Tokens the corpus shall have, prompts included.")
    ] = 0,
    source: Annotated[
        str, typer.Option(help="self (the target asks itself), jsonl or text.")
    ] = "self",
    input_path: Annotated[
        Path | None,
        typer.Option("--input", help="The JSONL file; the text file, or folder of *.txt."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="cnn_dailymail, openwebtext, lm1b, or any Hugging Face data set."),
    ] = None,
    from_tokens: Annotated[
        Path | None, typer.Option(help="Import rows of a safetensors file instead of generating.")
    ] = None,
    verbatim: Annotated[
        bool,
        typer.Option("--verbatim", help="Store the texts themselves, packed; generate nothing."),
    ] = False,
    temperatures: Annotated[
        str, typer.Option(help="Of the answers, separated by commas; 0 is greedy.")
    ] = "1.0,0.7,0",
    shares: Annotated[
        str, typer.Option(help="Share of rows at each temperature (0.4,0.2,0.4; else equal ones).")
    ] = "",
    seed: Annotated[int, typer.Option(help="Same seed, same corpus.")] = 0,
    rows: Annotated[str, typer.Option(help="Texts written at a time, or auto: measured.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    text_tokens: Annotated[
        int, typer.Option(help="Tokens of a document that become its prompt.")
    ] = 64,
    shard_tokens: Annotated[int, typer.Option(help="Tokens per file.")] = 1 << 20,
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    config: params.Config = None,
    max_model_len: Annotated[
        int, typer.Option(help="Most tokens of prompt and answer together.")
    ] = 1024,
    drafter: Annotated[str, typer.Option(help="Changes the speed only; see generate.")] = "none",
    features: Annotated[
        bool,
        typer.Option(
            "--features", help="Store the target's final states too, for training on a CPU."
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at the first record that cannot be used, instead of dropping it."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be done and how long it would take; write nothing."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the closing summary as one JSON object.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Let the target write its own training corpus. Stop it any time; the same command resumes it.

    Example:  specdiff data --out corpus --tokens 2000000 --features
    """
    if tokens < 1 and not (from_tokens or features or verbatim):
        raise UsageError("say how many tokens to write: --tokens N")
    if shard_tokens < 1:
        raise UsageError(f"--shard-tokens must be at least 1, not {shard_tokens}")
    if rows != "auto" and not (rows.isdecimal() and int(rows)):
        raise UsageError(f"--rows must be a whole number of at least 1 or 'auto', not {rows!r}")
    quiet_libraries()
    import specdiff
    from specdiff.data import generate, memory, sources
    from specdiff.data.corpus import check_folder

    memory.keep_freed()
    check_folder(out)
    heat = _numbers("--temperatures", temperatures)
    spread = _numbers(
        "--shares",
        shares
        or (
            "0.4,0.2,0.4"
            if temperatures == "1.0,0.7,0"
            else ",".join([repr(1 / len(heat))] * len(heat))
        ),
    )
    settings = generate.Settings(seed, max_tokens, heat, spread)
    notes = terminal.notes(quiet=quiet)
    with terminal.status(notes, f"loading {model}", log=True):
        lm = specdiff.load(model, drafter, device=device, dtype=dtype, max_len=max_model_len)
    begin = time.perf_counter()
    summary: dict[str, Any] = {}
    try:
        if from_tokens:
            summary = _imported(lm, from_tokens, out, shard_tokens, notes)
        elif verbatim:
            summary = _packed(
                lm, source, input_path, dataset, out, tokens, shard_tokens, strict, notes
            )
        elif tokens:
            longest = lm.max_len - max_tokens
            origin = sources.source(
                lm,
                source,
                input_path,
                dataset,
                longest=longest,
                text_tokens=text_tokens,
                strict=strict,
            )
            generate.slots(lm, origin, settings)
            generate.first_prompt(origin)
            if dry_run:
                summary = _forecast(
                    lm, origin, settings, _plan(lm, origin, settings, rows, notes), tokens, features
                )
            else:
                count = (
                    int(_plan(lm, origin, settings, rows, notes)["rows_at_a_time"])
                    if rows == "auto"
                    else int(rows)
                )
                summary = _generated(lm, origin, settings, out, tokens, count, shard_tokens, notes)
        if features and not dry_run:
            summary |= _features(lm, out, notes)
    except KeyboardInterrupt:
        notes.print(
            f"stopped; what was finished is in {out}. To resume, repeat the command.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    summary = {
        "out": str(out),
        "target": model,
        "seconds": round(time.perf_counter() - begin, 2),
    } | summary
    notes.print(_summary(summary), soft_wrap=True)
    if as_json:
        terminal.print_json(summary)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be numbers separated by commas, not {text!r}") from None


def _plan(
    lm: "SpeculativeLM", source: "Source", settings: "Settings", rows: str, notes: "Console"
) -> dict[str, float]:
    from specdiff.data.generate import trial

    with terminal.status(
        notes,
        "measuring how many rows at a time are fastest" if rows == "auto" else "measuring",
        log=True,
    ):
        best, rate = trial(lm, source, settings, None if rows == "auto" else int(rows))
    return {"rows_at_a_time": best, "trial_tokens_per_second": round(rate, 1)}


def _forecast(
    lm: "SpeculativeLM",
    source: "Source",
    settings: "Settings",
    plan: dict[str, float],
    tokens: int,
    features: bool,
) -> dict[str, Any]:
    from specdiff.data.generate import about

    disk = tokens * (2 if lm.target.info.vocab_size <= 1 << 16 else 4)
    disk += tokens * (2 * lm.target.info.hidden_size + 4) if features else 0
    forecast = {
        "dry_run": True,
        "tokens": tokens,
        "disk_bytes": disk,
        "estimated_seconds": round(tokens / plan["trial_tokens_per_second"]),
    }
    return forecast | plan | {"about": about(lm, source, settings)}


def _generated(
    lm: "SpeculativeLM",
    source: "Source",
    settings: "Settings",
    out: Path,
    tokens: int,
    rows: int,
    shard_tokens: int,
    notes: "Console",
) -> dict[str, Any]:
    from specdiff.data.corpus import CorpusWriter
    from specdiff.data.generate import about, generate

    with CorpusWriter(
        out,
        about(lm, source, settings),
        vocab_size=lm.target.info.vocab_size,
        shard_tokens=shard_tokens,
    ) as writer:
        tally = _tally(writer)
        before, begin = writer.tokens, time.perf_counter()
        unsettled = 0

        def steps(work: "Iterator[Written]") -> Iterator[int]:
            nonlocal unsettled
            for written in work:
                unsettled = written.unsettled
                yield written.tokens

        def note() -> str:
            return f"{unsettled} tokens in unfinished rows, {writer.rows} rows stored, {_dropped(tally)} dropped"

        work = generate(lm, source, tally, settings, tokens=tokens, rows=rows)
        generated = _watched(
            steps(work),
            lambda: writer.tokens,
            tokens,
            notes,
            f"writing, {rows} rows at a time",
            note,
        )
        seconds = time.perf_counter() - begin
        speed = {
            "generated_tokens": generated,
            "tokens_per_second": round(generated / max(seconds, 1e-9), 1),
            "rows_at_a_time": rows,
        }
        return (
            tally.close()
            | {"new_tokens": writer.tokens - before, "source_exhausted": writer.tokens < tokens}
            | speed
        )


def _imported(
    lm: "SpeculativeLM", path: Path, out: Path, shard_tokens: int, notes: "Console"
) -> dict[str, Any]:
    from specdiff.data import generate, packing
    from specdiff.data.corpus import CorpusWriter

    vocab = lm.target.info.vocab_size
    rows = packing.read_rows(path, vocab)
    about = packing.about(path, generate.identity(lm.target.info.name))
    with CorpusWriter(out, about, vocab_size=vocab, shard_tokens=shard_tokens) as writer:
        tally = _tally(writer)
        total = sum(len(r.tokens) for r in rows)
        _watched(
            packing.add_rows(rows, tally),
            lambda: writer.tokens,
            total,
            notes,
            "importing",
            lambda: f"{writer.rows} rows",
        )
        return tally.close()


def _packed(
    lm: "SpeculativeLM",
    source: str,
    path: Path | None,
    dataset: str | None,
    out: Path,
    tokens: int,
    shard_tokens: int,
    strict: bool,
    notes: "Console",
) -> dict[str, Any]:
    from specdiff.data import generate, packing, sources
    from specdiff.data.corpus import PACKED, CorpusWriter

    origin = sources.source(lm, source, path, dataset, longest=lm.max_len, strict=strict)
    if not isinstance(origin, sources.RecordSource):
        raise UsageError(
            "--verbatim stores texts as they are: name them with --source jsonl or text and --input, or with --dataset"
        )
    vocab = lm.target.info.vocab_size
    about = generate.identity(lm.target.info.name) | {
        "source": origin.about,
        "row_tokens": lm.max_len,
        PACKED: True,
    }
    with CorpusWriter(out, about, vocab_size=vocab, shard_tokens=shard_tokens) as writer:
        tally = _tally(writer)
        end = (
            lm.end_ids[0] if lm.end_ids else None
        )  # the lowest is the end of a text; ends of turns came later
        rows = packing.packed(_usable(origin.documents(), tally), end, lm.max_len)
        wanted = takewhile(lambda _: not tokens or writer.tokens < tokens, rows)
        note = lambda: f"{writer.rows} rows, {_dropped(tally)} dropped"  # noqa: E731
        _watched(
            packing.add_rows(wanted, tally), lambda: writer.tokens, tokens, notes, "packing", note
        )
        return tally.close()


def _usable(documents: "Iterator[Document]", tally: "Ledger") -> Iterator[Sequence[int]]:
    for document in documents:
        if document.refused:
            tally.drop(document.key, document.refused, document.detail)
        else:
            yield document.ids


def _tally(writer: Any) -> "Ledger":
    """The tally of a corpus, whose shards are proved unchanged first."""
    from specdiff.data.corpus import Corpus
    from specdiff.data.ledger import Ledger

    corpus = Corpus(writer.folder)
    corpus.verify()
    return Ledger(writer, corpus.columns())


def _features(lm: "SpeculativeLM", out: Path, notes: "Console") -> dict[str, Any]:
    from specdiff import files
    from specdiff.data import generate
    from specdiff.data.corpus import Corpus
    from specdiff.training.teacher import precompute
    from specdiff.weights import fingerprint

    corpus = Corpus(out)
    writer, model = corpus.manifest["about"].get("target"), lm.target.info.name
    if corpus.manifest["vocab_size"] != lm.target.info.vocab_size:
        raise CorpusError(
            f"{out} was written by {writer}, of another vocabulary than {model}; give --model {writer}"
        )
    corpus.verify()
    identity = fingerprint(generate.model_files(model))
    at = 0

    def steps() -> Iterator[int]:
        nonlocal at
        for done, _ in precompute(lm.target.model, corpus, identity):  # type: ignore[attr-defined]
            step, at = done - at, done
            yield step

    try:
        with files.lock(out):
            _watched(steps(), lambda: at, corpus.tokens, notes, "final states", str)
    except StorageError as error:
        raise StorageError(
            f"{error}; finished shards are kept: make room, then repeat the command to resume"
        ) from error
    return {"feature_tokens": corpus.tokens}


def _watched(
    work: Iterator[int],
    done: Callable[[], int],
    total: int,
    notes: "Console",
    title: str,
    note: Callable[[], str],
) -> int:
    """Run `work`, which yields tokens, behind a progress bar; returns their sum.

    Where stderr is no terminal: a line at once, one after the first seconds, then one a minute.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = 0
    begin = time.perf_counter()
    due = begin + FIRST_SECONDS
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    if not notes.is_terminal:
        notes.print(f"{title}: {done()} of {total or 'all'} tokens", soft_wrap=True)
    with Progress(
        *columns,
        console=notes,
        disable=not notes.is_terminal,
        transient=True,
        speed_estimate_period=300,
    ) as bar:
        task = bar.add_task(title, total=total or None, completed=done(), note="")
        for tokens in work:
            count += tokens
            now = time.perf_counter()
            text = ", ".join(filter(None, [f"{count / max(now - begin, 1e-9):.0f} tok/s", note()]))
            bar.update(task, completed=min(total or done(), done()), note=text)
            if not notes.is_terminal and now >= due:
                due = now + REPORT_SECONDS
                notes.print(f"{title}: {done()} of {total or 'all'} tokens, {text}", soft_wrap=True)
    return count


def _dropped(tally: "Ledger") -> int:
    return sum(len(keys) for keys in tally.dropped.values())


def _summary(s: dict[str, Any]) -> str:
    """The summary for people."""
    if s.get("dry_run"):
        return (
            f"would write {s['tokens']} tokens ({s['disk_bytes'] / 1e6:.0f} MB) to {s['out']} "
            f"in about {s['estimated_seconds'] / 60:.0f} min: "
            f"{s['rows_at_a_time']} rows at a time give {s['trial_tokens_per_second']} tok/s"
        )
    lines = []
    if "rows" in s:
        dropped = ", ".join(f"{n} {why}" for why, n in s["dropped"].items()) or "none"
        lines.append(
            f"{s['out']}: {s['tokens']} tokens in {s['rows']} rows, {s['shards']} shards; dropped: {dropped}"
        )
        lines += [f"first {why}: {detail}" for why, detail in s["first_dropped"].items()]
    if "generated_tokens" in s:
        lines.append(
            f"generated {s['generated_tokens']} tokens at {s['tokens_per_second']} tok/s, {s['rows_at_a_time']} rows at a time"
        )
    if s.get("source_exhausted"):
        lines.append(
            "the source gave out before --tokens was reached; give more prompts, or use --source self"
        )
    for name, law in s.get("by_temperature", {}).items():
        lines.append(
            f"temperature {name}: {law['rows']} rows, {100 * law['repeated_share']:.1f} % of answer tokens in repeated 8-grams"
        )
    if "feature_tokens" in s:
        lines.append(f"final states of {s['feature_tokens']} tokens are stored")
    return "\n".join(lines)
