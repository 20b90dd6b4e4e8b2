"""Checkpoints: the whole model and nothing else, sizes that fit together, atomic writes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdiff
import tiny
from specdiff import weights
from specdiff.errors import ConfigError, StorageError, UnknownNameError, WeightsError
from specdiff.nn.small_lm import SmallLM

Load = Callable[[Path], Any]
DOORS: dict[str, Load] = {
    "target": lambda folder: specdiff.load(str(folder), "none", device="cpu"),
    "drafter": SmallLM.from_pretrained,
}


@pytest.fixture(params=DOORS)
def load(request: pytest.FixtureRequest) -> Load:
    return DOORS[request.param]


def folder_with(folder: Path, family: str, **extra: torch.Tensor) -> Path:
    tiny.model(family).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# surplus tensors


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "model.rope_freqs"),
        ("llama", "model.layers.0.self_attention.bias"),
        ("qwen3", "model.layers.0.self_attn.sinks"),
        ("gpt2", "transformer.h.0.attn.c_attn.scale"),
        ("gpt2", "vision_head.weight"),
    ],
)
def test_a_tensor_without_a_place_is_named(
    tmp_path: Path, load: Load, family: str, name: str
) -> None:
    folder_with(tmp_path, family, **{name: torch.ones(3)})
    with pytest.raises(
        WeightsError, match=rf"hold {name}, which the model has no place for; does its config\.json"
    ):
        load(tmp_path)


def test_a_config_of_fewer_layers(tmp_path: Path, load: Load) -> None:
    folder_with(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(
        WeightsError,
        match=r"hold model\.layers\.1\..* and 6 more, which the model has no place for",
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.rotary_emb.inv_freq"),
        ("llama", "mtp.layers.0.weight"),
        ("llama", "model.vision_tower.patch.weight"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt2", "v_head.summary.weight"),
    ],
)
def test_a_tensor_that_does_nothing_is_passed_over(
    tmp_path: Path, load: Load, family: str, name: str
) -> None:
    load(folder_with(tmp_path, family, **{name: torch.ones(3)}))


def test_a_stored_copy_of_a_tied_head(tmp_path: Path, load: Load) -> None:
    table = tiny.model("gpt2").get_input_embeddings().weight.detach()
    load(folder_with(tmp_path, "gpt2", **{"lm_head.weight": table.clone()}))


# sizes that do not fit together


@pytest.mark.parametrize(("family", "key"), [("llama", "num_attention_heads"), ("gpt2", "n_head")])
def test_heads_that_do_not_divide_the_width(tmp_path: Path, family: str, key: str) -> None:
    folder_with(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 7, "head_dim": None}))
    with pytest.raises(ConfigError, match=r"config\.json.*32.*multiple of the.*7"):
        SmallLM.from_pretrained(tmp_path)


def test_heads_of_a_network_that_is_built(tmp_path: Path) -> None:
    config = tiny.model("gpt2").config
    config.n_head = 7
    with pytest.raises(
        ConfigError, match="the width 32 is not a multiple of the 7 attention heads"
    ):
        SmallLM(config)
    with pytest.raises(ConfigError, match="hidden_size 32 is not a multiple of n_heads 7"):
        tiny.sedd_config(n_heads=7)
    with pytest.raises(
        ConfigError, match="hidden_size 24 over n_heads 8 gives heads of odd size 3"
    ):
        tiny.sedd_config(hidden_size=24, n_heads=8)


# paths


def test_a_path_object_is_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "model", "llama")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "model", Path("model")):
        lm = specdiff.load(path, "none", device="cpu")
        assert lm.target.info.name == os.fspath(path)
        assert len(lm.generate([1, 2], max_tokens=2).token_ids) == 2
    for missing in (Path("smollm2-135m"), Path("someone/no-such-model"), Path("gone.gguf")):
        with pytest.raises(UnknownNameError, match=r"no (model folder|file) '/.*"):
            specdiff.load(missing, "none", device="cpu")


# writing


@pytest.mark.parametrize("borrows", [True, False])
def test_what_cannot_be_written_is_an_error_of_ours(tmp_path: Path, borrows: bool) -> None:
    (tmp_path / "file").touch()
    config = tiny.model("llama").config
    config.borrow_embeddings = borrows
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        SmallLM(config).save_pretrained(tmp_path / "file" / "drafter")
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path / "file" / "drafter")


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    network = tiny.sedd(tiny.sedd_config())
    network.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="ulimit -f"):
            network.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert weights.read_tensors(tmp_path).keys() == network.state_dict().keys()
