"""Prompts and documents someone has: JSON lines, text files, Hugging Face data sets, one record at a time."""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specdiff.errors import MissingExtraError, UsageError

CHUNK = 1000  # characters of a text file's paragraphs taken together
SETS = {  # name -> hub id, configuration, field
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "article"),
    "openwebtext": ("Skylion007/openwebtext", None, "text"),
    "lm1b": ("dvruette/lm1b", None, "text"),
}
FIELDS = ("messages", "prompt", "text", "article")  # what a record's prompt may be called, most telling first


def read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    """One JSON object a line, of a file that may be gzipped; blank lines are skipped. Raises UsageError naming the line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise UsageError(f'{path}, line {number} must be an object such as {{"prompt": "..."}}, not {type(record).__name__}')
            yield record


def read_texts(path: Path) -> Iterator[Mapping[str, Any]]:
    """A text file, or every *.txt under a folder in order of name, in chunks of whole paragraphs."""
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        chunk = ""
        for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            chunk += ("\n\n" if chunk else "") + paragraph.strip()
            if len(chunk) >= CHUNK:
                yield {"text": chunk}
                chunk = ""
        if chunk.strip():
            yield {"text": chunk}


def read_dataset(name: str) -> Iterator[Mapping[str, Any]]:
    """The training split of a Hugging Face data set, streamed. Raises MissingExtraError, and UsageError with the fields it has."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingExtraError("data sets need an extra:  pip install 'specdiff[train]'") from None
    hub, configuration, field = SETS.get(name, (name, None, None))
    try:
        rows = iter(datasets.load_dataset(hub, configuration, split="train", streaming=True))
        first = next(rows, None)
    except Exception as error:  # datasets raises dozens of kinds, its own and those of the network below it
        raise UsageError(f"cannot load the data set {name!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if first is None:
        return
    known = field or next((f for f in FIELDS if f in first), None)
    if known is None or known not in first:
        raise UsageError(f"the data set {name!r} has none of the fields {', '.join(FIELDS)}; it has {', '.join(first)}")
    yield {known: first[known]}
    for row in rows:
        yield {known: row[known]}
