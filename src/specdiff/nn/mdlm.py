"""MDLM checkpoints (Sahoo et al. 2024, `kuleshov-group/mdlm-owt`): SEDD's network as a denoiser.

Their config is flat and counts MASK, the last index, in `vocab_size`; tensor names begin with
`backbone.`. The output is neither offset by sigma nor zeroed at the current token, and sigma is 0
unless `time_conditioning` is true.
"""

from collections.abc import Mapping
from typing import Any

from specdiff import weights
from specdiff.errors import ConfigError
from specdiff.nn.sedd_config import SEDDConfig

PREFIX = "backbone."


def recognized(data: Mapping[str, Any]) -> bool:
    """Whether this is MDLM's config.json.

    Its relatives UDLM and BD3LM share the fields, not the network; their `model_type` says so.
    """
    if "model_type" in data:
        return bool(data["model_type"] == "mdlm")
    return {"hidden_dim", "model_length"} <= data.keys()


def config(data: Mapping[str, Any], where: str) -> SEDDConfig:
    """The network a flat config describes. Raises ConfigError naming a missing or bad field."""
    vocab, hidden, blocks, heads, cond, length = (
        weights.positive(data, key, where)
        for key in ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "cond_dim", "model_length")
    )
    if vocab < 2:
        raise ConfigError(f"{where}: vocab_size counts MASK, so it must be at least 2, not {vocab}")
    if hidden % heads:
        raise ConfigError(f"{where}: hidden_dim {hidden} is not a multiple of n_heads {heads}")
    defaults = {"time_conditioning": False}  # MDLM's own
    timed = weights.field({**defaults, **data}, "time_conditioning", bool, where)
    return SEDDConfig(
        vocab - 1,
        hidden,
        blocks,
        heads,
        cond,
        length,
        dropout=0.0,
        scale_by_sigma=False,
        time_conditioning=timed,
        output="denoiser",
    )
