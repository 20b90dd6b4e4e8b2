"""What has been measured so far, one JSON object a line. A line is written whole and flushed to the disk; a torn last one never was.

The first line holds the settings; every later one has a `key` that no other has, so that a resumed run knows what it has.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdiff import files, strict_json
from specdiff.errors import UsageError

NAME = "journal.jsonl"


class Journal:
    """Opens DIR/journal.jsonl, or begins it with `settings` and what else is told `about` the run.

    Raises UsageError for a folder that holds one already, unless `resume` is set and the settings are the same.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.path, self.records = folder / NAME, list[dict[str, Any]]()
        wanted = json.loads(json.dumps(settings))
        if self.path.exists():
            self.records = _read(self.path)
        if len(self.records) > 1 and not resume:
            raise UsageError(
                f"{folder} holds a benchmark already; go on with it by --resume, or choose another --out"
            )
        if len(self.records) > 1:
            _same(self.records[0]["settings"], wanted, folder)
            return
        self.records.clear()  # nothing was measured there
        files.write_text(self.path, "")
        self.add({"kind": "begin", "key": "begin", "settings": wanted, **about})

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record; it is on the disk when this returns. Raises StorageError."""
        line = strict_json.dumps(record)
        files.append_line(self.path, line)
        kept: dict[str, Any] = json.loads(line)
        self.records.append(kept)
        return kept

    @property
    def keys(self) -> set[str]:
        """What is measured."""
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


def _same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    name = next((n for n in {**old, **new} if old.get(n) != new.get(n)), None)
    if name is not None:
        raise UsageError(
            f"{folder} was begun with {name} = {old.get(name)!r}, not {new.get(name)!r}; "
            "repeat those settings to go on, or choose another --out"
        )
