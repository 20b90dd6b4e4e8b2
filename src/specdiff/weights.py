"""safetensors and config.json in and out, with the errors people need. Nothing is ever unpickled."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from specdiff import files
from specdiff.errors import ConfigError, UnknownNameError, WeightsError

CONFIG = "config.json"
TENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
PROVENANCE = (
    "_name_or_path",
    "transformers_version",
)  # config keys that say who wrote it, not what it computes
# Tensors of a checkpoint that a causal LM can do without: buffers of earlier versions of transformers, which are computed
# today, and parts of the checkpoint that have no share in the next token of a text.
UNUSED = re.compile(
    r"(^|\.)(\w*inv_freq|(attn|attention)\.(masked_)?bias|attn\.causal_mask|position_ids|embed_positions\.weights)$"
    r"|^(model\.)?(mtp|v_head|vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\."
)

T = TypeVar("T")

# transformers swaps methods of its base class (tie_weights) while it builds or loads a model, and puts back what it saw:
# two threads at once leave every later model without tied weights
BUILDING = threading.RLock()


def locate(source: str | Path) -> Path:
    """A local folder as it is, a hub id downloaded (HF_HUB_OFFLINE and HF_TOKEN honoured). Raises UnknownNameError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownNameError(
            f"{source!r} is neither a folder here nor a hub id that can be fetched: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dict. Raises ConfigError if it is absent or not a JSON object."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no {CONFIG}; a drafter folder needs {CONFIG} and {TENSORS}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def fingerprint(folder: Path) -> str:
    """The identity of a model: SHA-256 over its config.json and the whole content of its safetensors, in hexadecimal.

    Every byte is read on each call, as sizes and modification times can lie: 538 MB take 0.3 s from the page cache.
    Raises ConfigError or WeightsError if the folder holds no model.
    """
    config = read_config(folder)
    described = {key: value for key, value in config.items() if key not in PROVENANCE}
    identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    tensors = sorted(folder.glob("*.safetensors"))
    if not tensors:
        raise WeightsError(f"{folder} holds no *.safetensors")
    for path in tensors:
        identity.update(f"\n{path.name} {files.digest(path)}".encode())
    return identity.hexdigest()


def field(data: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """`data[key]`, checked to be of `kind`. Raises ConfigError naming the file, the key and the value found."""
    if key not in data:
        raise ConfigError(f"{where} lacks the key {key!r} ({kind.__name__})")
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"{where}: {key} must be of type {kind.__name__}, not {value!r}")
    return value


def positive(data: Mapping[str, Any], key: str, where: str) -> int:
    """`data[key]`, an integer of at least 1."""
    value = field(data, key, int, where)
    if value < 1:
        raise ConfigError(f"{where}: {key} must be at least 1, not {value}")
    return value


def number(data: Mapping[str, Any], key: str, where: str) -> float:
    """`data[key]`, a finite number >= 0 (JSON writes 20 for 20.0)."""
    value = data[key]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < float("inf")
    ):
        raise ConfigError(f"{where}: {key} must be a number >= 0, not {value!r}")
    return float(value)


def section(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """`data[key]` as a nested object."""
    return field(data, key, dict, where)


def choice(data: Mapping[str, Any], key: str, allowed: Sequence[str], where: str) -> str:
    """`data[key]`, one of the `allowed` strings."""
    value = field(data, key, str, where)
    if value not in allowed:
        raise ConfigError(f"{where}: {key} is {value!r}; known are {', '.join(allowed)}")
    return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's model.safetensors. Raises WeightsError if it is absent, truncated or a pickle."""
    path = folder / TENSORS
    if not path.exists() and (folder / PICKLE).exists():
        raise WeightsError(
            f"{folder / PICKLE} is a pickle, which can run code when it is read, so it is not opened. Convert it once, where you "
            f'trust it:  python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{PICKLE}', weights_only=True), '{TENSORS}')\""
        )
    if not path.exists():
        raise WeightsError(f"{folder} holds no {TENSORS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read (truncated or damaged?): {error}") from None


def load_into(model: nn.Module, folder: Path, ignore: Sequence[str] = (), prefix: str = "") -> None:
    """Fill every parameter and persistent buffer of `model`; a missing, surplus or misshapen tensor is an error.

    `prefix` stands before every name in the file.
    """
    path, tensors = folder / TENSORS, read_tensors(folder)
    for name in ignore:
        tensors.pop(prefix + name, None)
    wanted = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    missing, surplus = (
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
    )
    if missing or surplus:
        told = [f"lacks {few(missing)}"] * bool(missing) + [f"has unknown {few(surplus)}"] * bool(
            surplus
        )
        raise WeightsError(
            f"{path} {' and '.join(told)}; does its {CONFIG} describe another network?"
        )
    for name, tensor in wanted.items():
        found = tensors[name]
        if found.shape != tensor.shape:
            raise WeightsError(
                f"{path}: {name} has shape {list(found.shape)}, but {CONFIG} asks for {list(tensor.shape)}"
            )
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # so that a tensor the copy misses is loud
        tensor.copy_(found)


def complete(folder: Path | str, report: Mapping[str, Any]) -> None:
    """Refuse what transformers' loading report says it filled with random numbers, or dropped.

    Raises WeightsError naming tensors that are missing, misshapen, or without a place in the model (but see UNUSED).
    """
    missing = sorted(report["missing_keys"])
    surplus = sorted(name for name in report["unexpected_keys"] if not UNUSED.search(name))
    problems = [f"lack {few(missing)}"] * bool(missing)
    problems += [
        f"hold {name} in shape {list(is_)}, not {list(asked)}"
        for name, is_, asked in sorted(report["mismatched_keys"])[:1]
    ]
    problems += [f"hold {few(surplus)}, which the model has no place for"] * bool(surplus)
    if problems:
        raise WeightsError(
            f"the safetensors of {folder} {' and '.join(problems)}; does its {CONFIG} describe another model?"
        )


def check_heads(config: Any, where: str) -> None:
    """Raise ConfigError if the width of a transformers config cannot be split evenly over its attention heads."""
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int) or getattr(text, "head_dim", None):
        return
    if heads < 1 or width % heads:
        raise ConfigError(
            f"{where}: the width {width} is not a multiple of the {heads} attention heads"
        )


def save(
    model: nn.Module, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write config.json and model.safetensors; each file appears whole or not at all. Raises StorageError."""
    state = model.state_dict().items()
    tensors = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in state
    }
    files.write_tensors(folder / TENSORS, tensors, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, config, indent=2)


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
