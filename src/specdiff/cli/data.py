"""`specdiff data`: the target writes the corpus its drafters learn from."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params, terminal
from specdiff.cli.data_progress import lines, progress_bar
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.data.forecast import CorpusForecast
    from specdiff.data.generate import CorpusSettings
    from specdiff.data.ledger import CorpusSummary
    from specdiff.data.sources import Source
    from specdiff.text.lm import SpeculativeLM

TEMPERATURES = "1.0,0.7,0"
SHARES = "0.4,0.2,0.4"  # of TEMPERATURES


def data(
    out: Annotated[
        Path,
        typer.Option(
            help="Corpus folder; an interrupted run is resumed.", rich_help_panel="Output"
        ),
    ],
    model: params.Model = "smollm2-135m",
    drafter: Annotated[
        str,
        typer.Option(help="Changes the speed only; see generate.", rich_help_panel="Model"),
    ] = "none",
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    max_model_len: Annotated[
        int,
        typer.Option(help="Maximum tokens of prompt and answer.", rich_help_panel="Model"),
    ] = 1024,
    config: params.Config = None,
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
    from specdiff.data import sources
    from specdiff.data.corpus import check_folder
    from specdiff.devices import keep_freed_memory

    keep_freed_memory()
    check_folder(out)
    settings = _settings(seed, max_tokens, temperatures, shares)
    notes = terminal.notes(quiet=quiet)
    with terminal.status(notes, f"loading {model}", log=True):
        lm = specdiff.load(model, drafter, device=device, dtype=dtype, max_len=max_model_len)
    job = _Job(lm, out, tokens, batch, shard_tokens, notes)
    longest = lm.max_len if verbatim else lm.max_len - max_tokens
    begin = time.perf_counter()
    summary: CorpusSummary | CorpusForecast | None = None
    stored = 0
    try:
        if from_tokens:
            summary = job.import_rows(from_tokens)
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
                summary = job.pack(origin)
            elif dry_run:
                summary = job.forecast(origin, settings, features)
            else:
                summary = job.generate(origin, settings)
        if features and not dry_run:
            stored = job.features()
    except KeyboardInterrupt:
        notes.print(
            f"stopped; finished rows are in {out}. To resume, repeat the command.", soft_wrap=True
        )
        raise typer.Exit(130) from None
    fields: dict[str, Any] = {
        "out": str(out),
        "target": model,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    report = []
    if summary is not None:
        report = lines(out, summary)
        fields |= ({"dry_run": True} if dry_run else {}) | asdict(summary)
    if stored:
        report.append(f"final states of {stored} tokens are stored")
        fields["feature_tokens"] = stored
    notes.print("\n".join(report), soft_wrap=True)
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


@dataclass(frozen=True, slots=True)
class _Job:
    """A corpus folder to fill, and the console that shows progress."""

    lm: "SpeculativeLM"
    out: Path
    tokens: int
    rows: int | None
    shard_tokens: int
    notes: "Console"

    def forecast(
        self, source: "Source", settings: "CorpusSettings", features: bool
    ) -> "CorpusForecast":
        from specdiff.data.forecast import forecast

        with terminal.status(self.notes, "measuring", log=True):
            return forecast(
                self.lm, source, settings, tokens=self.tokens, rows=self.rows, features=features
            )

    def generate(self, source: "Source", settings: "CorpusSettings") -> "CorpusSummary":
        from specdiff.data.forecast import trial
        from specdiff.data.write import write_generated

        rows = self.rows
        if rows is None:
            title = "measuring how many rows at a time are fastest"
            with terminal.status(self.notes, title, log=True):
                rows = trial(self.lm, source, settings).rows
        with progress_bar(self.notes, f"writing, {rows} rows at a time") as report:
            return write_generated(
                self.lm,
                source,
                settings,
                self.out,
                tokens=self.tokens,
                rows=rows,
                shard_tokens=self.shard_tokens,
                report=report,
            )

    def import_rows(self, path: Path) -> "CorpusSummary":
        from specdiff.data.write import write_imported

        with progress_bar(self.notes, "importing") as report:
            return write_imported(
                self.lm, path, self.out, shard_tokens=self.shard_tokens, report=report
            )

    def pack(self, source: "Source") -> "CorpusSummary":
        from specdiff.data.sources import RecordSource
        from specdiff.data.write import write_packed

        if not isinstance(source, RecordSource):
            raise UsageError(
                "--verbatim stores texts as they are: "
                "name them with --source jsonl or text and --input, or with --dataset"
            )
        with progress_bar(self.notes, "packing") as report:
            return write_packed(
                self.lm,
                source,
                self.out,
                tokens=self.tokens,
                shard_tokens=self.shard_tokens,
                report=report,
            )

    def features(self) -> int:
        from specdiff.targets.causal import CausalTarget
        from specdiff.training import features

        assert isinstance(self.lm.target, CausalTarget)
        with progress_bar(self.notes, "final states") as report:
            return features.store(self.lm.target, self.out, report)
