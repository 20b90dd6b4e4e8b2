"""A drafter loaded and run by the `speculators` package; a test skips where it is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny


def load_theirs(folder: Path) -> Any:
    """The package's own model; it runs on a CPU with eager attention."""
    pytest.importorskip("speculators", reason="the package speculators is not installed")
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(folder, config=config).float().eval()


def run_theirs(model: Any, features: Tensor, ids: Tensor, anchors: int) -> dict[int, Any]:
    """Anchor -> states, logits (Markov head included) and confidences of its slots."""
    length = len(ids)
    with torch.no_grad():
        hidden, logits, _, _, indices = model._backbone_forward(
            features[None],
            ids[None],
            torch.ones(1, length),
            torch.zeros(1, length, tiny.WIDTH),
            torch.zeros(1, length, dtype=torch.long),
            max_anchors=anchors,
        )
    size = model.block_size
    hidden, logits = hidden[0].unflatten(0, (-1, size)), logits[0].unflatten(0, (-1, size))
    positions = indices.view(-1, size)
    previous = ids[positions]
    if not model.config.sample_from_anchor:
        previous = torch.cat([previous[:, :1], previous[:, :-1]], dim=1)
    confidence = [None] * len(hidden)
    if getattr(model, "markov_head", None) is not None:
        with torch.no_grad():
            logits = logits + model.markov_head.block_bias(
                prev_token_ids=previous, hidden_states=hidden
            )
            if model.confidence_head is not None:
                inputs = hidden
                if model.config.confidence_head_with_markov:
                    vectors = model.markov_head.prev_embeddings(previous)
                    inputs = torch.cat([hidden, vectors], dim=-1)
                confidence = model.confidence_head(inputs).sigmoid()
    starts = positions[:, 0].tolist()
    return {
        start: (hidden[i], logits[i], confidence[i], previous[i]) for i, start in enumerate(starts)
    }
