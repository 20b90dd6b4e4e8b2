"""Tiny random block drafters of every convention, and the states of one of their blocks."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny
from specdiff.nn.block import BlockConfig, BlockNetwork
from specdiff.nn.block_checkpoint import Checkpoint, TargetTables
from specdiff.nn.block_masks import layer_masks

CONFIG = BlockConfig(
    tokens=tiny.VOCAB, hidden_size=tiny.WIDTH, layers=2, heads=4, key_value_heads=2, head_dim=8,
    intermediate_size=64, block_size=5, mask_token_id=47, taps=(0, 2), window=None, direct=False,
    norm_eps=1e-6, rope_theta=5000.0,
)  # fmt: skip


def network(seed: int = 0, **changes: Any) -> BlockNetwork:
    """Every parameter and own table is random."""
    config = replace(CONFIG, **changes)
    generator = torch.Generator().manual_seed(seed)
    model = BlockNetwork(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name != "draft_vocab":
                tensor.normal_(std=0.3, generator=generator)
                tensor.add_("norm" in name)  # the scale of a norm is near 1
        if config.draft_vocab_size is not None:
            words = torch.randperm(config.tokens, generator=generator)
            model.draft_vocab.copy_(words[: config.draft_vocab_size].sort().values)
    return model.eval()


def target(family: str, seed: int = 0) -> PreTrainedModel:
    """A causal LM of four layers, "llama" or "qwen3", whose greedy text is no repetition."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCAB, "hidden_size": tiny.WIDTH, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


def checkpoint(model: BlockNetwork) -> Checkpoint:
    return Checkpoint(model.config, dict(model.state_dict()))


def target_tables(model: Any, name: str) -> TargetTables:
    """Of a causal LM of transformers."""
    return TargetTables(
        name=name,
        architectures=model.config.architectures or [type(model).__name__],
        layers=model.config.num_hidden_layers,
        max_positions=model.config.max_position_embeddings,
        embedding=model.get_input_embeddings().weight.detach(),
        head=model.get_output_embeddings().weight.detach(),
    )


def block_states(model: BlockNetwork, features: Tensor, ids: Tensor, anchor: int) -> Tensor:
    """The states [Q, H] of one block after the context before `anchor`; features are [L, T*H]."""
    config = model.config
    size = config.block_size
    with torch.no_grad():
        context = model.context(features[None, :anchor])
        slots = model.slots(ids[None, anchor : anchor + 1], context[:, -1:], size)[:, 0]
        keys = torch.arange(anchor + size)[None]
        queries = keys[:, anchor:]
        masks = layer_masks(
            config,
            torch.ones(1, 1, size, anchor + size, dtype=torch.bool),
            queries,
            torch.full_like(queries, anchor),
            keys,
            keys >= anchor,
        )
        return model(slots, context, keys, masks)[0]


def fit(model: BlockNetwork, features: Tensor, text: Tensor, steps: int = 120) -> None:
    """Teach a drafter one text, so that drafts are accepted: every anchor, cross-entropy."""
    config = model.config
    size, first = config.block_size, config.first_slot
    anchors = torch.arange(4, len(text) - size)
    offsets = torch.arange(size)
    queries = (anchors[:, None] + offsets).flatten()
    labels = (anchors[:, None] + offsets[first:] + 1 - first).flatten()
    block = torch.arange(len(anchors)).repeat_interleave(size)
    context = torch.arange(len(text))[None] < anchors.repeat_interleave(size)[:, None]
    mask = torch.cat([context, block[:, None] == block], dim=1)[None, None]
    positions = torch.cat([torch.arange(len(text)), queries])[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        states = model.context(features[None])
        slots = model.slots(text[anchors][None], states[:, anchors - 1], size)
        out = model(slots.flatten(1, 2), states, positions, mask)
        logits = model.logits(out.unflatten(1, (-1, size))[0, :, first:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
