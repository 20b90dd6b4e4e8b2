"""Loading: a model, a drafter and a tokenizer by name, as a SpeculativeLM."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specdiff import catalog, devices
from specdiff.arguments import brief, whole
from specdiff.drafters.base import Drafter
from specdiff.errors import ConfigError, UsageError
from specdiff.models.packed import FORMS
from specdiff.targets.causal import CausalTarget
from specdiff.text import defaults
from specdiff.text.lm import SpeculativeLM
from specdiff.text.threads import checked, set_threads

QUANTIZE = ("auto", "none", *FORMS)
HARMLESS = {"attn_implementation"}  # model_options that quantized weights may have, too
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    model: str | os.PathLike[str] = catalog.DEFAULT_MODEL,
    drafter: str | os.PathLike[str] | Drafter[Any] = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "auto",
    max_len: int = 2048,
    drafter_options: Mapping[str, Any] | None = None,
    drafter_device: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    generation_config: str = "auto",
    threads: int | str | None = None,
    calibrate: bool = True,
    compile: bool | str = "auto",
) -> SpeculativeLM:
    """Load a model and the drafter that accelerates it.

    Args:
        model: hub id, local folder, file.gguf, or a built-in name (smollm2-135m).
        drafter: "auto" ("cascade" over the best bundled one for this target, else "none"),
            "none", "ngram", "block", "sedd", "autoregressive", a folder or hub id, "module:Class",
            "./file.py:Class", "cascade:" before any of these, or a Drafter.
        device: "auto" is CUDA if available, otherwise the CPU.
        dtype: "auto" is bfloat16 on a CPU that multiplies it natively and float32 on another CPU,
            the checkpoint's own elsewhere.
        quantize: "auto": a GGUF file's 4- and 8-bit weights are computed as they are, in bfloat16,
            on a CPU that computes bfloat16 natively and with dtype "auto"; all else is "none".
            "none": they are expanded to `dtype`. "int8", "int4": round the linear layers of any
            model on a CPU to 8 bits, or to 4 in groups of 32 (its head to 8); the distribution
            that is preserved is then the rounded model's.
        max_len: maximum number of tokens of prompt and answer together.
        drafter_options: keyword arguments of the drafter (steps, order, ...).
        drafter_device: device of the drafter; None: that of the target's embedding. A Drafter
            object must already be there.
        model_options: keyword arguments of transformers' from_pretrained: device_map (instead of
            `device`), max_memory, offload_folder, quantization_config, attn_implementation.
        generation_config: "auto": temperature, top_k, top_p, min_p and repetition_penalty default
            to the values in the model's generation_config.json (do_sample is ignored, as in vLLM).
            "none": they default to those of SamplingParams.
        threads: torch's number of CPU threads, for the whole process. "auto": the fastest for this
            target now, measured in 0.3 seconds or a few passes, unless OMP_NUM_THREADS is set.
            None: unchanged.
        calibrate: time a few rounds, for 0.3 seconds at most, so that `draft_len="auto"` knows
            their costs before the first request.
        compile: compile the decoder layers of a CPU target with a C++ compiler, and store them on
            disk for later processes. True: in the background, while eager layers serve. "auto": use
            what is on disk. False: eager layers only. Results differ from eager ones by rounding.

    Raises UnknownNameError, ConfigError, WeightsError, UnsupportedModelError or DrafterError, each
    naming the value and the fix.
    """
    _check_name_or_path("model", model)
    if not isinstance(drafter, (str, Drafter)):
        _check_name_or_path("drafter", drafter)
        # absolute, so that a path is never taken for a built-in name
        drafter = os.fspath(Path(drafter).expanduser().absolute())
    if generation_config not in ("auto", "none"):
        raise UsageError(
            f"unknown generation_config {generation_config!r}; known are auto and none",
            param="generation_config",
        )
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}", param="dtype")
    count = checked(threads)
    if compile not in (True, False, "auto"):
        raise UsageError(
            f"compile must be True, False or 'auto', not {brief(compile)}", param="compile"
        )
    max_len = whole("max_len", max_len)
    if max_len < 2:
        raise UsageError(f"max_len must be at least 2, not {max_len}", param="max_len")
    if device != "auto" and (model_options or {}).get("device_map") is not None:
        raise UsageError(
            f"device {device!r} and a device_map in model_options both say where the target goes; "
            "give one of them",
            param="device",
        )
    target_device = _device("device", device)
    form = _quantization(quantize, dtype, target_device, model_options or {})
    weights_dtype = DTYPES[dtype] or devices.weights_dtype(target_device)
    if form in FORMS:
        weights_dtype = torch.bfloat16
    own_device = None if drafter_device is None else _device("drafter_device", drafter_device)
    target, folder = catalog.target(model, weights_dtype, target_device, model_options, form)
    set_threads(count, target)
    if isinstance(target, CausalTarget):
        target.compile(compile)
    network = getattr(target, "model", None)
    sampling = defaults.sampling_defaults(network) if generation_config == "auto" else {}
    lm = SpeculativeLM(
        target, drafter, tokenizer_of(folder), max_len, drafter_options, own_device, sampling
    )
    if calibrate:
        lm.calibrate()
    config = getattr(network, "generation_config", None)
    if config is not None and config.eos_token_id is None and lm.end_ids:
        config.eos_token_id = [*lm.end_ids]  # so that transformers' own generate ends there too
    return lm


def _quantization(
    quantize: str, dtype: str, device: torch.device, options: Mapping[str, Any]
) -> str:
    """The `quantize` of `catalog.network`."""
    if quantize not in QUANTIZE:
        raise UsageError(
            f"unknown quantize {quantize!r}; known are {', '.join(QUANTIZE)}", param="quantize"
        )
    # how the weights are placed or packed is said there, too
    others = sorted({name for name in options if options[name] is not None} - HARMLESS)
    if quantize == "auto":
        native = device.type == "cpu" and devices.native_half(device) == torch.bfloat16
        return "auto" if native and dtype == "auto" and not others else "none"
    if quantize not in FORMS:
        return quantize
    if device.type != "cpu":
        raise UsageError(
            f"quantize {quantize!r} computes on a CPU, not on {device}; there, give "
            "model_options={'quantization_config': transformers.TorchAoConfig(...)}",
            param="quantize",
        )
    if others:
        raise UsageError(
            f"quantize {quantize!r} and model_options[{others[0]!r}] both say how the weights are "
            "loaded; give one of them",
            param="quantize",
        )
    if dtype not in ("auto", "bfloat16"):
        raise UsageError(
            f"quantize {quantize!r} computes in bfloat16, not in {dtype}; leave dtype at 'auto'",
            param="dtype",
        )
    return quantize


def tokenizer_of(folder: Path | str) -> Any:
    """The tokenizer in a model's folder or hub repository; None if there is none.

    Raises ConfigError if it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # transformers invents an empty one for some families, with an end token of its own
        return tokenizer if tokenizer.vocab_size else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        present = [p.name for p in Path(folder).glob("*token*.json")]
        if present:
            raise ConfigError(
                f"{folder}: the tokenizer ({', '.join(sorted(present))}) cannot be read: {error}"
            ) from error
        return None  # token ids work without one; text prompts then say what is missing


def _check_name_or_path(name: str, value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{name} must be a name or a path, not {brief(value)}", param=name)


def _device(param: str, name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # with its index, as tensors report it: "cuda" is cuda:0
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} is not usable here: {reason}", param=param) from None
