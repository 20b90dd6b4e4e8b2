"""Arguments as callers give them: numbers and token ids from Python, NumPy or PyTorch, each checked once."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from specdiff.errors import UsageError


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises UsageError for anything else, True and 1.0 included."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} must be a whole number, not {brief(value)}")
    return int(value)


def number(name: str, value: Any) -> float:
    """`value` as a float. Raises UsageError for anything that is not a real number; booleans and strings are not."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} must be a number, not {brief(value)}")
    return float(value)


def token_ids(name: str, value: Any) -> list[int]:
    """`value` as a list of ints: a sequence, or a one-dimensional array or tensor. Raises UsageError for anything else."""
    value = plain(value)
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Sequence):
        raise UsageError(f"{name} must be a list of token ids, not {brief(value)}")
    for token in value:
        if type(token) is not int:  # the usual case costs one comparison
            whole(f"each id in {name}", token)
    return [int(token) for token in value]


def plain(value: Any) -> Any:
    """Arrays and tensors as the numbers or lists they hold; everything else as it is."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def brief(value: object) -> str:
    """`value` for an error message: short enough to read."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
