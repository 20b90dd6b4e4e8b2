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

DATA = "Data"  # a panel of --help
TEMPERATURES = "1.0,0.7,0"
SHARES = "0.4,0.2,0.4"  # of TEMPERATURES


def data(
    out: Annotated[
        Path, params.option("Corpus folder; an interrupted run is resumed.", panel=params.OUTPUT)
    ],
    model: params.Model = "smollm2-135m",
    drafter: Annotated[
        str, params.option("Changes the speed only; see generate.", panel=params.MODEL)
    ] = "none",
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    quantize: params.Quantize = "auto",
    threads: params.Threads = "auto",
    max_model_len: Annotated[
        int, params.option("Maximum tokens of prompt and answer.", panel=params.MODEL)
    ] = 1024,
    config: params.Config = None,
    tokens: Annotated[
        int, params.option("Tokens of the corpus, prompts included.", panel=DATA)
    ] = 0,
    source: Annotated[
        str, params.option("Prompts come from: self, jsonl or text.", panel=DATA)
    ] = "self",
    input_path: Annotated[
        Path | None,
        params.option("The JSONL file; the text file, or folder of *.txt.", "--input", panel=DATA),
    ] = None,
    dataset: Annotated[
        str | None,
        params.option("cnn_dailymail, openwebtext, lm1b, or a hub data set.", panel=DATA),
    ] = None,
    from_tokens: Annotated[
        Path | None,
        params.option("Import rows of a safetensors file; generate nothing.", panel=DATA),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        params.option("Corpora to put together; give it once for each.", "--merge", panel=DATA),
    ] = None,
    verbatim: Annotated[
        bool,
        params.flag(
            "Store the texts themselves, packed; generate nothing.", "--verbatim", panel=DATA
        ),
    ] = False,
    temperatures: Annotated[
        str, params.option("Of the answers; 0 is greedy.", panel=DATA)
    ] = TEMPERATURES,
    shares: Annotated[str, params.option("Share of rows at each temperature.", panel=DATA)] = "",
    seed: Annotated[int, params.option("Same seed, same corpus.", panel=DATA)] = 0,
    rows: Annotated[
        str, params.option("Texts written at a time (auto: the fastest).", panel=DATA)
    ] = "auto",
    max_tokens: Annotated[int, params.option("Maximum tokens of an answer.", panel=DATA)] = 256,
    text_tokens: Annotated[
        int, params.option("Tokens of a document that become its prompt.", panel=DATA)
    ] = 64,
    features: Annotated[
        bool, params.flag("Store the target's final states too.", "--features", panel=DATA)
    ] = False,
    layers: Annotated[
        str,
        params.option("Layers stored by --features too, or auto.", panel=DATA),
    ] = "",
    strict: Annotated[
        bool, params.flag("Stop at the first unusable record.", "--strict", panel=DATA)
    ] = False,
    shard_tokens: Annotated[int, params.option("Tokens per file.", panel=params.OUTPUT)] = 1 << 20,
    dry_run: Annotated[
        bool,
        params.flag(
            "Estimate time and disk space; write nothing.", "--dry-run", panel=params.OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        params.flag("Print the closing summary as one JSON object.", "--json", panel=params.OUTPUT),
    ] = False,
    quiet: Annotated[
        bool, params.flag("No progress.", "-q", "--quiet", panel=params.OUTPUT)
    ] = False,
) -> None:
    """Let the target write its own training corpus. Stop any time; the same command resumes it.

    Example:  specdiff data --out corpus --tokens 2000000 --features
    """
    if merge:
        if tokens or from_tokens or features or verbatim or dry_run:
            raise UsageError("--merge takes --out alone: it neither generates nor computes")
        return _merge(merge, out, terminal.notes(quiet=quiet), as_json)
    if tokens < 1 and not (from_tokens or features or verbatim):
        raise UsageError("say how many tokens to write: --tokens N")
    if dry_run and (tokens < 1 or from_tokens or verbatim):
        raise UsageError(
            "--dry-run measures how fast the target generates; "
            "give --tokens N, and neither --from-tokens nor --verbatim"
        )
    if shard_tokens < 1:
        raise UsageError(f"--shard-tokens must be at least 1, not {shard_tokens}")
    if layers and not features:
        raise UsageError("--layers belongs to --features; give both")
    batch = _batch(rows)
    count = params.thread_count(threads)
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
        lm = specdiff.load(
            model,
            drafter,
            device=device,
            dtype=dtype,
            # features are for training, which reads plain weights
            quantize="none" if features and quantize == "auto" else quantize,
            max_len=max_model_len,
            threads=count,
            compile=False,  # so that a corpus does not depend on what is on disk
        )
    job = _Corpus(lm, out, tokens, batch, shard_tokens, notes)
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
                summary = job.forecast(origin, settings, features, job.layers(layers))
            else:
                summary = job.generate(origin, settings)
        if features and not dry_run:
            stored = job.features(job.layers(layers))
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


def _merge(folders: list[Path], out: Path, notes: "Console", as_json: bool) -> None:
    from specdiff.data.merge import merge

    with terminal.status(notes, "merging", log=True):
        summary = merge(folders, out)
    notes.print("\n".join(lines(out, summary)), soft_wrap=True)
    if as_json:
        terminal.print_json({"out": str(out), **asdict(summary)})


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
class _Corpus:
    """A corpus folder to fill, and the console that shows progress."""

    lm: "SpeculativeLM"
    out: Path
    tokens: int
    rows: int | None
    shard_tokens: int
    notes: "Console"

    def forecast(
        self,
        source: "Source",
        settings: "CorpusSettings",
        features: bool,
        layers: tuple[int, ...],
    ) -> "CorpusForecast":
        from specdiff.data.forecast import forecast

        with terminal.status(self.notes, "measuring", log=True):
            return forecast(
                self.lm,
                source,
                settings,
                tokens=self.tokens,
                rows=self.rows,
                features=features,
                layers=len(layers),
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

    def layers(self, text: str) -> tuple[int, ...]:
        from specdiff.training.features import parse_layers

        return parse_layers(text, self.lm.target.info.layers) if text else ()

    def features(self, layers: tuple[int, ...]) -> int:
        from specdiff.targets.causal import CausalTarget
        from specdiff.training import features

        assert isinstance(self.lm.target, CausalTarget)
        with progress_bar(self.notes, "final states") as report:
            return features.store(self.lm.target, self.out, report, layers)
