"""The law of texts whose drafter sits on another device."""

import pytest
import torch
from samples import DENOISER, TARGET, compare, law, texts

from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.on_device import OnDevice
from specdiff.types import SamplingParams
from specdiff.verify import VERIFIERS

PLAIN = SamplingParams(max_tokens=4)
PASSES = 1e-3 / len(VERIFIERS)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_texts_have_the_targets_law(verifier: str) -> None:
    drafter = OnDevice(
        DenoisingDrafter(DENOISER, steps=2), torch.device("cpu:0"), torch.device("cpu")
    )
    assert compare(texts(TARGET, drafter, VERIFIERS[verifier], PLAIN), law(PLAIN)) > PASSES
