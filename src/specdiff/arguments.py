"""Checked arguments: numbers and token ids of Python, NumPy or PyTorch, as plain Python values."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from specdiff.errors import UsageError


def whole(name: str, value: Any, *, param: str | None = None) -> int:
    """`value` as an int. Raises UsageError for anything else, True and 1.0 included.

    `param` is the option an error names (default: `name`).
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} must be a whole number, not {brief(value)}", param=param or name)
    return int(value)


def number(name: str, value: Any, *, param: str | None = None) -> float:
    """`value` as a float. Raises UsageError if it is no real number, or a boolean or a string.

    `param` is the option an error names (default: `name`).
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} must be a number, not {brief(value)}", param=param or name)
    return float(value)


def token_ids(name: str, value: Any) -> list[int]:
    """`value` as a list of ints: a sequence, or a one-dimensional array or tensor.

    Raises UsageError for anything else.
    """
    value = plain(value)
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Sequence):
        raise UsageError(f"{name} must be a list of token ids, not {brief(value)}", param=name)
    for token in value:
        if type(token) is not int:  # the usual case costs one comparison
            whole(f"each id in {name}", token, param=name)
    return [int(token) for token in value]


def int64(value: int) -> int:
    """The signed integer of the low 64 bits of `value`, as int64 tensors hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def plain(value: Any) -> Any:
    """Arrays and tensors as the numbers or lists they hold; everything else as it is."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def brief(value: object) -> str:
    """`value` for an error message: short enough to read."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
