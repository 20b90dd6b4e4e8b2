"""Standard streams: valid text in, printable text out, consoles without markup."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specdiff import strict_json
from specdiff.errors import StorageError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)


def prepare() -> None:
    """Reopen closed streams, and print "?" for characters the terminal's encoding lacks."""
    for number in range(3):
        _occupy(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _occupy(number: int) -> None:
    """Reserve a closed standard stream's number, so that no other file gets it; writes fail."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDONLY)


def prepare_input() -> None:
    """Decode a pipe as UTF-8, with U+FFFD for anything else. Raises UsageError if it is closed."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; pipe some text into it, or redirect a file")
    if not isinstance(sys.stdin, io.TextIOWrapper):
        return
    if sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")
    else:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")


def output_error(error: Exception) -> StorageError | None:
    """The error to report instead of `error` if standard output failed; its buffer is dropped."""
    may_be_output = False
    if isinstance(error, OSError):
        may_be_output = error.errno in UNWRITABLE and error.filename is None
    try:
        sys.stdout.flush()
        if may_be_output:
            print(flush=True)  # an unbuffered stream holds nothing to flush: write again
    except OSError as failure:
        drop_output()
        if may_be_output:
            return StorageError(f"cannot write to standard output: {failure.strerror}")
    return None


def quiet_libraries() -> None:
    """Silence transformers and huggingface_hub: progress bars, and messages below errors."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def drop_output() -> None:
    """Discard buffered output, which Python would report at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def print_json(value: Any) -> None:
    """Print one strict JSON object."""
    print(strict_json.dumps(value))


def page(width: int | None = None) -> "Console":
    """A console on standard output. `width` applies to a pipe; a terminal has its own."""
    return _console(stderr=False, quiet=False, width=None if sys.stdout.isatty() else width)


def notes(*, quiet: bool = False) -> "Console":
    """A console on standard error."""
    return _console(stderr=True, quiet=quiet, width=None)


def _console(*, stderr: bool, quiet: bool, width: int | None) -> "Console":
    """Without markup and emoji codes: names and answers may contain [/x] or :smile:."""
    from rich.console import Console

    return Console(
        stderr=stderr, quiet=quiet, width=width, highlight=False, markup=False, emoji=False
    )


@contextmanager
def status(console: "Console", text: str, *, log: bool = False) -> Iterator[None]:
    """A spinner with `text`, taken literally. `log`: print one line if stderr is no terminal."""
    from rich.text import Text

    if log and not console.is_terminal:
        console.print(text, soft_wrap=True)
    with console.status(Text(text)):
        yield
