"""Devices: their native dtypes, and moving dataclasses of tensors to them."""

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

BFLOAT16 = {"AVX-512 BF16": "avx512_bf16", "AMX": "amx_bf16"}  # what torch calls them
NO_FLOAT64 = frozenset({"mps"})  # device types
M_TRIM_THRESHOLD = -1  # numbers that mallopt defines
M_MMAP_THRESHOLD = -3


def exact(device: torch.device) -> torch.dtype:
    """The most exact float of a device: float64, or float32 on a device without it.

    Draws in float32 have 24 random bits instead of 53.
    """
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def native_half(device: torch.device) -> torch.dtype | None:
    """The 16-bit float that a device multiplies natively, so that it is faster than float32.

    bfloat16 on a CPU with AVX-512 BF16 or AMX and on CUDA from compute capability 8.0, float16 on
    earlier CUDA devices and on mps. None where 16-bit floats are only emulated.
    """
    if device.type == "cpu":
        return torch.bfloat16 if _multiplies_bfloat16() else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float16 if device.type == "mps" else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was exhausted; torch has no class for this on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def weights_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which a target is loaded unless one is named; None: the checkpoint's own."""
    return native_half(device) or torch.float32 if device.type == "cpu" else None


def weights_dtype_in_words(device: torch.device) -> str:
    """What `weights_dtype` is on a device, and why."""
    if device.type != "cpu":
        return "the checkpoint's"
    if native_half(device) is None:
        return "float32 (the processor has neither AVX-512 BF16 nor AMX for bfloat16)"
    names = [name for name, fact in BFLOAT16.items() if torch.cpu.get_capabilities().get(fact)]
    return f"bfloat16 (native: {', '.join(names)})"


def _multiplies_bfloat16() -> bool:
    facts = torch.cpu.get_capabilities()
    return any(facts.get(fact) for fact in BFLOAT16.values())


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a frozen dataclass of tensors and dataclasses, on a device.

    The same object if it is there already.
    """
    return mapped(value, lambda part: part.to(device))


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to a tensor, or to every tensor in a frozen dataclass of them.

    The same object if nothing changes.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    old = {field.name: getattr(value, field.name) for field in fields(value)}
    new = {name: mapped(part, change) for name, part in old.items()}
    if all(new[name] is old[name] for name in old):
        return value
    return replace(value, **new)


def keep_freed_memory() -> None:
    """Keep freed memory in this process; for processes that make many large tensors in a row.

    glibc would unmap every large tensor and fault its pages in again (15 % of a training step on a
    CPU). Larger ones are still unmapped: kept between tensors of every size, they fragment memory
    without end (19 GB after ten minutes of features). With another libc, nothing happens.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 26)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Give freed memory back to the system; after many large tensors were made and dropped.

    glibc would keep what lies between small objects that are still in use. With another libc,
    nothing happens.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)
