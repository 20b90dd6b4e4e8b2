"""The number of threads: measured, named by the user, or left alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from specdiff.errors import UsageError
from specdiff.text import threads
from specdiff.text.load import load


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Busy:
    """A model, and the clock it is timed with: its passes take `seconds` by number of threads."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> None:
        self.now += self.seconds[torch.get_num_threads()]

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("good", [4, 2, 1])
def test_the_fastest_number_is_taken(good: int) -> None:
    before = torch.get_num_threads()
    model = Busy({count: 0.004 if count == good else 0.01 for count in (4, 2, 1)})
    assert threads.fastest(model, threads.choices(4), model.clock) == good
    assert torch.get_num_threads() == before
    assert model.now < 2 * threads.SECONDS


def test_on_a_busy_machine_every_number_has_a_pass() -> None:
    """The passes of all cores alone would use up the time."""
    model = Busy({4: 0.9, 2: 0.8, 1: 0.03})
    assert threads.fastest(model, [4, 2, 1], model.clock) == 1
    assert model.now == pytest.approx(1.73)


def test_a_slow_model_is_not_measured_for_long() -> None:
    model = Busy({4: 2.0, 2: 4.0, 1: 8.0})
    assert threads.fastest(model, [4, 2, 1], model.clock) == 4
    assert model.now == 6


def test_choices_halve() -> None:
    assert threads.choices(6) == [6, 3, 1]
    assert threads.choices(1) == [1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_loading_leaves_the_process_alone_unless_it_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []

    def fastest(model: Any, counts: list[int]) -> int:
        calls.append(counts)
        return 1

    monkeypatch.setattr(threads, "fastest", fastest)
    torch.set_num_threads(2)
    load(folder, "none", device="cpu")
    assert torch.get_num_threads() == 2 and not calls
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    load(folder, "none", device="cpu", threads="auto")
    assert torch.get_num_threads() == 2 and not calls
    monkeypatch.delenv("OMP_NUM_THREADS")
    load(folder, "none", device="cpu", threads="auto")
    assert torch.get_num_threads() == 1 and calls == [[2, 1]]
    load(folder, "none", device="cpu", threads=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("bad", [0, -1, "many", 1.5])
def test_a_bad_number_is_refused(folder: Path, bad: Any) -> None:
    with pytest.raises(UsageError, match="threads must be"):
        load(folder, "none", device="cpu", threads=bad)
