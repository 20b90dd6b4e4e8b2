"""What the block drafters' file formats share: the tensors' names and the Qwen3 part of the config.

Shapes: V target vocabulary, H width, C columns of the logits, R Markov rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from specdiff.errors import ConfigError, WeightsError
from specdiff.nn.block_config import BlockConfig

SLIDING = "sliding_attention"
FULL = "full_attention"
# the names of BlockNetwork's tensors in these formats; all others are equal
RENAMED = {
    "markov_head.w1.weight": "markov_head.markov_w1.weight",
    "markov_head.w2.weight": "markov_head.markov_w2.weight",
    "embedding": "embed_tokens.weight",
    "head": "lm_head.weight",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A drafter as it lies in a folder; `tensors` under the names of `BlockNetwork`."""

    config: BlockConfig
    tensors: dict[str, Tensor]
    target: str | None = None


@dataclass(frozen=True, slots=True)
class TargetTables:
    """What an export needs of the target. `name` is its hub id or folder."""

    name: str
    architectures: Sequence[str]
    layers: int
    max_positions: int
    embedding: Float[Tensor, "V H"]
    head: Float[Tensor, "V H"]


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under BlockNetwork's names."""
    ours = {theirs: name for name, theirs in RENAMED.items()}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def exported(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BlockNetwork's tensors under the names of the formats; no tables, no draft vocabulary."""
    unnamed = ("embedding", "head", "draft_vocab")
    return {
        RENAMED.get(name, name): tensor for name, tensor in tensors.items() if name not in unnamed
    }


def layer_config(data: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The Qwen3 (or other) config, with transformers' defaults. Raises ConfigError.

    Refused are the options that BlockNetwork does not compute.
    """
    fields = dict(data)
    family = fields.pop("model_type", "qwen3")
    try:
        config: PretrainedConfig = AutoConfig.for_model(family, **fields)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    options = config.to_dict()
    rope = options.get("rope_parameters") or {}
    supported: dict[str, tuple[Any, Any]] = {
        "hidden_act": (options.get("hidden_act"), "silu"),
        "attention_bias": (options.get("attention_bias") or False, False),
        "mlp_bias": (options.get("mlp_bias") or False, False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "logit_scale": (options.get("logit_scale") or 1.0, 1.0),
        "quantization_config": (options.get("quantization_config"), None),
    }
    for name, (value, expected) in supported.items():
        if value != expected:
            raise ConfigError(
                f"{where}: {name} {value!r} is not supported in a block drafter, only {expected!r}"
            )
    if not isinstance(rope.get("rope_theta"), int | float):
        raise ConfigError(f"{where}: rope_theta must be one number, but rope_parameters is {rope}")
    return config


def backbone(config: Any) -> dict[str, Any]:
    """BlockConfig's fields for the layers."""
    heads = config.num_attention_heads
    return {
        "tokens": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "key_value_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "intermediate_size": config.intermediate_size,
        "rope_theta": float(config.rope_parameters["rope_theta"]),
        "norm_eps": float(config.rms_norm_eps),
    }


def sliding_layers(config: Any, where: str) -> tuple[int, ...]:
    """The layers of a bounded context. Raises ConfigError for unknown layer types."""
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    unknown = sorted(set(types) - {SLIDING, FULL})
    if unknown or len(types) != config.num_hidden_layers:
        raise ConfigError(
            f"{where}: layer_types must name {FULL} or {SLIDING} for each of the "
            f"{config.num_hidden_layers} layers, not {types}"
        )
    layers = tuple(layer for layer, name in enumerate(types) if name == SLIDING)
    if layers and not isinstance(config.sliding_window, int):
        raise ConfigError(f"{where}: {SLIDING} needs a sliding_window")
    return layers


def bounded_layers(config: BlockConfig) -> tuple[int, ...]:
    """The layers whose context `window` bounds."""
    if config.window is None:
        return ()
    return tuple(layer for layer in range(config.layers) if layer not in config.full_layers)


def layer_json(config: BlockConfig, window: int | None, max_positions: int) -> dict[str, Any]:
    """The Qwen3 config of a network's layers."""
    bounded = bounded_layers(config)
    return {
        "model_type": "qwen3",
        "vocab_size": config.tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": bool(bounded),
        "sliding_window": window if bounded else None,
        "layer_types": [SLIDING if layer in bounded else FULL for layer in range(config.layers)],
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def head_rows(checkpoint: Checkpoint, target: TargetTables) -> Float[Tensor, "C H"]:
    """The rows of the head that the drafter writes with, its own or the target's."""
    if checkpoint.config.own_head:
        return checkpoint.tensors["head"]
    dtype = checkpoint.tensors["fc.weight"].dtype
    if checkpoint.config.draft_vocab_size is None:
        return target.head.to(dtype)
    return target.head[checkpoint.tensors["draft_vocab"]].to(dtype)


def markov_table(checkpoint: Checkpoint, target: TargetTables) -> Float[Tensor, "V R"]:
    """W1 as a table: itself, or its product with the embedding it reads."""
    first = checkpoint.tensors["markov_head.w1.weight"]
    if checkpoint.config.markov_table:
        return first
    own = checkpoint.tensors.get("embedding")
    embedding = target.embedding if own is None else own
    return (embedding.float() @ first.float().T).to(first.dtype)


def own_tables(checkpoint: Checkpoint, target: TargetTables) -> list[str]:
    """The drafter's own tables that differ from the target's."""
    tensors = checkpoint.tensors
    rows = target.head
    if checkpoint.config.draft_vocab_size is not None:
        rows = rows[tensors["draft_vocab"]]
    pairs = {"embedding": target.embedding, "head": rows}
    return [
        name
        for name, table in pairs.items()
        if name in tensors and not torch.equal(tensors[name], table.to(tensors[name].dtype))
    ]


def check_target(config: BlockConfig, target: TargetTables) -> None:
    """Raises ConfigError if the drafter was made for a target of other sizes."""
    shape = (config.tokens, config.hidden_size)
    if tuple(target.embedding.shape) != shape or max(config.taps) >= target.layers:
        raise ConfigError(
            f"the drafter reads {shape[0]} tokens x {shape[1]} and layer {max(config.taps)}, but "
            f"the target {target.name} has {target.embedding.shape[0]} x "
            f"{target.embedding.shape[1]} and {target.layers} layers"
        )


def refuse(form: str, problems: Sequence[str]) -> None:
    """Raises ConfigError if a format cannot hold the drafter."""
    if problems:
        raise ConfigError(f"the {form} format has no place for {'; '.join(problems)}")


def draft_vocab(t2d: Tensor, tensors: Mapping[str, Tensor], size: int, where: str) -> Tensor:
    """The ids of a vocabulary mask, which must agree with `d2t`, the offsets, if there is one."""
    ids = t2d.nonzero()[:, 0]
    offsets = tensors.get("d2t")
    agree = offsets is None or bool(
        len(offsets) == len(ids) and (offsets + torch.arange(len(ids)) == ids).all()
    )
    if len(ids) != size or not agree:
        raise WeightsError(
            f"{where}: t2d marks {len(ids)} tokens, which draft_vocab_size {size} or d2t contradict"
        )
    return ids
