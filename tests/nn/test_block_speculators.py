"""Drafters exported for `speculators`, loaded and run by its own code."""

from pathlib import Path
from typing import Any

import pytest
import torch

import blocks
import tiny
from specdiff.nn import block_formats
from specdiff.nn.block import BlockNetwork
from speculators_model import load_theirs, run_theirs

SHAPES: dict[str, dict[str, Any]] = {
    "dflash": {"sample_from_anchor": False},
    "dflash, draft vocabulary": {"sample_from_anchor": False, "draft_vocab_size": 20},
    "dflash, sliding": {"sample_from_anchor": False, "window": 6},
    "dflash, one causal sliding layer": {
        "sample_from_anchor": False, "window": 6, "full_layers": (1,), "causal_layers": (0,)
    },
    "dspark without heads": {},
    "dspark": {"markov_rank": 6},
    "dspark, table": {"markov_rank": 6, "markov_table": True},
    "dspark, draft vocabulary": {"markov_rank": 6, "draft_vocab_size": 20, "window": 7},
    "dspark, own head": {"markov_rank": 6, "draft_vocab_size": 20, "own_head": True},
    "dspark, anchor unused": {"markov_rank": 6, "sample_from_anchor": False},
    "dspark, confidence": {"markov_rank": 6, "confidence_head": "states+markov"},
    "dspark, plain confidence": {"markov_rank": 6, "confidence_head": "states"},
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A tiny Qwen3, and its folder."""
    folder = tmp_path_factory.mktemp("target")
    model = blocks.target("qwen3")
    model.save_pretrained(folder)
    return model, str(folder)


def exported(model: BlockNetwork, target: tuple[Any, str], folder: Path) -> BlockNetwork:
    """Write `model` for speculators; the network that borrows this target's tables."""
    tables = blocks.target_tables(*target)
    block_formats.write(folder, "speculators", blocks.checkpoint(model), tables)
    return model.borrow(tables.embedding, tables.head)


@pytest.mark.parametrize("shape", SHAPES)
def test_speculators_computes_the_same_logits(
    tmp_path: Path, target: tuple[Any, str], shape: str
) -> None:
    ours = exported(blocks.network(**SHAPES[shape]), target, tmp_path)
    theirs = load_theirs(tmp_path)
    assert not any(bool(p.isnan().any()) for p in theirs.parameters())
    torch.manual_seed(2)
    ids = torch.randint(0, 40, (40,))
    with torch.no_grad():
        states = target[0](ids[None], output_hidden_states=True).hidden_states
    # their layer ids index transformers' hidden states; our taps count layers
    assert theirs.target_layer_ids != list(ours.config.taps)
    features = torch.cat([states[tap + 1][0] for tap in ours.config.taps], dim=-1)
    their_features = torch.cat([states[i][0] for i in theirs.target_layer_ids], dim=-1)
    blocks_of_theirs = run_theirs(theirs, their_features, ids, anchors=8)
    assert len(blocks_of_theirs) == 8
    for anchor, (hidden, logits, confidence, previous) in blocks_of_theirs.items():
        if anchor == 0:
            continue  # no context: nothing to read
        own = blocks.block_states(ours, features, ids, anchor)
        torch.testing.assert_close(own, hidden, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            bias = ours.markov(previous)
            total = ours.logits(own) + (0 if bias is None else bias)
            ours_confidence = ours.confidence(own, previous)
        torch.testing.assert_close(total, logits, rtol=1e-4, atol=1e-4)
        if confidence is None:
            assert ours_confidence is None
        else:
            torch.testing.assert_close(ours_confidence, confidence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_the_export_gives_the_same_network(
    tmp_path: Path, target: tuple[Any, str], shape: str
) -> None:
    ours = exported(blocks.network(**SHAPES[shape]), target, tmp_path)
    again = BlockNetwork.from_pretrained(tmp_path)
    again.borrow(*(getattr(blocks.target_tables(*target), t) for t in ("embedding", "head")))
    torch.manual_seed(2)
    ids = torch.randint(0, 40, (30,))
    features = torch.randn(30, 2 * tiny.WIDTH)
    for anchor in (1, 5, 20):
        own = blocks.block_states(ours, features, ids, anchor)
        other = blocks.block_states(again, features, ids, anchor)
        assert torch.equal(own, other)
        with torch.no_grad():
            assert torch.equal(ours.logits(own), again.logits(other))
            if ours.markov_head is not None:
                torch.testing.assert_close(ours.markov(ids), again.markov(ids))
    assert (again.config.first_slot, again.config.draft_len) == (
        ours.config.first_slot,
        ours.config.draft_len,
    )
    assert again.config.taps == ours.config.taps
