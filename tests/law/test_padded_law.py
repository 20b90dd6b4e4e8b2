"""Drafters with a larger or smaller vocabulary than the target's: no text's chance changes."""

from typing import Any

import pytest
from samples import TARGET, V, compare, law, texts

import tiny
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.nn.small_lm import SmallLM
from specdiff.types import SamplingParams
from specdiff.verify import VERIFIERS

SETTINGS = {
    "T=1": SamplingParams(max_tokens=4),
    "penalties": SamplingParams(
        max_tokens=4, temperature=0.8, repetition_penalty=2.0, logit_bias=((2, 1.0),)
    ),
    "allowed": SamplingParams(
        max_tokens=4, allowed_token_ids=(1, 2)
    ),  # the smaller drafter lacks one of them
}


def drafter(kind: str, size: int) -> Drafter[Any]:
    if kind == "autoregressive":
        base = tiny.model("llama", vocab=size, positions=16)
        return AutoregressiveDrafter(SmallLM(base.config, base), TARGET.info, padded=True)
    steps = 2 if kind == "left-to-right" else 1
    attention = (
        {"attention": "causal-context", "time_conditioning": False}
        if kind == "left-to-right"
        else {}
    )
    network = tiny.sedd(tiny.sedd_config(size, n_blocks=1, length=16, **attention))
    return DenoisingDrafter(SEDDDenoiser(network, TARGET.info, padded=True), steps=steps)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("verifier", ["block"])
@pytest.mark.parametrize("size", [V - 1, V + 3])
@pytest.mark.parametrize("kind", ["autoregressive", "one-shot", "left-to-right"])
def test_the_law_is_the_targets(kind: str, size: int, verifier: str, setting: str) -> None:
    params = SETTINGS[setting]
    sample = texts(TARGET, drafter(kind, size), VERIFIERS[verifier], params, count=5000, rows=2500)
    assert compare(sample, law(params)) > 1e-5
