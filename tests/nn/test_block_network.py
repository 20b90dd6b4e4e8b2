"""The block network and its own checkpoint layout."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdiff.errors import ConfigError, WeightsError
from specdiff.nn.block import BlockConfig, BlockNetwork
from specdiff.nn.block_masks import layer_masks

VOCAB = 48
CONFIG = BlockConfig(
    tokens=VOCAB, hidden_size=32, layers=2, heads=4, key_value_heads=2, head_dim=8,
    intermediate_size=64, block_size=5, mask_token_id=47, taps=(0, 1), window=16,
    draft_vocab_size=20, markov_rank=6,
)  # fmt: skip


def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(VOCAB, 32, generator=generator)
    return embedding, torch.randn(VOCAB, 32, generator=generator)


def network(config: BlockConfig = CONFIG, seed: int = 0) -> BlockNetwork:
    """Every parameter is random."""
    torch.manual_seed(seed)
    model = BlockNetwork(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        if config.draft_vocab_size is not None:
            model.draft_vocab.copy_(torch.randperm(VOCAB)[: config.draft_vocab_size].sort().values)
    return model.eval()


def logits(model: BlockNetwork, length: int = 9) -> Tensor:
    """One block of one row through every public method, Markov head after the anchor's token."""
    config = model.config
    torch.manual_seed(1)
    features = torch.randn(1, length, len(config.taps) * config.hidden_size)
    anchors = torch.tensor([[7]])
    context = model.context(features.to(model.fc.weight.dtype))
    slots = model.slots(anchors, context[:, -1:], config.block_size)[:, 0]
    positions = torch.arange(length + config.block_size)[None]
    mask = torch.ones(1, 1, config.block_size, length + config.block_size, dtype=torch.bool)
    out = model.logits(model(slots, context, positions, mask))
    bias = model.markov(anchors)
    return out if bias is None else out + bias


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab_size": None},
        {"markov_rank": 0},
        {"direct": False},
        {"window": None},
        {"markov_table": True, "confidence_head": "states+markov"},
        {"own_embedding": True, "own_head": True, "sample_from_anchor": False},
        {"full_layers": (0,), "causal_layers": (1,), "window_from": "slot"},
    ],
)
def test_a_saved_network_computes_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = network(replace(CONFIG, **changes)).borrow(*tables())
    model.save_pretrained(tmp_path, targets=["tiny"], draft_len=5)
    loaded = BlockNetwork.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(logits(loaded.borrow(*tables())), logits(model))


def test_the_folder_names_its_targets_and_holds_no_borrowed_table(tmp_path: Path) -> None:
    model = network().borrow(*tables())
    model.save_pretrained(tmp_path, torch.bfloat16, targets=["tiny"], draft_len=5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["targets"], config["draft_len"]) == ("block", ["tiny"], 5)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not {"embedding", "head"} & tensors.keys()
    assert tensors["fc.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["draft_vocab"], model.draft_vocab)


def test_it_loads_in_the_requested_precision(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    loaded = BlockNetwork.from_pretrained(tmp_path, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.draft_vocab.dtype == torch.int64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("fc.weight"), r"lacks fc\.weight; does its config"),
        (lambda t: t.update(extra=torch.zeros(1)), "has unknown extra"),
        (lambda t: t.update({"norm.weight": torch.ones(8)}), r"norm\.weight has shape \[8\]"),
        (lambda t: t["draft_vocab"].fill_(99), "draft_vocab must hold ascending ids of the 48"),
        (lambda t: t["draft_vocab"].copy_(t["draft_vocab"].flip(0)), "ascending ids"),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    network().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        BlockNetwork.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model_type", "sedd", "model_type is 'sedd'; known are block"),
        ("layers", 0, "layers must be at least 1, not 0"),
        ("heads", 3, "heads 3 is not a multiple of key_value_heads 2"),
        ("head_dim", 7, "head_dim 7 must be even"),
        ("mask_token_id", 48, "mask_token_id 48 is not one of the 48 tokens"),
        ("taps", [], "taps must be one or more layer numbers"),
        ("taps", ["a"], "taps must be a list of layer numbers"),
        ("draft_vocab_size", 49, "draft_vocab_size 49 is larger than the vocabulary of 48"),
        ("norm_eps", "small", "norm_eps must be a number"),
        ("direct", 1, "direct must be of type bool"),
        ("window", -1, "window must be at least 1, not -1"),
    ],
)
def test_a_wrong_config_field_is_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ConfigError, match=message):
        BlockNetwork.from_pretrained(tmp_path)


def test_every_size_is_required(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = list(config)[: list(config).index("sample_from_anchor")]
    for field in sizes:
        partial = {key: value for key, value in config.items() if key != field}
        (tmp_path / "config.json").write_text(json.dumps(partial))
        with pytest.raises(ConfigError, match=f"lacks the key '{field}'"):
            BlockNetwork.from_pretrained(tmp_path)


def test_tables_of_another_target_are_refused() -> None:
    embedding, head = tables()
    with pytest.raises(ConfigError, match="borrows an embedding of 48 words x 32"):
        network().borrow(embedding[:40], head[:40])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("window_from", ["anchor", "slot"])
@pytest.mark.parametrize("full, causal", [((), ()), ((0,), (1,)), ((1,), (0, 1))])
def test_layer_masks_allow_exactly_the_span_of_each_layer(
    window: int | None, window_from: str, full: tuple[int, ...], causal: tuple[int, ...]
) -> None:
    """Two blocks of one row, anchors 6 and 4, after a context of 6; compared pair by pair."""
    config = replace(
        CONFIG, window=window, window_from=window_from, full_layers=full, causal_layers=causal
    )
    anchors = [6] * 5 + [4] * 5
    queries = [anchor + i % 5 for i, anchor in enumerate(anchors)]
    keys = [*range(6), *queries]
    base = torch.tensor(
        [
            [
                key < anchors[q] if k < 6 else anchors[k - 6] == anchors[q]
                for k, key in enumerate(keys)
            ]
            for q in range(10)
        ]
    )[None, None]
    masks = layer_masks(
        config,
        base,
        torch.tensor([queries]),
        torch.tensor([anchors]),
        torch.tensor([keys]),
        torch.arange(16)[None] >= 6,
    )
    for layer, mask in enumerate(masks):
        for q, query in enumerate(queries):
            for k, key in enumerate(keys):
                visible = bool(base[0, 0, q, k])
                if window is not None and layer not in full:
                    if window_from == "slot":
                        visible &= abs(query - key) <= window
                    elif k < 6:
                        visible &= anchors[q] - key <= window
                if layer in causal and k >= 6:
                    visible &= key <= query
                assert bool(mask[0, 0, q, k]) == visible, (layer, query, key)
    if config.uniform and window is None:
        assert all(torch.equal(mask, base) for mask in masks)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"full_layers": (2,)}, "full_layers holds 2, but layers is 2"),
        ({"causal_layers": (-1,)}, "causal_layers holds -1"),
        ({"block_size": 1, "sample_from_anchor": False}, "leaves no slot to draft"),
        ({"markov_rank": 0, "markov_table": True}, "no Markov vector"),
        ({"markov_rank": 0, "confidence_head": "states+markov"}, "no Markov vector"),
    ],
)
def test_conventions_that_contradict_each_other_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)
