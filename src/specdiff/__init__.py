"""specdiff: lossless speculative decoding of Hugging Face causal LMs with diffusion drafters.

    lm = specdiff.load("smollm2-135m")
    print(lm.generate("Write a haiku about rain", max_tokens=64).text)

Importing this package imports neither transformers nor rich; public names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time each name is imported on first use
    from specdiff import decode
    from specdiff.drafters.base import Drafter
    from specdiff.errors import SpecdiffError
    from specdiff.hf.custom_generate import custom_generate
    from specdiff.noise import Purpose
    from specdiff.stats import Stats
    from specdiff.targets.base import Target
    from specdiff.text.conversation import Conversation
    from specdiff.text.generation import Generation
    from specdiff.text.lm import SpeculativeLM
    from specdiff.text.load import load
    from specdiff.types import Batch, Context, Draft, Round, SamplingParams, TargetInfo

_HOME = {
    "Batch": "types",
    "Context": "types",
    "Conversation": "text.conversation",
    "Draft": "types",
    "Drafter": "drafters.base",
    "Generation": "text.generation",
    "Purpose": "noise",
    "Round": "types",
    "SamplingParams": "types",
    "SpecdiffError": "errors",
    "SpeculativeLM": "text.lm",
    "Stats": "stats",
    "Target": "targets.base",
    "TargetInfo": "types",
    "custom_generate": "hf.custom_generate",
    "decode": None,
    "load": "text.load",
}

__all__ = [
    "Batch",
    "Context",
    "Conversation",
    "Draft",
    "Drafter",
    "Generation",
    "Purpose",
    "Round",
    "SamplingParams",
    "SpecdiffError",
    "SpeculativeLM",
    "Stats",
    "Target",
    "TargetInfo",
    "custom_generate",
    "decode",
    "load",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'specdiff' has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return import_module(f"specdiff.{name}")
    return getattr(import_module(f"specdiff.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
