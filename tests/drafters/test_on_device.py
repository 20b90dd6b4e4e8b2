"""A drafter on another device: inputs are moved there, drafts moved back, and no token changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from doubles import ToyDenoiser
from specdiff import SpeculativeLM, decode
from specdiff.drafters.base import Drafter, DrafterWrapper, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.on_device import OnDevice, across
from specdiff.noise import Noise
from specdiff.targets.table import TableTarget
from specdiff.types import Context, Draft
from specdiff.verify import VERIFIERS

# one chip, but two devices when compared
HOME = torch.device("cpu")
AWAY = torch.device("cpu:0")


class Abroad(Tensor):
    """A tensor moved to AWAY while `stamped`; results computed from one are one too."""


@pytest.fixture
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors forget the number of their device, so let moving leave a stamp."""
    real = Tensor.to

    def to(self: Tensor, *where: Any, **options: Any) -> Tensor:
        if where in ((HOME,), (AWAY,)):
            return self.as_subclass(Abroad if where == (AWAY,) else Tensor)
        return real(self, *where, **options)

    monkeypatch.setattr(Tensor, "to", to)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested dataclasses."""
    if isinstance(value, Tensor):
        yield value
    for name in getattr(value, "__dataclass_fields__", ()):
        yield from tensors(getattr(value, name))


class Witness(DrafterWrapper[Any]):
    """Passes everything on, and notes the kinds of tensors it saw."""

    def __init__(self, inner: Drafter[Any]) -> None:
        super().__init__(inner)
        self.taps = inner.taps or (0,)
        self.kinds: list[type] = []
        self.features = 0

    def note(self, *values: Any) -> None:
        self.kinds += [type(t) for value in values for t in tensors(value)]

    def admit(self, state: Any, context: Context, rows: Tensor) -> None:
        self.note(context, rows)
        self.inner.admit(state, context, rows)

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        self.note(context, noise)
        self.features += context.features is not None
        return self.inner.propose(context, state, noise, draft_len)

    def release(self, state: Any, rows: Tensor) -> None:
        self.note(rows)
        self.inner.release(state, rows)


@pytest.fixture(scope="module")
def target() -> TableTarget:
    return TableTarget.random(3, seed=4)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.usefixtures("stamped")
def test_everything_crosses_over_and_no_token_changes(target: TableTarget, verifier: str) -> None:
    inner = DenoisingDrafter(ToyDenoiser(3, seed=5), steps=2)
    witness = Witness(inner)
    wrapped = across(witness, AWAY, HOME)
    batch = tiny.batch_of([[1], [2, 0, 1], [0, 0]], 20)
    want = list(decode.decode(target, inner, batch, verifier=VERIFIERS[verifier]))
    got = list(decode.decode(target, wrapped, batch, verifier=VERIFIERS[verifier]))
    assert torch.equal(got[-1].batch.ids, want[-1].batch.ids)
    assert len(witness.kinds) > 100
    assert set(witness.kinds) == {Abroad}
    assert witness.features == len(got)
    for there, here in zip(got, want, strict=True):
        assert {type(t) for t in tensors(there)} == {Tensor}
        assert torch.equal(there.draft.probs, here.draft.probs)
    witness.kinds.clear()
    run = decode.start(target, wrapped, batch)
    decode.admit(run, torch.arange(3))
    decode.release(run, torch.tensor([1]))
    assert set(witness.kinds) == {Abroad}


def test_one_device_needs_no_wrapper() -> None:
    drafter = NoDrafter()
    assert across(drafter, HOME, HOME) is drafter
    assert isinstance(across(drafter, AWAY, HOME), OnDevice)


@pytest.mark.parametrize("config", [{}, tiny.CACHED], ids=["own tables", "borrowed tables"])
def test_a_trained_drafter_is_built_where_it_runs(config: dict[str, Any], tmp_path: Any) -> None:
    target = tiny.target("llama")
    tiny.sedd(tiny.sedd_config(**config)).save_pretrained(tmp_path)
    away, near = (
        SpeculativeLM(target, str(tmp_path), None, 64, None, place) for place in (AWAY, None)
    )
    options: dict[str, Any] = {"max_tokens": 12, "seed": 3, "draft_len": 4}
    assert isinstance(away.drafter, OnDevice)
    assert away.drafter.inner.denoiser.device == AWAY
    assert not isinstance(near.drafter, OnDevice)
    assert (
        away.generate([1, 2, 3], **options).token_ids
        == near.generate([1, 2, 3], **options).token_ids
    )
    assert away.generate([1, 2, 3], **options, drafter_options={"steps": 2}).stats.drafted > 0
