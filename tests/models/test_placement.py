"""Targets that are quantized or lie on several devices load through `model_options`, exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import specdiff
import tiny
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.targets.causal import CausalTarget

pytest.importorskip("accelerate")
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
}


@pytest.fixture(scope="module")
def net() -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def folder(net: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placed")
    net.save_pretrained(path)
    return path


def greedy_equals(lm: specdiff.SpeculativeLM, net: PreTrainedModel) -> None:
    prompts = tiny.prompts(3)
    texts = [tiny.plain(net, p, 12) for p in prompts]
    got = tiny.decoded(
        lm.target,
        tiny.Hinted(texts, tiny.VOCAB),
        tiny.batch_of(prompts, 12, temperature=0.0),
        draft_len=4,
    )
    assert got == texts


@pytest.mark.parametrize("place", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map(folder: Path, net: PreTrainedModel, place: Any) -> None:
    lm = specdiff.load(str(folder), "none", model_options={"device_map": place})
    assert lm.target.info.device == torch.device("cpu")
    greedy_equals(lm, net)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_whose_layers_lie_elsewhere(
    folder: Path, net: PreTrainedModel, tmp_path: Path
) -> None:
    """A layer on disk is on meta until it runs: a hook, which must stay, loads its weights."""
    options = {"device_map": {**SPREAD, "lm_head": "disk"}, "offload_folder": str(tmp_path)}
    lm = specdiff.load(str(folder), "none", model_options=options)
    info = lm.target.info
    devices = {p.device.type for p in lm.target.model.parameters()}
    assert devices == {"cpu", "meta"}
    assert (info.device, info.head) == (torch.device("cpu"), None)
    assert info.embedding is not None
    greedy_equals(lm, net)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_offloaded_embedding_is_refused(folder: Path, tmp_path: Path) -> None:
    options = {
        "device_map": {**SPREAD, "model.embed_tokens": "disk", "lm_head": "cpu"},
        "offload_folder": str(tmp_path),
    }
    with pytest.raises(
        UnsupportedModelError,
        match=r"embedding is offloaded; name a device for it in model_options\['device_map'\]",
    ):
        specdiff.load(str(folder), "none", model_options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_options": {"trust_remote_code": True}},
            "unknown model option 'trust_remote_code'; known are attn_implementation, device_map",
        ),
        (
            {"model_options": {"device_map": "auto"}, "device": "cpu"},
            "device 'cpu' and a device_map in model_options both say",
        ),
        ({"drafter_device": "toaster"}, "device 'toaster' is not usable here"),
    ],
)
def test_options_that_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        specdiff.load(str(folder), "none", **options)


class Int8(nn.Module):
    """Weights as int8 with a scale a row; activations untouched."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed * self.scale)


def quantized(net: PreTrainedModel, change: Any) -> PreTrainedModel:
    copy = tiny.copy_of(net)
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(copy.get_submodule(parent), last, change(module))
    return copy


def test_weights_of_eight_bits_stay_exact(net: PreTrainedModel) -> None:
    small = quantized(net, Int8)
    target = CausalTarget(tiny.copy_of(small))
    assert target.info.head is None  # packed: nothing a drafter could borrow
    greedy_equals(specdiff.SpeculativeLM(target, "none", None, 64), small)


class Crowded(nn.Module):
    """Rounds activations on one scale for the whole batch, as dynamic quantisation does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / 127
        return self.inner((x / scale).round() * scale)


def test_activations_rounded_together_are_refused(net: PreTrainedModel) -> None:
    """A token's logits would depend on its neighbors in the batch; scoring a draft changes them."""
    with pytest.raises(UnsupportedModelError, match="self-test"):
        CausalTarget(quantized(net, Crowded))


def test_a_quantisation_that_is_not_installed_says_so(folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    if __import__("importlib").util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is here")
    with pytest.raises(specdiff.SpecdiffError, match=r"cannot load the weights.*bitsandbytes"):
        specdiff.load(
            str(folder),
            "none",
            model_options={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        )
