"""z-lab's DFlash, DeepSpec's DSpark, and transformers' DFlash assistant.

In all three, layer id i is transformers' `hidden_states[i + 1]`, hence our tap i. A DFlash slot j
predicts anchor + j, and slot 0 nothing; a DeepSpec slot j predicts anchor + j + 1. DFlash borrows
the embedding and the head, DeepSpec's files hold them. Sliding layers bound what a slot sees by
the distance to its own position, as attention kernels do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specdiff import weights
from specdiff.errors import ConfigError
from specdiff.nn import block_checkpoint as common
from specdiff.nn.block_checkpoint import Checkpoint, TargetTables
from specdiff.nn.block_config import BlockConfig, layer_numbers
from specdiff.nn.block_speculators import heads

DEEPSPEC = ("Qwen3DSparkModel", "Gemma4DSparkModel")
ASSISTANT = "muse_glimmer_assistant"  # the family whose drafter transformers' DFlash runs
OPTIONS = {
    "mask_token_id", "target_layer_ids", "block_size", "num_target_layers",
    "causal", "causal_head", "mask_token", "attention_mode",
}  # fmt: skip


def read(folder: Path, data: Mapping[str, Any]) -> Checkpoint:
    """A z-lab folder's drafter. Raises ConfigError or WeightsError, naming what is unsupported."""
    where = str(folder / weights.CONFIG)
    options = weights.section(data, "dflash_config", where)
    architectures = data.get("architectures") or ["DFlashDraftModel"]
    if architectures != ["DFlashDraftModel"]:
        raise ConfigError(
            f"{where}: the drafter {', '.join(map(str, architectures))} is not supported, only "
            "DFlashDraftModel"
        )
    unknown = sorted(key for key in options.keys() - OPTIONS if options[key])
    if unknown or options.get("attention_mode", "gqa") not in ("gqa", "mha"):
        raise ConfigError(
            f"{where}: dflash_config asks for {weights.few(unknown) or 'attention_mode'}, "
            "which is not supported"
        )
    layers = common.layer_config(_without(data, "dflash_config"), where)
    values = common.backbone(layers)
    causal = any(
        weights.field({key: False, **options}, key, bool, where)
        for key in ("causal", "causal_head")
    )
    size = {"block_size": data.get("block_size") or options.get("block_size")}
    values |= _spans(layers, where)
    values |= {
        "block_size": weights.positive(size, "block_size", where),
        "mask_token_id": weights.field(options, "mask_token_id", int, where),
        "taps": _taps(data, options, values["layers"], where),
        "causal_layers": tuple(range(values["layers"])) if causal else (),
        "sample_from_anchor": False,
        "direct": False,
    }
    return Checkpoint(_config(values, where), weights.read_tensors(folder))


def read_deepspec(folder: Path, data: Mapping[str, Any]) -> Checkpoint:
    """A DeepSpec folder's drafter. Raises ConfigError or WeightsError likewise."""
    where = str(folder / weights.CONFIG)
    if data["architectures"] != [DEEPSPEC[0]]:
        raise ConfigError(
            f"{where}: {data['architectures'][0]} is not supported, only {DEEPSPEC[0]}"
        )
    layers = common.layer_config(data, where)
    tensors = common.renamed(weights.read_tensors(folder))
    if data.get("tie_word_embeddings") and "embedding" in tensors and "head" not in tensors:
        tensors["head"] = tensors["embedding"]
    ids = layer_numbers(data, "target_layer_ids", where)
    if min(ids, default=0) < 0:
        raise ConfigError(
            f"{where}: target_layer_ids {list(ids)} reads the embedding (-1), but only outputs of "
            "layers are supported"
        )
    values = common.backbone(layers) | _spans(layers, where)
    values |= heads({"enable_confidence_head": False, **data}, where)
    values |= {
        "block_size": weights.positive(data, "block_size", where),
        "mask_token_id": weights.field(data, "mask_token_id", int, where),
        "taps": ids,
        "own_embedding": "embedding" in tensors,
        "own_head": "head" in tensors,
        "direct": False,
    }
    return Checkpoint(_config(values, where), tensors)


