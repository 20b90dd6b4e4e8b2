"""The file formats of block drafters: which one a folder holds, reading it, writing another.

`specdiff` is our own; `speculators` is DFlash and DSpark as the package of that name stores them
(and vLLM serves them), `dflash` is z-lab's layout, `deepspec` DeepSpec's DSpark (read only), and
`transformers` the assistant of its DFlash generator (written only).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from specdiff import files, weights
from specdiff.errors import ConfigError, UsageError
from specdiff.nn import block_dflash, block_speculators
from specdiff.nn.block_checkpoint import Checkpoint, TargetTables
from specdiff.nn.block_config import MODEL_TYPE, BlockConfig

WRITTEN = ("specdiff", "speculators", "dflash", "transformers")


def form(data: Mapping[str, Any]) -> str | None:
    """The format of a config.json; None if it is no block drafter's."""
    architectures = data.get("architectures")
    if data.get("model_type") == MODEL_TYPE:
        return "specdiff"
    if "speculators_model_type" in data:
        return "speculators"
    if isinstance(architectures, list) and set(architectures) & set(block_dflash.DEEPSPEC):
        return "deepspec"
    if "dflash_config" in data:
        return "dflash"
    if data.get("model_type") == block_dflash.ASSISTANT:
        return "transformers"
    return None


def read(folder: Path) -> Checkpoint:
    """The drafter of a folder, in any format.

    Raises ConfigError or WeightsError, naming the file and what is wrong or not supported.
    """
    data = weights.read_config(folder)
    kind = form(data)
    if kind == "speculators":
        return block_speculators.read(folder, data)
    if kind == "deepspec":
        return block_dflash.read_deepspec(folder, data)
    if kind == "dflash":
        return block_dflash.read(folder, data)
    where = folder / weights.CONFIG
    if kind == "transformers":
        raise ConfigError(
            f"{where} is transformers' own DFlash assistant, which names no vocabulary: it is "
            "written but not read; use the folder it was converted from"
        )
    config = BlockConfig.from_json(data, str(where))
    targets = data.get("targets") or [None]
    return Checkpoint(config, weights.read_tensors(folder), targets[0])


def write_own(folder: Path, checkpoint: Checkpoint, targets: Sequence[str]) -> None:
    """Write a drafter in specdiff's own layout; `targets` are the names it is found by.

    Raises StorageError.
    """
    config = checkpoint.config
    about = {"targets": list(targets), "draft_len": config.draft_len}
    _store(folder, {**config.to_json(), **about}, checkpoint.tensors)


def write(folder: Path, kind: str, checkpoint: Checkpoint, target: TargetTables) -> None:
    """Write a drafter in another tool's format, each file whole or not at all.

    Raises UsageError for an unknown format, ConfigError, naming everything the format has no place
    for, or StorageError.
    """
    encoders = {
        "speculators": block_speculators.encode,
        "dflash": block_dflash.encode,
        "transformers": block_dflash.encode_assistant,
    }
    if kind not in encoders:
        raise UsageError(
            f"unknown drafter format {kind!r}; known are {', '.join(encoders)}", param="to"
        )
    data, tensors = encoders[kind](checkpoint, target)
    dtype = str(checkpoint.tensors["fc.weight"].dtype).removeprefix("torch.")
    _store(folder, {**data, "dtype": dtype}, tensors)


def _store(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    files.write_tensors(folder / weights.TENSORS, tensors, metadata={"format": "pt"})
    files.write_json(folder / weights.CONFIG, data, indent=2)
