"""DFlash and DSpark as vLLM's `speculators` package stores them.

Its layer id i is transformers' `hidden_states[i]`, hence our tap i - 1. Slot j predicts anchor + j,
or anchor + j + 1 with `sample_from_anchor`, which is DSpark's default and not DFlash's. In sliding
layers all slots see the `sliding_window` positions before the anchor, and, unless
`sliding_window_non_causal`, no later slot. The embedding and a head of the whole vocabulary are
always the verifier's, whatever the file holds; a head of a draft vocabulary is the file's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff import weights
from specdiff.errors import ConfigError
from specdiff.nn import block_checkpoint as common
from specdiff.nn.block_checkpoint import Checkpoint, TargetTables
from specdiff.nn.block_config import BlockConfig, layer_numbers

FORM = "speculators"
VERSION = "0.9.0"  # of the layout written here
KINDS = ("dflash", "dspark")
# what the file may hold though speculators takes it from the verifier
VERIFIERS = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")


def read(folder: Path, data: Mapping[str, Any]) -> Checkpoint:
    """A folder's drafter. Raises ConfigError or WeightsError, naming what is not supported."""
    where = str(folder / weights.CONFIG)
    kind = weights.choice(data, "speculators_model_type", KINDS, where)
    layers = common.layer_config(weights.section(data, "transformer_layer_config", where), where)
    values = common.backbone(layers)
    width = data.get("target_hidden_size")
    if width not in (None, values["hidden_size"]):
        raise ConfigError(
            f"{where}: target_hidden_size {width} differs from hidden_size "
            f"{values['hidden_size']}, which is not supported"
        )
    ids = layer_numbers(data, "aux_hidden_state_layer_ids", where)
    if 0 in ids:
        raise ConfigError(
            f"{where}: aux_hidden_state_layer_ids {list(ids)} reads the embedding (0), but only "
            "outputs of layers are supported"
        )
    sliding = common.sliding_layers(layers, where)
    values |= _spans(sliding, layers, data, where)
    values |= {
        "block_size": weights.positive(data, "block_size", where),
        "mask_token_id": weights.field(data, "mask_token_id", int, where),
        "taps": tuple(layer - 1 for layer in ids),
        "sample_from_anchor": _flag(data, "sample_from_anchor", kind == "dspark", where),
        "direct": False,
    }
    tensors = weights.read_tensors(folder)
    for name in VERIFIERS:
        tensors.pop(name, None)
    size = weights.positive(data, "draft_vocab_size", where)
    if size == values["tokens"]:
        for name in ("lm_head.weight", "t2d", "d2t"):
            tensors.pop(name, None)
    else:
        values["draft_vocab_size"] = size
        values["own_head"] = "lm_head.weight" in tensors
        tensors["draft_vocab"] = _draft_vocab(tensors, size, folder)
    if kind == "dspark":
        values |= heads(data, where)
    verifier = (data.get("speculators_config") or {}).get("verifier") or {}
    try:
        config = BlockConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Checkpoint(config, common.renamed(tensors), verifier.get("name_or_path"))


def heads(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """BlockConfig's fields for DSpark's Markov and confidence heads.

    Raises ConfigError for a gated or recurrent Markov head.
    """
    rank = weights.field({"markov_rank": 256, **data}, "markov_rank", int, where)
    kind = data.get("markov_head_type", "vanilla")
    if rank and kind != "vanilla":
        raise ConfigError(f"{where}: markov_head_type {kind!r} is not supported, only 'vanilla'")
    values: dict[str, Any] = {"markov_rank": rank, "markov_table": rank > 0}
    if _flag(data, "enable_confidence_head", True, where):
        with_markov = _flag(data, "confidence_head_with_markov", True, where)
        values["confidence_head"] = "states+markov" if with_markov else "states"
    return values


def encode(
    checkpoint: Checkpoint, target: TargetTables
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors of a drafter. Raises ConfigError, naming what has no place."""
    config = checkpoint.config
    common.check_target(config, target)
    bounded = common.bounded_layers(config)
    common.refuse(FORM, _problems(checkpoint, target, bounded))
    tensors = common.exported(checkpoint.tensors)
    if config.markov_rank:
        tensors["markov_head.markov_w1.weight"] = common.markov_table(checkpoint, target)
    if config.draft_vocab_size is not None:
        ids = checkpoint.tensors["draft_vocab"]
        tensors["lm_head.weight"] = common.head_rows(checkpoint, target)
        tensors["t2d"] = torch.zeros(config.tokens, dtype=torch.bool).index_fill(0, ids, True)
        tensors["d2t"] = ids - torch.arange(len(ids))
    # DFlash that samples from the anchor is DSpark without its heads: vLLM serves that
    dspark = bool(config.sample_from_anchor or config.markov_rank or config.confidence_head)
    kind = "dspark" if dspark else "dflash"
    data: dict[str, Any] = {
        "architectures": ["DSparkSpeculator" if dspark else "DFlashSpeculator"],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "speculators_config": _proposal(config, kind, target),
        "transformer_layer_config": common.layer_json(config, config.window, target.max_positions),
        "draft_vocab_size": config.draft_vocab_size or config.tokens,
        "block_size": config.block_size,
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.taps],
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": bool(bounded) and not config.causal_layers,
        "sample_from_anchor": config.sample_from_anchor,
        "tie_word_embeddings": False,
    }
    if dspark:
        data |= {
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": config.confidence_head is not None,
            "confidence_head_with_markov": config.confidence_head == "states+markov",
        }
    return data, tensors


def _problems(checkpoint: Checkpoint, target: TargetTables, bounded: tuple[int, ...]) -> list[str]:
    config = checkpoint.config
    problems = []
    if config.direct:
        problems.append("the direct path (train with direct = false)")
    if bounded and config.window_from == "slot":
        problems.append("a window counted from each slot")
    if config.causal_layers and set(config.causal_layers) != set(bounded):
        problems.append(
            f"causal layers {list(config.causal_layers)} other than the sliding ones "
            f"{list(bounded)}"
        )
    replaced = common.own_tables(checkpoint, target)
    if config.draft_vocab_size is not None:
        replaced = [name for name in replaced if name != "head"]
    problems += [f"the drafter's own {name}, which is not the target's" for name in replaced]
    return problems


def _proposal(config: BlockConfig, kind: str, target: TargetTables) -> dict[str, Any]:
    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": config.draft_len,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "verifier": {"name_or_path": target.name, "architectures": list(target.architectures)},
    }


def _spans(
    sliding: tuple[int, ...], layers: Any, data: Mapping[str, Any], where: str
) -> dict[str, Any]:
    if not sliding:
        return {"window": None}
    full = tuple(layer for layer in range(layers.num_hidden_layers) if layer not in sliding)
    both_ways = _flag(data, "sliding_window_non_causal", False, where)
    return {
        "window": layers.sliding_window,
        "full_layers": full,
        "causal_layers": () if both_ways else sliding,
    }


def _draft_vocab(tensors: dict[str, Tensor], size: int, folder: Path) -> Tensor:
    where = str(folder / weights.TENSORS)
    t2d = tensors.pop("t2d", None)
    if t2d is None:
        raise ConfigError(f"{where} lacks t2d, the mask of its {size} draft tokens")
    ids = common.draft_vocab(t2d, tensors, size, where)
    tensors.pop("d2t", None)
    return ids


def _flag(data: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    return weights.field({key: default, **data}, key, bool, where)
