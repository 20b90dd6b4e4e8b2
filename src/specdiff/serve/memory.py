"""The memory of the server's cache: sizes as users write them, and what requests may take of it."""

import re
from typing import Any

from specdiff.capacity import stored
from specdiff.errors import UsageError
from specdiff.targets.base import Target

UNITS = {
    "": 1, "B": 1,
    "K": 2**10, "KIB": 2**10, "KB": 10**3,
    "M": 2**20, "MIB": 2**20, "MB": 10**6,
    "G": 2**30, "GIB": 2**30, "GB": 10**9,
    "T": 2**40, "TIB": 2**40, "TB": 10**12,
}  # fmt: skip


def size(text: str, option: str) -> int:
    """A number of bytes, such as 4GiB, 500M (of 1024 K) or 2.5GB. Raises UsageError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"{option} must be bytes with a suffix, such as 4GiB or 500MB, not {text!r}"
        )
    return int(float(match[1]) * unit)


def spelled(count: int) -> str:
    """Bytes for people."""
    for name in ("GiB", "MiB", "KiB"):
        unit = UNITS[name.upper()]
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def positions(target: Target[Any], memory: int | None, width: int) -> int | None:
    """The positions of the target's cache that `memory` bytes hold (None: no limit).

    `width`: of the widest request. Raises UsageError if it has no room.
    """
    if memory is None:
        return None
    unit = target.position_bytes
    if not unit:
        raise UsageError(
            "--kv-cache-memory: it is unknown how much memory this target's cache takes"
        )
    count = memory // unit
    if count < stored(width):
        raise UsageError(
            f"--kv-cache-memory of {spelled(memory)} holds {count} positions of {spelled(unit)}, "
            f"and one request may take {stored(width)}; raise it to at least "
            f"{stored(width) * unit} bytes, or lower --max-model-len"
        )
    return count


def report(target: Target[Any], rows: int, width: int, positions: int | None) -> str:
    """A line on the most memory that the cache can take."""
    unit = target.position_bytes
    whole = rows * stored(width)
    most = whole if positions is None else min(whole, positions)
    if not unit:
        return "cache: of unknown size"
    line = f"cache: {spelled(unit)} per token, at most {spelled(most * unit)}"
    if most < whole:
        line += f" (all {rows} requests of full length would take {spelled(whole * unit)})"
    return line
