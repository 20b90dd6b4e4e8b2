"""Standard streams: valid text in, printable text out, and consoles that take user text literally."""

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
    """Open what the caller closed, and print "?" for characters the terminal's encoding lacks."""
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
    """Keep a closed standard stream's number from the next file that is opened; writing to it fails."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDONLY)


def prepare_input() -> None:
    """Decode a pipe as UTF-8, with U+FFFD for anything else. Raises UsageError where it is closed."""
    if sys.stdin is None:
        raise UsageError(
            "standard input is closed; pipe some text into it, or redirect it from a file"
        )
    if not isinstance(sys.stdin, io.TextIOWrapper):
        return
    if sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")
    else:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")


def output_error(error: Exception) -> StorageError | None:
    """What to report instead of `error` where standard output is what failed; what is left to write is then dropped."""
    may_be_output = (
        isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None
    )
    try:
        sys.stdout.flush()
        if may_be_output:
            print(
                flush=True
            )  # an unbuffered stream has forgotten what it could not write, so try it again
    except OSError as refusal:
        drop_output()
        return (
            StorageError(f"cannot write to standard output: {refusal.strerror}")
            if may_be_output
            else None
        )
    return None


def drop_output() -> None:
    """Send the rest to nowhere: Python would complain about it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def print_json(value: Any) -> None:
    """Print one strict JSON object."""
    print(strict_json.dumps(value))


def page(width: int | None = None) -> "Console":
    """Standard output. `width`: of a pipe; a terminal has its own."""
    return _console(stderr=False, quiet=False, width=None if sys.stdout.isatty() else width)


def notes(*, quiet: bool = False) -> "Console":
    """Standard error."""
    return _console(stderr=True, quiet=quiet, width=None)


def _console(*, stderr: bool, quiet: bool, width: int | None) -> "Console":
    """No markup and no emoji codes: names and answers may hold [/x] or :smile:."""
    from rich.console import Console

    return Console(
        stderr=stderr, quiet=quiet, width=width, highlight=False, markup=False, emoji=False
    )


@contextmanager
def status(console: "Console", text: str, *, log: bool = False) -> Iterator[None]:
    """A spinner beside `text`, which is no markup. `log`: a line of it where stderr is no terminal, else nothing there."""
    from rich.text import Text

    if log and not console.is_terminal:
        console.print(text, soft_wrap=True)
    with console.status(Text(text)):
        yield
