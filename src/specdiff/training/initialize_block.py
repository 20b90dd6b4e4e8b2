"""Initial block drafters: from scratch, or from an earlier one.

Shapes: none of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specdiff.data.corpus import Corpus
from specdiff.errors import ConfigError, UsageError
from specdiff.nn.block import BlockConfig, BlockNetwork
from specdiff.training.features import default_layers
from specdiff.training.initialize import _final_norm, check_taps
from specdiff.training.recipe import Recipe
from specdiff.training.task import most_frequent

DEVIATION = 0.02  # of the initial weights


def block(
    recipe: Recipe, corpus: Corpus, rows: Sequence[int], target: PreTrainedModel
) -> BlockNetwork:
    """The block network of a recipe. Raises ConfigError or UsageError if the target does not fit.

    Embedding and head are the target's, the last norm starts as its final norm, the residual
    branches' last weights are scaled by 1/sqrt(2 layers), and direct path and Markov head add 0.
    """
    text = target.config.get_text_config()
    if recipe.init == "target":
        raise UsageError("init: target is not known for kind: block; give a folder, or null")
    if recipe.hidden_size not in (None, text.hidden_size):
        raise UsageError(
            f"hidden_size {recipe.hidden_size} does not fit the borrowed embeddings of width "
            f"{text.hidden_size}; leave it null"
        )
    network = (
        _earlier(recipe, recipe.init, text.vocab_size)
        if recipe.init
        else _fresh(recipe, corpus, rows, target)
    )
    check_taps(network.config.taps, target)
    head: Any = target.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UsageError(
            f"{target.config.model_type} has no plain output matrix to borrow, which a block "
            f"drafter needs; train --recipe sedd --set borrow_embeddings=false"
        )
    table: Any = target.get_input_embeddings()
    return network.borrow(table.weight.detach(), head.weight.detach())


def _fresh(
    recipe: Recipe, corpus: Corpus, rows: Sequence[int], target: PreTrainedModel
) -> BlockNetwork:
    text = target.config.get_text_config()
    heads = recipe.heads or text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    vocab = most_frequent(corpus, rows, text.vocab_size, recipe.draft_vocab)
    mask = recipe.mask_token_id
    if mask is None:
        mask = int(corpus.counts(rows, text.vocab_size).argmin())
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    network = BlockNetwork(
        BlockConfig(
            tokens=text.vocab_size,
            hidden_size=text.hidden_size,
            layers=recipe.blocks,
            heads=heads,
            key_value_heads=math.gcd(heads, groups),
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate_size=recipe.intermediate_size or wide,
            block_size=max(recipe.draft_lens),
            mask_token_id=mask,
            taps=recipe.taps or default_layers(text.num_hidden_layers),
            window=recipe.context_window,
            draft_vocab_size=None if vocab is None else len(vocab),
            markov_rank=recipe.markov_rank,
            direct=recipe.direct,
        )
    )
    if vocab is not None:
        network.draft_vocab.copy_(vocab)
    norm = _final_norm(target)
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and name not in ("direct", "markov_head.w2"):
                last = name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(
                    std=DEVIATION / math.sqrt(2 * recipe.blocks) if last else DEVIATION
                )
        if norm is not None:
            network.norm.weight.copy_(norm)
    return network


def _earlier(recipe: Recipe, folder: str, tokens: int) -> BlockNetwork:
    network = BlockNetwork.from_pretrained(folder)
    config = network.config
    if config.tokens != tokens:
        raise ConfigError(
            f"{folder} has a vocabulary of {config.tokens} tokens, but the target has {tokens}; "
            f"start from a drafter of this target"
        )
    plain = replace(config, confidence_head=None, own_embedding=False, own_head=False)
    if not config.uniform or config.first_slot or plain != config:
        raise UsageError(
            f"{folder} is of another layout than this recipe trains (own tables, a confidence "
            f"head, or layers that see different spans); start from a drafter of specdiff train"
        )
    if recipe.taps not in (None, config.taps) or max(recipe.draft_lens) > config.block_size:
        raise UsageError(
            f"{folder} reads layers {list(config.taps)} and drafts {config.block_size} tokens; "
            f"leave taps null and keep draft_lens within that"
        )
    return network
