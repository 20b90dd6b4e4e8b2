"""A device without float64 (mps), played by the CPU: nothing from prompt to text needs float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from specdiff import SpeculativeLM, devices
from specdiff.controller import Controller
from specdiff.noise import Noise, Purpose
from specdiff.profile import Profile
from specdiff.sampling import draw
from specdiff.text.load import load
from specdiff.verify import VERIFIERS


class NoFloat64(TorchDispatchMode):
    """Raises where an operation gives a float64 tensor, as mps does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func} gives float64, which this device has not")
        return out


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> Any:
    @contextmanager
    def device() -> Iterator[None]:
        with monkeypatch.context() as patch, NoFloat64():
            patch.setattr(devices, "NO_FLOAT64", frozenset({"cpu"}))
            yield

    return device


def test_the_rule() -> None:
    assert devices.exact(torch.device("mps")) == torch.float32
    assert {devices.exact(torch.device(kind)) for kind in ("cpu", "cuda", "xpu")} == {torch.float64}


def test_the_guard_itself(poor: Any) -> None:
    with pytest.raises(TypeError, match="float64"), poor():
        torch.zeros(3).double()


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_generation_needs_no_float64(poor: Any, verifier: str) -> None:
    target = tiny.target("llama")
    lm = SpeculativeLM(target, tiny.drafter(target.info, steps=2), None, 64)
    with poor():
        for sampling in (
            {"temperature": 0.0},
            {},
            {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01},
        ):
            answers = lm.generate(
                [[1, 2, 3], [4]], max_tokens=10, verifier=verifier, seed=1, draft_len=4, **sampling
            )
            assert [len(g.token_ids) for g in answers] == [10, 10]
        assert (
            len(lm.generate([5, 6], max_tokens=24, draft_len="auto", verifier=verifier).token_ids)
            == 24
        )


def test_the_controller_needs_no_float64(poor: Any) -> None:
    from specdiff import decode

    target = tiny.target("gpt2")
    with poor():
        rounds = list(
            decode.decode(
                target,
                tiny.drafter(target.info),
                tiny.batch_of([[1]], 20),
                draft_len=Controller(Profile(4)),
            )
        )
    assert rounds


def test_draws_of_24_bits(poor: Any) -> None:
    noise = Noise.of(tiny.batch_of([[1]] * 512))
    with poor():
        uniform = noise.uniform(Purpose.DRAFT, 64)
        tokens = draw(torch.tensor([0.0, 0.25, 0.75, 0.0]).expand(*uniform.shape, 4), uniform)
    assert uniform.dtype == torch.float32
    assert uniform.min() >= 0
    assert uniform.max() < 1
    torch.testing.assert_close(
        uniform.double(), noise.uniform(Purpose.DRAFT, 64), rtol=0, atol=2.0**-24
    )
    share = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    assert share[0] == share[3] == 0
    assert abs(float(share[1]) - 0.25) < 0.015  # six standard deviations of 32768 draws


@pytest.mark.parametrize(
    ("facts", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, None),
        ({}, None),
    ],
)
def test_half_precision_is_native_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, bool], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts)
    cpu = torch.device("cpu")
    assert devices.native_half(cpu) is dtype
    loaded = dtype or torch.float32
    assert devices.weights_dtype(cpu) is loaded
    assert devices.weights_dtype_in_words(cpu).startswith(f"{loaded} (".removeprefix("torch."))


def test_a_target_is_loaded_in_the_native_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    for facts, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda facts=facts: facts)
        assert load(tmp_path, "none", device="cpu").target.info.dtype is dtype
        assert load(tmp_path, "none", device="cpu", dtype="float32").target.info.dtype is (
            torch.float32
        )
