"""MDLM checkpoints, written in their layout from a tiny network: the same function, and drafts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from specdiff import catalog, decode
from specdiff.errors import ConfigError, WeightsError
from specdiff.nn import mdlm
from specdiff.nn.ddit import SEDD
from specdiff.types import Round

FLAT = {
    "model_type": "mdlm", "vocab_size": tiny.VOCAB + 1, "hidden_dim": tiny.WIDTH,
    "n_blocks": 2, "n_heads": 4, "cond_dim": 16,
    "model_length": 96, "dropout": 0.1, "time_conditioning": False,
}  # fmt: skip


def network(**changes: Any) -> SEDD:
    return tiny.sedd(
        tiny.sedd_config(
            **{"scale_by_sigma": False, "output": "denoiser", "time_conditioning": False} | changes
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The layout of the published checkpoints, the rotary table they hold included."""
    tensors = {
        f"backbone.{name}": tensor.clone() for name, tensor in network().state_dict().items()
    }
    save_file(
        tensors | {"backbone.rotary_emb.inv_freq": torch.ones(4)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    config = FLAT | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not ...})
    )


def test_it_is_the_network_it_was_written_from(folder: Path) -> None:
    loaded, ids, sigma = (
        SEDD.from_pretrained(folder),
        torch.tensor([[3, tiny.VOCAB, 7, tiny.VOCAB]]),
        torch.tensor([0.7]),
    )
    with torch.no_grad():
        raw = loaded.logits(loaded.hidden(ids, sigma))
        assert torch.equal(raw, network().logits(network().hidden(ids, sigma)))
        # time_conditioning false: sigma is 0
        assert torch.equal(raw, loaded.logits(loaded.hidden(ids, 3 * sigma)))
    assert raw.shape[-1] == tiny.VOCAB + 1 and (raw.gather(-1, ids[..., None]) != 0).all()


def test_sigma_counts_where_time_conditioning_is_true(folder: Path) -> None:
    edit(folder, time_conditioning=True)
    loaded, ids = SEDD.from_pretrained(folder), torch.tensor([[3, tiny.VOCAB]])
    with torch.no_grad():
        one, two = (loaded.hidden(ids, torch.tensor([s])) for s in (0.1, 2.0))
    assert not torch.allclose(one, two)


def test_ours_and_theirs_are_one_network_on_disk(folder: Path, tmp_path: Path) -> None:
    loaded = SEDD.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "ours")
    again = SEDD.from_pretrained(tmp_path / "ours")
    assert (
        again.config == loaded.config
        and load_file(tmp_path / "ours/model.safetensors").keys() == loaded.state_dict().keys()
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 2}, {"order": "any", "steps": 3}, {"order": "any", "sampler": "euler"}],
    ids=str,
)
def test_a_folder_is_a_drafter(folder: Path, options: dict[str, Any]) -> None:
    target = tiny.target("gpt2")
    drafter = catalog.drafter(str(folder), target.info, options)
    batch = tiny.batch_of(tiny.prompts(3), max_tokens=8)
    rounds: list[Round] = list(decode.decode(target, drafter, batch, draft_len=3))
    assert bool(rounds[-1].batch.done.all())


def test_a_config_without_model_type_is_recognized_by_its_fields_and_relatives_are_not(
    folder: Path,
) -> None:
    edit(folder, model_type=...)
    assert SEDD.from_pretrained(folder).config.tokens == tiny.VOCAB
    for relative in ("udlm", "bd3lm"):
        assert not mdlm.recognized(FLAT | {"model_type": relative})
    edit(folder, model_type="udlm")
    with pytest.raises(
        ConfigError, match="no drafter format with model_type 'udlm' is known; known are sedd, mdlm"
    ):
        catalog.drafter(str(folder), tiny.target("gpt2").info)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, r"config\.json lacks the key 'vocab_size'"),
        ({"vocab_size": 1}, "vocab_size counts MASK, so it must be at least 2, not 1"),
        ({"n_heads": 5}, "hidden_dim 32 is not a multiple of n_heads 5"),
        ({"cond_dim": "16"}, "cond_dim must be of type int, not '16'"),
        ({"n_blocks": 0}, "n_blocks must be at least 1, not 0"),
        ({"time_conditioning": 0}, "time_conditioning must be of type bool, not 0"),
    ],
)
def test_a_bad_config_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        SEDD.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("backbone.output_layer.linear.bias"),
            r"lacks backbone\.output_layer\.linear\.bias",
        ),
        (lambda t: t.update({"noise.eps": torch.zeros(1)}), r"has unknown noise\.eps"),
        (
            lambda t: t.update({"backbone.sigma_map.mlp.0.bias": torch.zeros(3)}),
            r"backbone\.sigma_map\.mlp\.0\.bias has shape \[3\]",
        ),
    ],
)
def test_bad_tensors_are_named(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        SEDD.from_pretrained(folder)
