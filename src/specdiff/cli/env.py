"""`specdiff env`: versions, devices and caches, for bug reports."""

from typing import Any

from specdiff.cli import params, terminal


def env(
    as_json: params.Json = False,
) -> None:
    """Versions, devices and caches: paste this into a bug report."""
    import torch

    from specdiff import environment
    from specdiff.devices import native_half
    from specdiff.models.gguf import cache_home

    native = native_half(torch.device("cpu")) == torch.bfloat16 and not torch.cuda.is_available()
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = (
        environment.versions()
        | environment.system()
        | {
            "cpu threads": torch.get_num_threads(),
            "cuda devices": cuda,
            "mps": torch.backends.mps.is_available(),
            "default dtype": "the checkpoint's" if cuda else "float32",
            "gguf weights": "as they are" if native else "expanded to float32",
            "cache": str(cache_home()),
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
