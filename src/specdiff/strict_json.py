"""JSON that every parser reads: no NaN, no infinities, no lone surrogates."""

import json
import math
from typing import Any

from specdiff.unicode import valid


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`value` as ASCII JSON: numbers that are not finite become null, malformed text U+FFFD."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` with null for numbers that are not finite, and U+FFFD for lone surrogates."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return valid(value)
    if isinstance(value, dict):
        return {plain(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
