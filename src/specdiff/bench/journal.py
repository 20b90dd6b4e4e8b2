"""What has been measured so far, one JSON object a line. A line is written whole and flushed to the disk; a torn last one never was.

The first line holds the settings; every later one has a `key` that no other has, so that a resumed run knows what it has.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdiff.errors import UsageError

NAME = "journal.jsonl"


class Journal:
    """Opens DIR/journal.jsonl, or begins it with `settings` and what else is told `about` the run.

    Raises UsageError for a folder that holds one already, unless `resume` is set and the settings are the same.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.records = folder / NAME, list[dict[str, Any]]()
        wanted = json.loads(json.dumps(settings))
        if self.path.exists():
            self.records = _read(self.path)
        if len(self.records) > 1 and not resume:
            raise UsageError(f"{folder} holds a benchmark already; go on with it by --resume, or choose another --out")
        if len(self.records) > 1:
            _same(self.records[0]["settings"], wanted, folder)
            return
        self.records.clear()  # nothing was measured there
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self.add({"kind": "begin", "key": "begin", "settings": wanted, **about})

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record; it is on the disk when this returns."""
        line = json.dumps(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        kept: dict[str, Any] = json.loads(line)
        self.records.append(kept)
        return kept

    @property
    def keys(self) -> set[str]:
        """What is measured."""
        return {record["key"] for record in self.records}


def _read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    whole, newline, torn = text.rpartition("\n")
    if torn:
        aside = path.with_suffix(".partial")
        aside.write_text(whole + newline, encoding="utf-8")
        aside.replace(path)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged ({error}); remove its folder, or choose another --out") from None


def _same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    name = next((n for n in {**old, **new} if old.get(n) != new.get(n)), None)
    if name is not None:
        raise UsageError(
            f"{folder} was begun with {name} = {old.get(name)!r}, not {new.get(name)!r}; "
            "repeat those settings to go on, or choose another --out"
        )
