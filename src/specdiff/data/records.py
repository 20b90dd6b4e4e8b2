"""Records of JSON Lines files, text files and data sets, read for corpora, suites and recipes.

A file is UTF-8, with or without a byte order mark, with any line ends, plain or gzipped whatever
its name. A fault of the file ends the reading; a fault of one record is a RecordError, which the
caller may count and skip.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from specdiff.errors import MissingExtraError, UsageError
from specdiff.unicode import valid

CHUNK = 1000  # characters after which the paragraphs of a text file form a record
SETS = {  # name -> hub id, configuration, field
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "article"),
    "openwebtext": ("Skylion007/openwebtext", None, "text"),
    "lm1b": ("dvruette/lm1b", None, "text"),
}
FIELDS = ("messages", "prompt", "text", "article")  # that hold a prompt, in order of precedence
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16
NO_OBJECT = "record-not-an-object"
NO_FIELD = "record-without-prompt"
NO_TEXT = "record-not-text"


class RecordError(UsageError):
    """An unusable record, counted as `kind`; the message names the record."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Record(NamedTuple):
    """A JSON value (for a text file: an object with "text"), and its place, for messages."""

    place: str
    value: Any


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file, without their ends.

    Raises UsageError naming the file, the line and the fix.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(len(GZIP)) == GZIP
            raw.seek(0)
            content = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
            for number, line in enumerate(content, 1):
                start = line.removeprefix(BOM) if number == 1 else line
                yield number, _decoded(start.rstrip(b"\r\n"), path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"after line {number}" if number else "at its beginning"
        raise UsageError(
            f"{path}: the gzip file is cut short or damaged {where} ({error}); fetch it again"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; name a file in it") from None
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """A whole UTF-8 file, read as `lines` reads it. Raises UsageError."""
    return "".join(f"{line}\n" for _, line in lines(path))


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON value a line; blank lines are skipped. Raises UsageError naming the line."""
    first = True
    for number, line in lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if first and line.lstrip().startswith("["):
                raise UsageError(_array(path)) from None
            raise UsageError(f"{place} is not JSON: {error}") from None
        if first and isinstance(value, list) and any(isinstance(v, dict) for v in value):
            raise UsageError(_array(path))
        first = False
        yield Record(place, value)


def read_texts(path: Path) -> Iterator[Record]:
    """Chunks of whole paragraphs of a text file, or of every *.txt under a folder, by name."""
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        chunks = 0
        chunk = ""
        for paragraph in read_text(file).split("\n\n"):
            chunk += ("\n\n" if chunk else "") + paragraph.strip()
            if len(chunk) >= CHUNK:
                chunks += 1
                yield Record(f"{file}, chunk {chunks}", {"text": chunk})
                chunk = ""
        if chunk.strip():
            yield Record(f"{file}, chunk {chunks + 1}", {"text": chunk})


def read_dataset(name: str) -> Iterator[Record]:
    """The training split of a Hugging Face data set, streamed.

    Raises MissingExtraError, or UsageError if it cannot be loaded or lacks a field for prompts.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingExtraError("data sets need an extra:  pip install 'specdiff[train]'") from None
    hub, configuration, field = SETS.get(name, (name, None, None))
    try:
        rows = iter(datasets.load_dataset(hub, configuration, split="train", streaming=True))
        first = next(rows, None)
    except Exception as error:  # datasets raises many types, its own and those of its network
        message = " ".join(str(error).split())
        raise UsageError(
            f"cannot load the data set {name!r}: {type(error).__name__}: {message}"
        ) from error
    if first is None:
        return
    column = field or next((f for f in FIELDS if f in first), None)
    if column is None or column not in first:
        raise UsageError(
            f"the data set {name!r} has none of the fields {', '.join(FIELDS)}; "
            f"it has {', '.join(first)}"
        )
    for number, row in enumerate(chain([first], rows)):
        yield Record(f"{name}, row {number}", {column: row[column]})


def prompt_of(
    record: Record, fields: Sequence[str]
) -> tuple[str, str | list[int] | list[dict[str, Any]]]:
    """The first of `fields` in the record, and its prompt: text, token ids, or messages.

    Raises RecordError.
    """
    value = record.value
    if not isinstance(value, Mapping):
        example = f'{{"{fields[-1]}": "..."}}'
        raise RecordError(
            NO_OBJECT,
            f"{record.place} must be an object such as {example}, not {type(value).__name__}",
        )
    field = next((f for f in fields if value.get(f) is not None), None)
    if field is None:
        names = ", ".join(map(str, value)) or "none"
        raise RecordError(
            NO_FIELD, f"{record.place} has none of the fields {', '.join(fields)}, but {names}"
        )
    body = value[field]
    items: list[Any] = body if isinstance(body, list) and body else [None]
    if field == "messages" or all(isinstance(item, Mapping) and "role" in item for item in items):
        return field, messages_of(body, record.place)
    if field == "prompt" and all(type(item) is int for item in items):
        return field, items
    return field, text_of(body, f"{record.place}: {field}")


def messages_of(value: Any, place: str) -> list[dict[str, Any]]:
    """A conversation with text contents; the text parts of a content are joined.

    Raises RecordError.
    """
    if not isinstance(value, list) or not value:
        raise RecordError(
            NO_TEXT, f'{place}: messages must be a list of {{"role": ..., "content": ...}}'
        )
    return [
        _message(message, f"{place}: message {number}") for number, message in enumerate(value, 1)
    ]


def text_of(value: Any, name: str) -> str:
    """A text, or its parts joined. Raises RecordError naming the other type."""
    if isinstance(value, str):
        return valid(value)
    if not isinstance(value, list):
        raise RecordError(
            NO_TEXT, f"{name} must be text, not {'null' if value is None else type(value).__name__}"
        )
    return "".join(_part(part, name) for part in value)


def _message(message: Any, name: str) -> dict[str, Any]:
    if (
        not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or "content" not in message
    ):
        raise RecordError(
            NO_TEXT, f'{name}: messages must be a list of {{"role": ..., "content": ...}}'
        )
    return {**message, "content": text_of(message["content"], f"{name}: content")}


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return valid(part)
    if (
        not isinstance(part, Mapping)
        or not isinstance(part.get("text"), str)
        or part.get("type", "text") != "text"
    ):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RecordError(NO_TEXT, f"{name} must be text, but it has a part of type {kind!r}")
    return valid(part["text"])


def _decoded(line: bytes, path: Path, number: int) -> str:
    if number == 1 and line.startswith(WIDE):
        raise UsageError(
            f"{path} is UTF-16, not UTF-8; convert it:  iconv -f UTF-16 -t UTF-8 {path.name}"
        )
    if b"\x00" in line:
        raise UsageError(
            f"{path}, line {number} holds zero bytes: it is a binary file, or UTF-16; "
            f"give UTF-8 text"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        fix = f"if it is Latin-1, convert it:  iconv -f LATIN1 -t UTF-8 {path.name}"
        raise UsageError(f"{path}, line {number} is not UTF-8 (byte 0x{byte:02x}); {fix}") from None


def _array(path: Path) -> str:
    return f"{path}, line 1 begins a JSON array; write one object a line:  jq -c '.[]' {path.name}"
