"""Corpus folders: one function for each way to fill one, with progress and a summary.

All of them resume an interrupted folder, whose shards are verified first, and raise StorageError
if the folder cannot be written or another process is writing to it, CorpusError if it was begun
with other settings or a shard has changed.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from specdiff.data import packing
from specdiff.data.corpus import PACKED, Corpus, CorpusWriter
from specdiff.data.generate import (
    CorpusSettings,
    about,
    generate,
    identity,
    slots,
)
from specdiff.data.ledger import CorpusSummary, Ledger
from specdiff.data.shards import Row
from specdiff.data.sources import Document, RecordSource, Source, first_prompt
from specdiff.text.lm import SpeculativeLM

SHARD_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class CorpusProgress:
    """Progress of a job that has stored `tokens` of `total` tokens (0: no limit).

    `processed` tokens were processed since the job began; `rows` are stored and `dropped` keys
    dropped, both in the whole corpus. `unsettled` generated tokens belong to unfinished rows;
    `prompts` were taken from the source.
    """

    tokens: int
    total: int
    processed: int = 0
    rows: int | None = None
    dropped: int = 0
    unsettled: int | None = None
    prompts: int = 0


Report = Callable[[CorpusProgress], None]


def ignore(progress: CorpusProgress) -> None:
    """A report that shows nothing."""


@dataclass(frozen=True, slots=True)
class GenerationSummary(CorpusSummary):
    """A summary of the corpus, and of what this run generated for it."""

    new_tokens: int
    source_exhausted: bool
    generated_tokens: int
    tokens_per_second: float
    rows_at_a_time: int


def write_generated(
    lm: SpeculativeLM,
    source: Source,
    settings: CorpusSettings,
    out: Path,
    *,
    tokens: int,
    rows: int,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = ignore,
) -> GenerationSummary:
    """Let the target write `tokens` tokens, `rows` rows at a time.

    Raises UsageError if the source has no usable prompt or the target too few positions.
    """
    slots(lm, source, settings)
    first_prompt(source)
    with _ledger(lm, out, about(lm, source, settings), shard_tokens) as ledger:
        writer = ledger.writer
        before = writer.tokens
        report(_progress(ledger, tokens, 0, unsettled=0))
        begin = time.perf_counter()
        generated = 0
        unsettled = 0

        def on_prompt(prompts: int) -> None:
            progress = _progress(ledger, tokens, generated, unsettled)
            report(replace(progress, prompts=prompts))

        steps = generate(
            lm, source, ledger, settings, tokens=tokens, rows=rows, on_prompt=on_prompt
        )
        for step in steps:
            generated += step.tokens
            unsettled = step.unsettled
            report(_progress(ledger, tokens, generated, unsettled))
        seconds = time.perf_counter() - begin
        return GenerationSummary(
            **asdict(ledger.close()),
            new_tokens=writer.tokens - before,
            source_exhausted=writer.tokens < tokens,
            generated_tokens=generated,
            tokens_per_second=round(generated / max(seconds, 1e-9), 1),
            rows_at_a_time=rows,
        )


def write_imported(
    lm: SpeculativeLM,
    path: Path,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = ignore,
) -> CorpusSummary:
    """Import the token rows of a safetensors file; see `packing.read_rows` for its errors."""
    rows = packing.read_rows(path, lm.target.info.vocab_size)
    description = packing.about(path, identity(lm.target.info.name))
    with _ledger(lm, out, description, shard_tokens) as ledger:
        return _add(rows, ledger, sum(len(row.tokens) for row in rows), report)


def write_packed(
    lm: SpeculativeLM,
    source: RecordSource,
    out: Path,
    *,
    tokens: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = ignore,
) -> CorpusSummary:
    """Store whole texts, packed into rows of `lm.max_len` tokens; `tokens` 0: all of them."""
    description = identity(lm.target.info.name) | {
        "source": source.about,
        "row_tokens": lm.max_len,
        PACKED: True,
    }
    # The lowest end token is the end of a text; the ends of turns came later.
    end = lm.end_ids[0] if lm.end_ids else None
    with _ledger(lm, out, description, shard_tokens) as ledger:
        writer = ledger.writer
        rows = packing.packed(_usable(source.documents(), ledger), end, lm.max_len)
        rows = takewhile(lambda _: not tokens or writer.tokens < tokens, rows)
        return _add(rows, ledger, tokens, report)


@contextmanager
def _ledger(
    lm: SpeculativeLM, out: Path, description: Mapping[str, Any], shard_tokens: int
) -> Iterator[Ledger]:
    """The ledger of a locked corpus folder whose shards are verified."""
    vocab_size = lm.target.info.vocab_size
    with CorpusWriter(out, description, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
        corpus = Corpus(out)
        corpus.verify()
        yield Ledger(writer, corpus.columns())


def _add(rows: Iterable[Row], ledger: Ledger, total: int, report: Report) -> CorpusSummary:
    report(_progress(ledger, total, 0))
    processed = 0
    for new in packing.add_rows(rows, ledger):
        processed += new
        report(_progress(ledger, total, processed))
    return ledger.close()


def _progress(
    ledger: Ledger, total: int, processed: int, unsettled: int | None = None
) -> CorpusProgress:
    writer = ledger.writer
    return CorpusProgress(writer.tokens, total, processed, writer.rows, ledger.drops, unsettled)


def _usable(documents: Iterable[Document], ledger: Ledger) -> Iterator[Sequence[int]]:
    for document in documents:
        if document.reason:
            ledger.drop(document.key, document.reason, document.detail)
        else:
            yield document.ids
