"""Checkpoints: safetensors and config.json, read and written with checks. Nothing is unpickled."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
PROVENANCE = ("_name_or_path", "transformers_version")  # config keys without effect on the model
# Tensors of a checkpoint that a causal LM does not need: buffers of earlier versions of
# transformers, which are computed today, and parts that do not affect the next token of a text.
UNUSED = re.compile(
    r"(^|\.)(\w*inv_freq|(attn|attention)\.(masked_)?bias|attn\.causal_mask|position_ids"
    r"|embed_positions\.weights)$"
    r"|^(model\.)?"
    r"(mtp|v_head|vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\."
)

T = TypeVar("T")

_BUILDING = threading.RLock()


@contextmanager
def building() -> Iterator[None]:
    """Hold this while transformers builds or loads a model: one model at a time.

    It swaps methods of its base class (tie_weights) meanwhile and restores the previous ones: two
    threads at once would leave every later model without tied weights. It also loads in threads,
    and a forked process replaces torch's thread pool on first use, which two threads at once cannot
    do: this thread does it first.
    """
    with _BUILDING:
        torch.set_num_threads(torch.get_num_threads())
        yield


def locate(source: str | Path) -> Path:
    """A local folder as it is, a hub id downloaded (HF_HUB_OFFLINE and HF_TOKEN are honored).

    Raises UnknownNameError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UnknownNameError(
            f"{source!r} is neither a folder here nor a hub id that can be fetched: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ConfigError if it is absent or not a JSON object."""
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
    """The identity of a model: SHA-256 over its config.json and safetensors, in hexadecimal.

    Every byte is read on each call, as sizes and modification times can lie: 538 MB take 0.3 s
    from the page cache. Raises ConfigError or WeightsError if the folder holds no model.
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
    """`data[key]`, checked to be of `kind`. Raises ConfigError naming file, key and value."""
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
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not 0 <= value < float("inf"):
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
    """Every tensor of the folder's model.safetensors.

    Raises WeightsError if the file is absent, truncated or a pickle.
    """
    path = folder / TENSORS
    if not path.exists() and (folder / PICKLE).exists():
        raise WeightsError(
            f"{folder / PICKLE} is a pickle, which can run code when it is read, so it is not "
            "opened. Convert it once, where you trust it:  "
            f'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{PICKLE}', weights_only=True), '{TENSORS}')\""
        )
    if not path.exists():
        raise WeightsError(f"{folder} holds no {TENSORS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read (truncated or damaged?): {error}") from None


def load_into(model: nn.Module, folder: Path, ignore: Sequence[str] = (), prefix: str = "") -> None:
    """Fill every parameter and persistent buffer of `model`.

    `prefix` precedes every name in the file; `ignore` names tensors that are not loaded.

    Raises WeightsError for a missing, surplus or misshapen tensor.
    """
    tensors = read_tensors(folder)
    for name in ignore:
        tensors.pop(prefix + name, None)
    fill(model, tensors, folder, prefix)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, prefix: str = "") -> None:
    """Copy `tensors`, those of the folder, into every parameter and persistent buffer of `model`.

    Raises WeightsError for a missing, surplus or misshapen tensor.
    """
    path = folder / TENSORS
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    missing = sorted(state.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - state.keys())
    problems = []
    if missing:
        problems.append(f"lacks {few(missing)}")
    if surplus:
        problems.append(f"has unknown {few(surplus)}")
    if problems:
        raise WeightsError(
            f"{path} {' and '.join(problems)}; does its {CONFIG} describe another network?"
        )
    for name, tensor in state.items():
        source = tensors[name]
        if source.shape != tensor.shape:
            raise WeightsError(
                f"{path}: {name} has shape {list(source.shape)}, "
                f"but {CONFIG} asks for {list(tensor.shape)}"
            )
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # so that a tensor the copy misses is loud
        tensor.copy_(source)


def complete(folder: Path | str, report: Mapping[str, Any]) -> None:
    """Raise WeightsError unless transformers' loading report says that every weight was loaded.

    It names tensors that are missing (filled with random numbers), misshapen, or without a place
    in the model (dropped), except UNUSED ones.
    """
    missing = sorted(report["missing_keys"])
    mismatched = sorted(report["mismatched_keys"])
    surplus = sorted(name for name in report["unexpected_keys"] if not UNUSED.search(name))
    problems = []
    if missing:
        problems.append(f"lack {few(missing)}")
    if mismatched:
        name, actual, expected = mismatched[0]
        problems.append(f"hold {name} in shape {list(actual)}, not {list(expected)}")
    if surplus:
        problems.append(f"hold {few(surplus)}, which the model has no place for")
    if problems:
        raise WeightsError(
            f"the safetensors of {folder} {' and '.join(problems)}; "
            f"does its {CONFIG} describe another model?"
        )


def check_heads(config: Any, where: str) -> None:
    """Raise ConfigError if the width of a transformers config is no multiple of its heads."""
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
    """Write config.json and model.safetensors, each whole or not at all. Raises StorageError."""
    tensors = dict(model.state_dict())
    for name, tensor in tensors.items():
        if dtype and tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    files.write_tensors(folder / TENSORS, tensors, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, config, indent=2)


def few(names: Sequence[str]) -> str:
    """The first three names, and the number of further ones."""
    head = ", ".join(names[:3])
    return f"{head} and {len(names) - 3} more" if len(names) > 3 else head
