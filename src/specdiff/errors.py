"""The exception hierarchy: every error specdiff raises on purpose.

SpecdiffError
├── UsageError(ValueError)     an argument the caller can fix            exit code 2
│   └── UnknownNameError       no such model, drafter or verifier
├── ConfigError                a config.json with a missing, odd or unsupported field
├── WeightsError               weights that are missing, truncated, misshapen or pickled
├── UnsupportedModelError      a target this library cannot score exactly
├── TargetError                a target whose logits are NaN or infinite
├── CorpusError                a corpus folder that is absent, damaged, or does not fit
├── StorageError               a file or folder that cannot be written (full, read-only, locked)
├── DrafterError               a drafter that cannot be built, or does not fit its target
└── MissingExtraError          an optional dependency that is not installed
"""

from collections.abc import Sequence


class SpecdiffError(Exception):
    """Base of every error raised on purpose; the message names the offending value and the fix."""


class UsageError(SpecdiffError, ValueError):
    """A bad argument: the message names it, its value, and the allowed values.

    `param` is the name of the offending option, where there is exactly one.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownNameError(UsageError):
    """Unknown model, drafter or verifier name."""


class ConfigError(SpecdiffError):
    """A checkpoint's config.json lacks a field, or holds an unsupported value."""


class WeightsError(SpecdiffError):
    """A checkpoint's tensors are missing, truncated, misshapen or pickled (which can run code)."""


class UnsupportedModelError(SpecdiffError):
    """The target failed the self-test, or its family cannot be served exactly."""


class TargetError(SpecdiffError):
    """The target's logits are not finite: no token can be drawn. Names the row and position.

    `generations`: every answer of the call; those that failed end where they did.
    """

    def __init__(self, message: str, generations: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.generations = generations


class StorageError(SpecdiffError):
    """A file or folder cannot be written; the message names it and the reason."""


class CorpusError(SpecdiffError):
    """A corpus folder is absent, damaged, or belongs to other settings or another target."""


class DrafterError(SpecdiffError):
    """A drafter raises while being built, or does not fit its target."""


class MissingExtraError(SpecdiffError):
    """An optional dependency is missing; the message is the command that installs it."""
