"""`specdiff env`: versions, devices and caches, for bug reports."""

import os
from typing import Any

from specdiff.cli import params, terminal


def env(
    as_json: params.Json = False,
) -> None:
    """Versions, devices and caches: paste this into a bug report."""
    import torch

    from specdiff import devices, environment
    from specdiff.compiled import background, store
    from specdiff.models.gguf import cache_home

    cpu = torch.device("cpu")
    native = devices.native_half(cpu) == torch.bfloat16 and not torch.cuda.is_available()
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = (
        environment.versions()
        | environment.system()
        | {
            "cpu threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS)"
            if "OMP_NUM_THREADS" in os.environ
            else f"{torch.get_num_threads()} at most, the fastest number is measured at load",
            "cuda devices": cuda,
            "mps": torch.backends.mps.is_available(),
            "gguf weights": "as they are" if native else "expanded to float32",
            "default dtype": devices.weights_dtype_in_words(torch.device("cuda") if cuda else cpu),
            "cache": str(cache_home()),
            "compiler": background.no_compiler() or "found",
            "compiled layers": store.summary(),
            "converted models": sorted(
                p.name for p in (cache_home() / "gguf").glob("*") if not p.name.startswith(".")
            ),
        }
    )
    if as_json:
        terminal.print_json(facts)
    else:
        print("\n".join(f"{name:17} {_plain(value)}" for name, value in facts.items()))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "not installed" if value is None else str(value)
