"""Prompts: text or token ids, alone or in a list, from Python, NumPy, PyTorch or a tokenizer."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from specdiff.arguments import brief, plain
from specdiff.errors import UsageError

Prompt = str | Sequence[int]


def prompt_list(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether it was a single prompt.

    Raises UsageError for anything that is neither a prompt nor a list.
    """
    prompts = plain(_input_ids(prompts) if isinstance(prompts, Mapping) else prompts)
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Sequence):
        raise UsageError(
            "a prompt must be a string, token ids, or a list of either, "
            f"not {type(prompts).__name__} ({brief(prompts)})",
            param="prompt",
        )
    if len(prompts) > 0 and isinstance(plain(prompts[0]), Real):
        return [prompts], True
    return [_input_ids(p) if isinstance(p, Mapping) else p for p in prompts], False


def _input_ids(encoding: Mapping[str, Any]) -> list[Any]:
    """The token ids of a tokenizer's encoding, without padding."""
    if "input_ids" not in encoding:
        names = ", ".join(map(str, encoding)) or "nothing"
        raise UsageError(
            f"a prompt given as a mapping must hold input_ids, not {names}", param="prompt"
        )
    ids = [plain(entry) for entry in plain(encoding["input_ids"])]
    if encoding.get("attention_mask") is None:
        return ids
    mask = [plain(entry) for entry in plain(encoding["attention_mask"])]
    if ids and isinstance(ids[0], list):
        return [_unpadded(*row) for row in zip(ids, mask, strict=True)]
    return _unpadded(ids, mask)


def _unpadded(ids: list[Any], mask: list[Any]) -> list[Any]:
    return [token for token, real in zip(ids, mask, strict=True) if real]
