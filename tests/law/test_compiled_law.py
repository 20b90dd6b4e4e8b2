"""The law of texts of a target with compiled layers, through the real loop.

Every text's chance is enumerated from the eager model's forwards over whole prefixes. Compiled
layers serve one row, so that texts are fewer here than elsewhere.
"""

from typing import Any

import pytest
import torch
from samples import compare, texts
from test_quantized_law import NEW, PARAMS, V, law
from transformers import PreTrainedModel

import tiny
from doubles import ToyDenoiser
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.targets.causal import CausalTarget
from specdiff.verify import VERIFIERS

VERIFIED = ("token", "block")
COUNT = 1000
PASSES = 1e-3 / len(VERIFIED)
CAUGHT = 1e-6
DRAFTER: Any = DenoisingDrafter(ToyDenoiser(V, seed=5), steps=2)


def original() -> PreTrainedModel:
    """Mild enough that every text has a chance."""
    model = tiny.model("llama", vocab=V, seed=3)
    with torch.no_grad():
        for layer in model.get_submodule("model.layers"):
            for parameter in layer.parameters():
                parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture
def target(compiled_home: object) -> CausalTarget:
    target = CausalTarget(original())
    compilation = target.compile()
    assert compilation is not None and compilation.wait(600), compilation
    return target


def fit(target: CausalTarget, verifier: str) -> float:
    sample = texts(target, DRAFTER, VERIFIERS[verifier], PARAMS, count=COUNT, rows=1)
    return float(compare(sample, law(original())))


@pytest.mark.parametrize("verifier", VERIFIED)
def test_texts_have_the_eager_models_law(target: CausalTarget, verifier: str) -> None:
    assert fit(target, verifier) > PASSES


def test_a_layer_that_loses_outputs_of_drafted_tokens_is_caught(target: CausalTarget) -> None:
    """BUG: beyond a row's anchor, a compiled layer loses half of its outputs.

    It begins after the comparison with the eager layers, which would refuse it.
    """
    assert target.compilation is not None
    for layer in target.compilation.compiled:
        honest = layer.loaders[NEW]
        layer.loaders = {
            count: Flawed(honest) if count > 1 else layer.loaders[1] for count in layer.loaders
        }
    assert fit(target, "token") < CAUGHT


class Flawed:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = self.loader.run(inputs)[0].clone()
        out[:, 1:, : out.shape[-1] // 2] = 0
        return [out]
