"""How this process holds memory while it makes many large tensors in a row."""

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's own numbers


def keep_freed() -> None:
    """Hand nothing back to the system between steps: glibc would unmap every large tensor and fault its pages in anew (15 % of a
    training step on a CPU). OnDevice than on glibc, nothing happens."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