def encode(
    checkpoint: Checkpoint, target: TargetTables
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """z-lab's config.json and tensors. Raises ConfigError, naming what has no place there."""
    config = checkpoint.config
    common.check_target(config, target)
    problems = _problems(checkpoint, target)
    if config.window is not None and config.window_from == "anchor":
        problems.append(
            f"the window of {config.window} counted from the anchor (use window = null)"
        )
    if config.causal_layers and len(set(config.causal_layers)) != config.layers:
        problems.append(f"causal layers {list(config.causal_layers)} other than all")
    common.refuse("dflash", problems)
    window = None if config.window is None else config.window + 1  # an exclusive distance there
    options: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.taps),
    }
    if config.causal_layers:
        options["causal"] = True
    data = {
        "architectures": ["DFlashDraftModel"],
        **common.layer_json(config, window, target.max_positions),
        "block_size": config.block_size,
        "num_target_layers": target.layers,
        "dflash_config": options,
    }
    return data, common.exported(checkpoint.tensors)


def encode_assistant(
    checkpoint: Checkpoint, target: TargetTables
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers' `generate(assistant_model=..., speculation_type="dflash")` runs.

    Raises ConfigError, naming what has no place.
    """
    config = checkpoint.config
    common.check_target(config, target)
    problems = _problems(checkpoint, target)
    if config.window is not None:
        problems.append(f"the window of {config.window} (use window = null)")
    if config.causal_layers:
        problems.append("causal layers")
    common.refuse("transformers", problems)
    names = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    tensors = common.exported(checkpoint.tensors)
    layers = common.layer_json(config, None, target.max_positions)
    unused = ("vocab_size", "use_sliding_window", "sliding_window", "attention_bias", "rope_theta")
    data = {
        **{key: value for key, value in layers.items() if key not in unused},
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": ASSISTANT,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.taps),
    }
    return data, {names.get(name, name): tensor for name, tensor in tensors.items()}


def _problems(checkpoint: Checkpoint, target: TargetTables) -> list[str]:
    """What neither z-lab's nor transformers' DFlash can hold."""
    config = checkpoint.config
    problems = []
    if config.direct:
        problems.append("the direct path (train with direct = false)")
    if config.sample_from_anchor:
        problems.append("slots that predict from the anchor on (sample_from_anchor)")
    if config.markov_rank:
        problems.append("a Markov head")
    if config.confidence_head:
        problems.append("a confidence head")
    if config.draft_vocab_size is not None:
        problems.append(f"a draft vocabulary of {config.draft_vocab_size} tokens")
    problems += [
        f"the drafter's own {name}, which is not the target's"
        for name in common.own_tables(checkpoint, target)
    ]
    return problems


def _taps(
    data: Mapping[str, Any], options: Mapping[str, Any], count: int, where: str
) -> tuple[int, ...]:
    """The config's layer ids, or z-lab's default: spread evenly, rounded half to even."""
    if options.get("target_layer_ids") is not None:
        return layer_numbers(options, "target_layer_ids", where)
    total = weights.positive({**options, **data}, "num_target_layers", where)
    if count == 1:
        return (total // 2,)
    return tuple(round(1 + layer * (total - 4) / (count - 1)) for layer in range(count))


def _spans(layers: Any, where: str) -> dict[str, Any]:
    sliding = common.sliding_layers(layers, where)
    if not sliding:
        return {"window": None}
    full = tuple(layer for layer in range(layers.num_hidden_layers) if layer not in sliding)
    return {
        "window": layers.sliding_window - 1,
        "window_from": "slot",
        "full_layers": full,
    }


def _config(values: Mapping[str, Any], where: str) -> BlockConfig:
    try:
        return BlockConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _without(data: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}
