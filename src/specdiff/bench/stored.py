"""results.json read back, and refused in one line if it is not what this version writes."""

import json
from pathlib import Path
from typing import Any

from specdiff.bench.results import KEY, SCHEMA
from specdiff.errors import UsageError

WHOLE = ("status", "suite", "command", "settings", "environment", "seconds", "parts", "paper")
PART = ("name", "model", "notes", "missing", "prompts", "baselines", "tuning", "cells", "costs", "conditional", "batches",
        "divergences", "failures", "outputs")  # fmt: skip
CELL = (*KEY, "status", "why", "turns", "tokens", "tokens_per_second", "speedup_vs_hf", "speedup_vs_vanilla", "tau", "alpha",
        "break_even_tau", "per_position", "reached", "seconds", "exact", "tasks")  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """The results in a folder, or in the file itself. Raises UsageError naming the file and what is wrong with it."""
    file = folder / "results.json" if folder.is_dir() else folder
    if not file.is_file():
        raise UsageError(
            f"no results in {folder}: there is no {file.name}; `specdiff bench --out {folder}` writes it"
        )
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} is damaged ({error}); measure again, or take the folder of another run"
        ) from None
    schema = told.get("schema") if isinstance(told, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"{file} has schema {schema!r}, and this version reads {SCHEMA}; use the specdiff that wrote it, or measure again"
        )
    lacking = next(_lacking(told), None)
    if lacking:
        raise UsageError(
            f"{file} is damaged ({lacking}); measure again, or take the folder of another run"
        )
    return dict(told)


def _lacking(told: dict[str, Any]) -> Any:
    yield from (f"it has no {name!r}" for name in WHOLE if name not in told)
    parts = told.get("parts")
    if not isinstance(parts, list):
        yield "its parts are no list"
        return
    if not isinstance(told["settings"], dict):
        yield "its settings are no object"
    for i, part in enumerate(parts):
        yield from (f"part {i} has no {name!r}" for name in _absent(part, PART))
        if not isinstance(part["cells"], list):
            yield f"the cells of part {i} are no list"
            return
        for j, cell in enumerate(part["cells"]):
            yield from (f"cell {j} of part {i} has no {name!r}" for name in _absent(cell, CELL))


def _absent(found: Any, wanted: tuple[str, ...]) -> list[str]:
    return [name for name in wanted if not isinstance(found, dict) or name not in found]
