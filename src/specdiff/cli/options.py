"""What several verbs share."""

import json
import os
from typing import Any

from specdiff.errors import UsageError


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def sampling_defaults(generation_config: str) -> dict[str, str]:
    """The keyword argument of `specdiff.load` for --generation-config; none for its default."""
    return {} if generation_config == "auto" else {"generation_config": generation_config}


def json_object(flag: str, text: str) -> dict[str, Any]:
    """An option given as JSON. Raises UsageError if it is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag} is not valid JSON ({error}): {text}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{flag} must be a JSON object, not {text}")
    return found


def quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def token_ids(text: str) -> tuple[int, ...] | None:
    """ID,... as numbers; None for no text. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise UsageError(f"--allowed-token-ids must be ID,ID,..., not {text!r}") from None


def biases(text: str) -> dict[int, float]:
    """ID=VALUE,... as a mapping. Raises UsageError."""
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        listed = [(int(token), float(value)) for token, value in pairs]
    except ValueError:
        raise UsageError(f"--logit-bias must be ID=VALUE,ID=VALUE,..., not {text!r}") from None
    by_token = dict(listed)
    if len(by_token) < len(listed):
        raise UsageError(f"--logit-bias names a token twice: {text!r}")
    return by_token


def draft_length(text: str) -> int | str | None:
    """K, "auto", or None for no text. Raises UsageError."""
    if text in ("", "auto"):
        return text or None
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--draft-len must be a whole number of at least 1 or 'auto', not {text!r}"
        ) from None
