"""Atomic file writes, digests and folder locks; errors name the reason.

Every file specdiff writes goes through here. A write goes to a hidden neighbor first, is flushed
to the disk, and is then renamed into place: a crash or a full disk leaves the old content.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specdiff.errors import StorageError

SAFETENSORS = {torch.bfloat16: "BF16", torch.float32: "F32"}  # names of dtypes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file. Raises StorageError."""
    return _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, *, indent: int = 1) -> Path:
    """Write strict JSON (NaN and infinities raise ValueError). Raises StorageError."""
    return write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file; tied tensors are stored once for each name. Raises StorageError."""
    separate = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    return _write(path, lambda partial: save_file(separate, partial, metadata=metadata))


@contextmanager
def tensor_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: dict[str, str]
) -> Iterator["TensorFile"]:
    """A safetensors file of these dtypes and shapes, filled row by row: larger than memory.

    It replaces `path` when the block ends without an exception. Raises StorageError.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storing(path):
        try:
            with partial.open("wb") as file:
                yield TensorFile(file, tensors, metadata)
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class TensorFile:
    """The tensors of `tensor_file`, written anywhere in any order."""

    def __init__(
        self,
        file: BinaryIO,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        self.places: dict[str, tuple[int, int]] = {}  # offset, bytes of a row
        for name, (dtype, shape) in tensors.items():
            start = end
            row = dtype.itemsize * math.prod(shape[1:])
            end += row * shape[0]
            self.places[name] = start, row
            header[name] = {
                "dtype": SAFETENSORS[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.file = file
        self.start = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(self.start + end)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Write `values` [n, ...] as rows `row`, row + 1, ... of a tensor."""
        offset, size = self.places[name]
        self.file.seek(self.start + offset + row * size)
        self.file.write(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def append_line(path: Path, line: str) -> None:
    """Append one line to a log; a line cut short by a full disk is removed. Raises StorageError."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A folder that replaces `path` when the block ends without an exception.

    Raises StorageError.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.rglob("*"):
                _flush(file)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def digest(path: Path) -> str:
    """SHA-256 of a file's whole content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(folder: Path) -> BaseFileLock:
    """Lock the folder for this process, until the lock is released or the process ends.

    Raises StorageError if another process holds it, or if the folder cannot be written.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder_lock = FileLock(folder / ".lock", blocking=False)
        try:
            folder_lock.acquire()
        except Timeout:
            raise StorageError(
                f"another process is writing to {folder}; wait for it, or choose another folder"
            ) from None
    return folder_lock


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raise the operating system's errors while `path` is written as StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {reason(error, path)}") from error


def reason(error: Exception, path: Path) -> str:
    """Why a write failed: which disk is full, or the system's own message."""
    number = getattr(error, "errno", None)
    if number is None:  # safetensors writes it into the message
        number = next((code for code in FULL if f"os error {code}" in str(error)), None)
    if number == errno.EFBIG:
        return "it would exceed the largest file size allowed here (ulimit -f)"
    if number in FULL:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        usage = shutil.disk_usage(place)
        free = f"{usage.free >> 20} of {usage.total >> 20} MiB free"
        return f"the disk that holds {place} is full ({free})"
    return str(getattr(error, "strerror", None) or error)


def _write(path: Path, write: Callable[[Path], Any]) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return path


def _flush(path: Path) -> None:
    """Flush to the disk itself: a rename may otherwise outlive the bytes it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
