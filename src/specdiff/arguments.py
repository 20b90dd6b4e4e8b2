"""Checked arguments: numbers and token ids of Python, NumPy or PyTorch, as plain Python values."""

from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from specdiff.errors import UsageError

BIASES = 300  # maximum entries of a logit bias
LARGEST = 2**63 - 1  # the largest integer of an int64 tensor


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


def token_id_tuple(name: str, value: Any) -> tuple[int, ...]:
    """Token ids >= 0 of a sequence, set, array or tensor. Raises UsageError for anything else."""
    ids = token_ids(name, sorted(value) if isinstance(value, Set) else value)
    if ids and min(ids) < 0:
        raise UsageError(f"{name} must be token ids >= 0, not {brief(value)}", param=name)
    if ids and max(ids) > LARGEST:
        raise UsageError(f"{name} must be token ids below 2**63, not {brief(value)}", param=name)
    return tuple(ids)


def bias_pairs(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """The entries of a logit bias, from pairs or a mapping. Raises UsageError."""
    if not isinstance(value, (Mapping, Sequence)) or isinstance(value, str):
        raise UsageError(
            f"{name} must be a mapping or a list of pairs, not {brief(value)}", param=name
        )
    entries = list(value.items() if isinstance(value, Mapping) else value)
    if len(entries) > BIASES:
        raise UsageError(
            f"{name} may hold at most {BIASES} entries, not {len(entries)}", param=name
        )
    pairs: dict[int, float] = {}
    for entry in entries:
        token, bias = _pair(name, entry)
        if token in pairs:
            raise UsageError(f"{name} names token {token} twice", param=name)
        pairs[token] = bias
    return tuple(pairs.items())


def _pair(name: str, entry: Any) -> tuple[int, float]:
    """One entry of a logit bias; JSON writes its token id as a string."""
    if not isinstance(entry, Sequence) or len(entry) != 2:
        raise UsageError(
            f"{name} must hold pairs of token id and value, not {brief(entry)}", param=name
        )
    token, bias = entry
    if isinstance(token, str) and token.isdecimal():
        token = int(token)
    token = whole(f"each token id of {name}", token, param=name)
    bias = number(f"the {name} of token {token}", bias, param=name)
    if not (0 <= token <= LARGEST and -100 <= bias <= 100):
        raise UsageError(
            f"{name} must map token ids >= 0 to numbers in [-100, 100], not {token!r} to {bias!r}",
            param=name,
        )
    return token, bias


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
