"""The number of threads: measured, named by the user, or left alone."""

import time
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
    """A model whose pass is slow with every number of threads but one."""

    def __init__(self, good: int, seconds: float = 0.004) -> None:
        self.good = good
        self.seconds = seconds

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> None:
        if torch.get_num_threads() != self.good:
            time.sleep(self.seconds)


@pytest.mark.parametrize("good", [4, 2, 1])
def test_the_fastest_number_is_taken(good: int) -> None:
    before = torch.get_num_threads()
    assert threads.fastest(Busy(good), threads.choices(4)) == good
    assert torch.get_num_threads() == before


def test_a_slow_model_is_not_measured_for_long() -> None:
    begin = time.perf_counter()
    assert threads.fastest(Busy(1, seconds=0.35), [4, 2, 1]) == 4
    assert time.perf_counter() - begin < 10 * threads.SECONDS


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
