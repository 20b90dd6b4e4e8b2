"""Journal: what has been measured so far, one JSON object per line.

A line is written whole and flushed to the disk; a torn last line is dropped. The first line holds
the settings; every later one has a unique `key`, so that a resumed run knows what it has.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

from specdiff import files, strict_json
from specdiff.bench.equality import Divergence
from specdiff.bench.timing import RunRecord
from specdiff.errors import UsageError

NAME = "journal.jsonl"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """A prompt, by its size."""

    id: str
    task: str
    tokens: int


@dataclass(frozen=True, slots=True)
class BaselineStatus:
    """status: "ok", "failed", or "missing", which is no failure: this target has none."""

    name: str
    kind: str
    spec: str | None
    status: str
    why: str | None


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part, as one run found it. missing: why it did not run."""

    kind: ClassVar[str] = "part"
    part: str
    model: str
    dataset: str | None
    max_tokens: int
    notes: list[str]
    missing: str | None
    prompts: list[PromptFacts] = field(default_factory=list)
    baselines: list[BaselineStatus] = field(default_factory=list)
    dtype: str | None = None
    environment: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TuningPoint:
    """One setting of a baseline's grid, and its speed or why it has none."""

    draft_len: int | str | None
    steps: int | None
    tokens_per_second: float | None
    why: str | None


@dataclass(frozen=True, slots=True)
class Tuning:
    """The grid of a baseline; `best` is its fastest point."""

    kind: ClassVar[str] = "tune"
    baseline: str
    temperature: float
    grid: list[TuningPoint]
    best: TuningPoint | None
    why: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """Every cell of a stage once, on the same prompts."""

    kind: ClassVar[str] = "turn"
    stage: str
    prompt: str
    task: str
    repetition: int
    runs: list[RunRecord]
    divergences: list[Divergence]


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """Why a unit has no result."""

    kind: ClassVar[str] = "failure"
    why: str


class Journal:
    """DIR/journal.jsonl, opened or begun with `settings` and other facts `about` the run.

    Raises UsageError for a folder that holds one already, unless `resume` is set and the settings
    are the same.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.path = folder / NAME
        self.records: list[dict[str, Any]] = []
        expected = json.loads(json.dumps(settings))
        if self.path.exists():
            self.records = _read(self.path)
        if len(self.records) > 1 and not resume:
            raise UsageError(
                f"{folder} holds a benchmark already; resume it with --resume, "
                "or choose another --out"
            )
        if len(self.records) > 1:
            _require_same(self.records[0]["settings"], expected, folder)
            return
        self.records.clear()  # nothing was measured there
        files.write_text(self.path, "")
        self.add({"kind": "begin", "key": "begin", "settings": expected, **about})

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record; it is on the disk when this returns. Raises StorageError."""
        line = strict_json.dumps(record)
        files.append_line(self.path, line)
        stored: dict[str, Any] = json.loads(line)
        self.records.append(stored)
        return stored

    @property
    def keys(self) -> set[str]:
        """The keys of what is measured."""
        return {record["key"] for record in self.records}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from None
    whole, newline, torn = text.rpartition("\n")
    if torn:
        files.write_text(path, whole + newline)
    try:
        records = [json.loads(line) for line in whole.splitlines()]
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not all(isinstance(record, dict) and "key" in record for record in records):
        raise _damaged(path, "a line is no record")
    if records and not isinstance(records[0].get("settings"), dict):
        raise _damaged(path, "its first line holds no settings")
    return records


def _damaged(path: Path, reason: object) -> UsageError:
    return UsageError(f"{path} is damaged ({reason}); remove its folder, or choose another --out")


def _require_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    name = next((n for n in {**old, **new} if old.get(n) != new.get(n)), None)
    if name is not None:
        raise UsageError(
            f"{folder} was begun with {name} = {old.get(name)!r}, not {new.get(name)!r}; "
            "repeat those settings to resume it, or choose another --out"
        )


def as_json(record: Any) -> dict[str, Any]:
    """A dataclass of records as the dict that JSON holds; its `kind`, if any, comes first."""
    kind = getattr(type(record), "kind", None)
    return ({} if kind is None else {"kind": kind}) | asdict(record)


def parse(kind: type[T], value: Any, place: str = "") -> T:
    """`value`, read from JSON, as `kind`: a dataclass of dataclasses, lists, dicts and scalars.

    Unknown fields are ignored; scalars are taken as they are. Raises ValueError naming the place
    of a missing field, or of a list or object that is none.
    """
    return cast(T, _parse(kind, value, place))


def _parse(kind: Any, value: Any, place: str) -> Any:
    if is_dataclass(kind):
        return _parse_object(cast(type, kind), value, place)
    origin = get_origin(kind)
    if origin is UnionType:
        structured = [k for k in get_args(kind) if is_dataclass(k) or get_origin(k)]
        if value is None or not structured:
            return value
        return _parse(structured[0], value, place)
    if origin is list:
        _require_type(value, list, place)
        item = get_args(kind)[0]
        return [_parse(item, v, f"{place}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        _require_type(value, dict, place)
        item = get_args(kind)[1]
        return {name: _parse(item, v, f"{place}.{name}") for name, v in value.items()}
    return tuple(value) if origin is tuple else value


def _parse_object(kind: type, value: Any, place: str) -> Any:
    _require_type(value, dict, place)
    values = {}
    for name, (hint, required) in _schema(kind).items():
        if name in value:
            values[name] = _parse(hint, value[name], f"{place}.{name}".lstrip("."))
        elif required:
            raise ValueError(f"{place or 'it'} has no {name!r}")
    return kind(**values)


@cache
def _schema(kind: type) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, required) of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(kind)
    }


def _require_type(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind):
        noun = "list" if kind is list else "object"
        raise ValueError(f"{place or 'it'} is no {noun}")
