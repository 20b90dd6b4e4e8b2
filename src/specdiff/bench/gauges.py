"""Memory and energy of one run, as far as the device tells.

Memory is a high-water mark of the whole process: every baseline's weights are in it. `growth` is what the run itself added.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. kind: "rss" (the process's resident memory) or "cuda" (what torch has allocated there)."""

    kind: str
    peak: int
    growth: int


def watch_memory(device: torch.device) -> Callable[[], Memory | None]:
    """Start a high-water mark; call the answer at the end. None where the system has no mark that can be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)

        def told() -> Memory | None:
            peak = torch.cuda.max_memory_allocated(device)
            return Memory("cuda", peak, peak - before)

        return told
    try:
        CLEAR.write_text("5", encoding="ascii")  # Linux: start VmHWM anew
        level = _status("VmRSS")
    except (OSError, StopIteration):
        return lambda: None
    return lambda: Memory("rss", peak := _status("VmHWM"), max(0, peak - level))


def _status(name: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def joules(device: torch.device) -> Callable[[], float] | None:
    """A counter of joules spent so far (of the whole GPU, or CPU package); None where the device reports none."""
    if device.type == "cuda" and util.find_spec("pynvml") is not None:
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(
                f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            )
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    if device.type == "cpu":
        with suppress(OSError, ValueError):
            int(RAPL.read_text(encoding="ascii"))
            return lambda: int(RAPL.read_text(encoding="ascii")) / 1e6
    return None
