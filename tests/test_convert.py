"""`specdiff convert`, and what each format refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import blocks
from specdiff.errors import ConfigError, WeightsError
from specdiff.nn import block_formats
from specdiff.nn.block import BlockNetwork
from test_cli import here  # noqa: F401

Here = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-target"
    blocks.target("llama").save_pretrained(folder)
    return str(folder)


def saved(folder: Path, target: str, **changes: Any) -> BlockNetwork:
    network = blocks.network(**changes)
    network.save_pretrained(folder, targets=[target], draft_len=network.config.draft_len)
    return network


def same_logits(one: BlockNetwork, two: BlockNetwork, target: str) -> bool:
    tables = blocks.target_tables(blocks.target("llama"), target)
    ids = torch.arange(30) % 40
    features = torch.randn(30, 2 * 32, generator=torch.Generator().manual_seed(1))
    logits = []
    for network in (one, two):
        network.borrow(tables.embedding, tables.head)
        with torch.no_grad():
            states = blocks.block_states(network, features, ids, 20)
            bias = network.markov(ids[:5])
            logits.append(network.logits(states) + (0 if bias is None else bias))
    return torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    "form, changes",
    [
        ("speculators", {"markov_rank": 6, "draft_vocab_size": 20, "window": 6}),
        ("speculators", {"confidence_head": "states", "block_size": 3}),
        ("dflash", {"sample_from_anchor": False}),
        ("dflash", {"sample_from_anchor": False, "window": 6, "window_from": "slot"}),
        (
            "dflash",
            {
                "sample_from_anchor": False,
                "window": 6,
                "window_from": "slot",
                "full_layers": (0,),
                "causal_layers": (0, 1),
            },
        ),
    ],
)
def test_there_and_back_computes_the_same_logits(
    here: Here, tmp_path: Path, target: str, form: str, changes: dict[str, Any]
) -> None:
    network = saved(tmp_path / "own", target, **changes)
    there, back = tmp_path / "there", tmp_path / "back"
    assert here("convert", str(tmp_path / "own"), str(there), "--to", form)[:2] == (0, f"{there}\n")
    arguments = ("convert", str(there), str(back), "--to", "specdiff", "--model", target)
    assert here(*arguments)[:2] == (0, f"{back}\n")
    config = json.loads((back / "config.json").read_text())
    assert (config["targets"], config["draft_len"]) == (["tiny-target"], network.config.draft_len)
    assert same_logits(network, BlockNetwork.from_pretrained(back), target)


def test_it_names_what_is_wrong(here: Here, tmp_path: Path, target: str) -> None:
    own = tmp_path / "own"
    saved(own, target, direct=True, markov_rank=6, draft_vocab_size=20)
    out = tmp_path / "out"
    code, _, err = here("convert", str(own), str(out), "--to", "speculators")
    assert code == 1 and "has no place for the direct path (train with direct = false)" in err
    code, _, err = here("convert", str(own), str(out), "--to", "dflash")
    for part in ("direct path", "from the anchor on", "a Markov head", "vocabulary of 20"):
        assert part in err
    assert not out.exists()
    code, _, err = here("convert", str(own), str(own), "--to", "specdiff")
    assert code == 2 and "already holds a model" in err
    code, _, err = here("convert", str(own), str(out), "--to", "eagle")
    assert code == 2 and "specdiff, speculators, dflash, transformers, not 'eagle'" in err
    code, _, err = here("convert", target, str(out), "--to", "dflash")
    assert code == 2 and "holds no block drafter" in err
    code, _, err = here(
        "convert", str(own), str(out), "--to", "speculators", "--model", "./nowhere"
    )
    assert code == 2 and "./nowhere" in err


def test_a_damaged_drafter_is_not_converted(here: Here, tmp_path: Path, target: str) -> None:
    own = tmp_path / "own"
    saved(own, target)
    tensors = load_file(own / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, own / "model.safetensors")
    code, _, err = here("convert", str(own), str(tmp_path / "out"), "--to", "speculators")
    assert code == 1 and "lacks norm.weight" in err


def test_a_drafter_of_another_target_is_refused(tmp_path: Path, target: str) -> None:
    tables = blocks.target_tables(blocks.target("llama"), target)
    checkpoint = blocks.checkpoint(blocks.network(taps=(0, 7)))
    with pytest.raises(ConfigError, match="reads 48 tokens x 32 and layer 7"):
        block_formats.write(tmp_path, "speculators", checkpoint, tables)


@pytest.mark.parametrize(
    "form, changes, message",
    [
        ("speculators", {"window": 6, "window_from": "slot"}, "window counted from each slot"),
        ("speculators", {"causal_layers": (1,)}, r"causal layers \[1\] other than the sliding"),
        ("speculators", {"own_embedding": True}, "own embedding, which is not the target's"),
        ("speculators", {"own_head": True}, "own head, which is not the target's"),
        ("dflash", {"sample_from_anchor": False, "window": 6}, "window of 6 counted from the anc"),
        ("dflash", {"confidence_head": "states"}, "a confidence head"),
        ("transformers", {"sample_from_anchor": False, "window": 6}, "the window of 6"),
        ("transformers", {"sample_from_anchor": False, "causal_layers": (0, 1)}, "causal layers"),
        ("transformers", {"direct": True}, "the direct path"),
    ],
)
def test_what_a_format_has_no_place_for_is_named(
    tmp_path: Path, target: str, form: str, changes: dict[str, Any], message: str
) -> None:
    tables = blocks.target_tables(blocks.target("llama"), target)
    with pytest.raises(ConfigError, match=message):
        block_formats.write(tmp_path, form, blocks.checkpoint(blocks.network(**changes)), tables)


def edited(folder: Path, target: str, form: str, change: Callable[[Any], Any], **own: Any) -> Path:
    """An export whose config.json is changed."""
    tables = blocks.target_tables(blocks.target("llama"), target)
    block_formats.write(folder, form, blocks.checkpoint(blocks.network(**own)), tables)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("speculators_model_type", "dflash2", "known are dflash, dspark"),
        ("markov_head_type", "gated", "markov_head_type 'gated' is not supported"),
        ("markov_head_type", "rnn", "markov_head_type 'rnn' is not supported"),
        ("aux_hidden_state_layer_ids", [0, 2], "reads the embedding"),
        ("mask_token_id", None, "mask_token_id must be of type int"),
        ("target_hidden_size", 64, "target_hidden_size 64 differs"),
        ("draft_vocab_size", 19, "t2d marks 20 tokens, which draft_vocab_size 19"),
    ],
)
def test_a_speculators_option_that_is_not_supported_is_named(
    tmp_path: Path, target: str, key: str, value: object, message: str
) -> None:
    folder = edited(
        tmp_path,
        target,
        "speculators",
        lambda config: config.update({key: value}),
        markov_rank=6,
        draft_vocab_size=20,
    )
    with pytest.raises((ConfigError, WeightsError), match=message):
        BlockNetwork.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(attention_bias=True), "attention_bias True is not supported"),
        (lambda c: c.update(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (lambda c: c.update(architectures=["DFlash2DraftModel"]), "DFlash2DraftModel is not supp"),
        (lambda c: c["dflash_config"].update(selector_rank=8), "asks for selector_rank"),
        (lambda c: c["dflash_config"].update(attention_mode="mla"), "asks for attention_mode"),
        (lambda c: c.update(layer_types=["chunked_attention"] * 2), "chunked_attention"),
        (
            lambda c: c.update(
                rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rope_type 'yarn' is not supported",
        ),
    ],
)
def test_a_dflash_option_that_is_not_supported_is_named(
    tmp_path: Path, target: str, change: Callable[[Any], Any], message: str
) -> None:
    folder = edited(tmp_path, target, "dflash", change, sample_from_anchor=False)
    with pytest.raises(ConfigError, match=message):
        BlockNetwork.from_pretrained(folder)


def test_dflash_defaults(tmp_path: Path, target: str) -> None:
    """The block size may be in either place; layer ids are spread evenly where none are given."""

    def change(config: dict[str, Any]) -> None:
        config["dflash_config"] |= {"block_size": config.pop("block_size"), "causal": True}
        del config["dflash_config"]["target_layer_ids"]
        config["num_target_layers"] = 13

    folder = edited(tmp_path, target, "dflash", change, sample_from_anchor=False)
    config = block_formats.read(folder).config
    assert config.taps == (1, 10)
    assert (config.block_size, config.draft_len, config.first_slot) == (5, 4, 1)
    assert config.causal_layers == (0, 1)


def test_transformers_assistant_is_not_read(tmp_path: Path, target: str) -> None:
    folder = edited(tmp_path, target, "transformers", lambda config: None, sample_from_anchor=False)
    with pytest.raises(ConfigError, match="names no vocabulary: it is written but not read"):
        BlockNetwork.from_pretrained(folder)


def test_deepspec_reads_its_own_tables(tmp_path: Path) -> None:
    """DeepSpec: layer ids count layers, slots predict from the anchor on, tables in the file."""
    ours = blocks.network(
        own_embedding=True,
        own_head=True,
        markov_rank=6,
        markov_table=True,
        confidence_head="states+markov",
    )
    names = {
        "embedding": "embed_tokens.weight",
        "head": "lm_head.weight",
        "markov_head.w1.weight": "markov_head.markov_w1.weight",
        "markov_head.w2.weight": "markov_head.markov_w2.weight",
    }
    tensors = {names.get(name, name): tensor for name, tensor in ours.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "vocab_size": 48,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "block_size": 5, "mask_token_id": 47,
        "target_layer_ids": [0, 2], "markov_rank": 6, "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = BlockNetwork.from_pretrained(tmp_path)
    assert read.config == ours.config
    ids = torch.arange(30) % 40
    features = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    for network in (ours, read):  # another target's tables change nothing
        network.borrow(torch.zeros(48, 32), torch.zeros(48, 32))
    with torch.no_grad():
        states = [blocks.block_states(n, features, ids, 9) for n in (ours, read)]
        assert torch.equal(ours.logits(states[0]), read.logits(states[1]))
        assert torch.equal(ours.confidence(states[0], ids[:5]), read.confidence(states[1], ids[:5]))
    for ids_, message in (([-1, 2], "reads the embedding"), ([0, "x"], "list of layer numbers")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"target_layer_ids": ids_}))
        with pytest.raises(ConfigError, match=message):
            BlockNetwork.from_pretrained(tmp_path)
