"""Errors and warnings on stderr, one line each."""

import sys
import traceback
from typing import TextIO

from specdiff.errors import SpecdiffError

MAX_MESSAGE = 500  # characters of a foreign error message


def complain(error: Exception, *, debug: bool) -> None:
    """Print an error; `debug`: also its traceback."""
    if debug:
        traceback.print_exception(error)
    line = one_line(error)
    if not debug and not isinstance(error, SpecdiffError):
        line += "; run again with --debug for the traceback"
    print(f"specdiff: error: {line}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message of a specdiff error; type and message of any other."""
    if isinstance(error, SpecdiffError):
        return str(error)
    message = " ".join(str(error).split())
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A replacement for warnings.showwarning."""
    print(f"specdiff: warning: {message}", file=file or sys.stderr)
