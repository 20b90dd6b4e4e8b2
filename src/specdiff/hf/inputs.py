"""Inputs of custom_generate: refusals of what cannot be served, and prompts without padding.

Shapes: B rows, P prompt width with its padding.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from specdiff.drafters.base import Drafter
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.stats import Stats

PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# model inputs that transformers prepares for its own loop; others would change the logits
PREPARED = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
)


def check_types(drafter: Any, options: Any, verifier: Any, stats: Any) -> None:
    """Raises UsageError for an argument of a wrong type."""
    if not isinstance(drafter, (str, os.PathLike, Drafter)):
        kinds = "a name, a folder or a specdiff.Drafter"
        raise UsageError(f"drafter must be {kinds}, not {drafter!r}; 'none' disables drafting")
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"drafter_options must be a mapping of keyword arguments, not {options!r}")
    if not isinstance(verifier, str):
        raise UsageError(f"verifier must be a name, not {verifier!r}")
    if stats is not None and not isinstance(stats, Stats):
        raise UsageError(f"stats must be a specdiff.Stats, not {stats!r}")


def refuse(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> None:
    """Raises an error if the answer could differ from that of plain `generate`."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"a {model.config.model_type} model encodes its prompt separately from its answer, "
            "which cannot be drafted for"
        )
    mode = config.get_generation_mode()
    if mode not in PLAIN:
        raise UsageError(
            "custom_generate=specdiff.custom_generate does greedy search and sampling, not "
            f"{mode.value}; leave out the option that asks for it (num_beams, penalty_alpha, "
            "prompt_lookup_num_tokens, ...), or custom_generate"
        )
    if model.training:
        raise UsageError(
            "the model is in training mode, where dropout changes its distribution at every pass; "
            "call model.eval() first"
        )
    inner = [
        name for name in ("output_attentions", "output_hidden_states") if getattr(config, name)
    ]
    if inner:
        raise UsageError(
            f"{inner[0]} cannot be given: positions are scored several at a time; leave it out, "
            "or custom_generate"
        )
    cache = model_kwargs.get("past_key_values")
    # transformers' mark of a cache that the user passed
    if cache is not None and "_is_user_defined" in vars(cache):
        raise UsageError(
            "past_key_values cannot be continued; leave it out, "
            "and give the whole text as input_ids"
        )
    unknown = sorted(
        name for name, value in model_kwargs.items() if name not in PREPARED and not is_empty(value)
    )
    if unknown:
        raise UsageError(
            f"{unknown[0]} as model input is not supported: drafts are token ids alone; "
            "leave it out, or custom_generate"
        )


def is_empty(value: Any) -> bool:
    """None, or a collection of nothing else, as transformers prepares for absent images, say."""
    if isinstance(value, Mapping):
        return all(is_empty(part) for part in value.values())
    return value is None or (isinstance(value, Sequence) and all(is_empty(part) for part in value))


def unpadded(input_ids: Int[Tensor, "B P"], model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The rows without their padding.

    Raises UsageError if padding is not on the left, or positions are not counted from its end.
    """
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.long()
    holes = bool((mask[:, -1:] != 1).any()) or bool((mask.diff(dim=1) < 0).any())
    if not input_ids.shape[1] or holes:
        raise UsageError(
            "attention_mask must be zeros, then ones up to the end of each row; tokenize with "
            "padding_side='left', and give the mask (without one, transformers takes every pad "
            "token for padding, inside a text too)"
        )
    positions = model_kwargs.get("position_ids")
    default = (mask.cumsum(1) - 1) * mask
    if positions is not None and (
        positions.shape[-1] != mask.shape[1] or bool((positions * mask != default).any())
    ):
        raise UsageError("position_ids must count the attended tokens from 0; leave them out")
    return [row[-int(n) :].tolist() for row, n in zip(input_ids, mask.sum(1), strict=True)]
