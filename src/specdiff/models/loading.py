"""Loading of Hugging Face causal LMs: safetensors only, no remote code, complete weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from specdiff.errors import (
    ConfigError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from specdiff.models.refusals import refuse
from specdiff.weights import building, check_heads, complete

# keyword arguments of transformers' from_pretrained that neither run code nor change what a target
# computes
OPTIONS = (
    "attn_implementation",
    "device_map",
    "max_memory",
    "offload_folder",
    "quantization_config",
)


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder or hub id. Errors name the file and the fix.

    `options` go to transformers' from_pretrained (see OPTIONS); with a device_map among them,
    `device` is not used.
    """
    arguments = checked_options(options or {})
    _check_folder(Path(folder))
    config = _config(folder)
    try:
        with building():
            result: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        raise WeightsError(
            f"cannot load the weights of {str(folder)!r}: {_first_line(error)}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        files = ", ".join(p.name for p in sorted(Path(folder).glob("*.safetensors")))
        raise WeightsError(
            f"{folder}: {files or 'a *.safetensors'} cannot be read (truncated or damaged?): "
            f"{error}"
        ) from error
    model, report = result
    complete(folder, report)
    placed = "device_map" in arguments or getattr(model, "is_quantized", False)
    loaded: PreTrainedModel = model if placed else model.to(device)
    return loaded


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None. Raises UsageError naming an unknown one.

    A quantized target is placed by its device_map alone: not every format can be moved afterwards.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UsageError(f"unknown model option {unknown[0]!r}; known are {', '.join(OPTIONS)}")
    return {name: value for name, value in options.items() if value is not None}


def home(model: PreTrainedModel) -> torch.device:
    """The device of a model's embedding: tokens go in there, and logits come out.

    Other layers may lie elsewhere. Raises UnsupportedModelError if the embedding is offloaded.
    """
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":
        raise UnsupportedModelError(
            "this target's embedding is offloaded; "
            "name a device for it in model_options['device_map']"
        )
    return device


def _check_folder(path: Path) -> None:
    """Raises ConfigError or WeightsError for a local folder that holds no model."""
    if not path.is_dir():
        return
    if not (path / "config.json").exists():
        raise ConfigError(
            f"{path} holds no config.json; "
            "a target folder needs config.json, *.safetensors and a tokenizer"
        )
    if not list(path.glob("*.safetensors")):
        pickles = ", ".join(p.name for p in path.glob("*.bin"))
        hint = (
            f" ({pickles} is a pickle, which can run code and is never opened: "
            "convert it to safetensors)"
        )
        raise WeightsError(f"{path} holds no *.safetensors{hint if pickles else ''}")


def _config(folder: Path | str) -> PretrainedConfig:
    """The config of a model that can be served."""
    path = Path(folder)
    file = path / "config.json"
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError, ArithmeticError) as error:
        if path.is_dir():
            raise ConfigError(
                f"{file} describes no model that can be built: {_first_line(error)}"
            ) from error
        raise UnknownNameError(
            f"cannot load the model {str(folder)!r}: {_first_line(error)}"
        ) from error
    refuse(config)
    check_heads(config, str(file))
    if getattr(config, "auto_map", None):
        raise UnsupportedModelError(
            f"{folder}: config.json asks for its own code (auto_map), which is never run"
        )
    return config


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
