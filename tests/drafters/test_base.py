"""The drafter and target interfaces: optional methods have defaults, and wrappers forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.drafters.denoising import Denoiser, DenoisingDrafter
from specdiff.targets.base import Target, TargetWrapper
from specdiff.targets.table import TableTarget
from specdiff.types import Context, Draft
from specdiff.verify import VERIFIERS

TARGET = TableTarget.random(5, seed=3)
PROMPTS = [[1, 2], [3]]


class Repeat(Drafter[None]):
    def propose(self, context: Context, state: None, noise: Any, draft_len: int) -> Draft:
        assert state is None
        return Draft(context.batch.anchor[:, None].repeat(1, draft_len))


class Flat(Denoiser[None]):
    mask_id = 5

    def denoise(self, context: Context, state: None, canvas: Any, revealed: Any) -> torch.Tensor:
        return torch.zeros(*canvas.shape, 5)


def flat() -> DenoisingDrafter[None]:
    return DenoisingDrafter(Flat(), steps=2)


@pytest.mark.parametrize("build", [Repeat, flat])
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_one_method_is_enough_and_wrappers_change_nothing(
    build: Callable[[], Drafter[Any]], verifier: str
) -> None:
    drafter = build()
    assert drafter.draft_len == 8 and drafter.taps == ()
    batch = tiny.batch_of(PROMPTS, 20)
    rule = VERIFIERS[verifier]
    texts = tiny.decoded(TARGET, drafter, batch, verifier=rule)
    wrapped = tiny.decoded(TargetWrapper(TARGET), DrafterWrapper(drafter), batch, verifier=rule)
    assert wrapped == texts


def calls_of(role: type, names: list[str]) -> tuple[Any, list[tuple[str, tuple[Any, ...]]]]:
    """An object whose methods record their calls and return their name."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def method(name: str) -> Any:
        def call(self: Any, *arguments: Any) -> str:
            calls.append((name, arguments))
            return name

        return call

    return type("Recorder", (role,), {name: method(name) for name in names})(), calls


@pytest.mark.parametrize(
    ("role", "wrapper", "arguments"),
    [
        (
            Drafter,
            DrafterWrapper,
            {"open": 2, "admit": 3, "propose": 4, "consumed": 1, "release": 2, "resume": 4},
        ),
        (Target, TargetWrapper, {"open": 3, "admit": 4, "score": 3, "keep": 3, "release": 2}),
    ],
)
def test_a_wrapper_forwards_every_method(
    role: type, wrapper: type, arguments: dict[str, int]
) -> None:
    inner, calls = calls_of(role, list(arguments))
    inner.info = TARGET.info
    outer = wrapper(inner)
    for name, count in arguments.items():
        values = tuple(range(count))
        result = getattr(outer, name)(*values)
        assert calls.pop() == (name, values)
        if name in ("open", "propose", "consumed", "score"):
            assert result == name
