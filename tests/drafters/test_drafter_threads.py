"""One drafter and one target object, many threads: all that changes lives in the state."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import tiny
from specdiff import engine
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.engine import Request
from specdiff.nn.small_lm import SmallLM
from specdiff.targets.table import TableTarget
from specdiff.types import SamplingParams
from specdiff.verify import VERIFIERS

THREADS, CALLS = 8, 3
TARGET = TableTarget.random(5, seed=3)
BASE = tiny.model("llama", vocab=5, positions=64)
DRAFTERS: dict[str, Drafter[Any]] = {
    "ngram": NGramDrafter(TARGET.info, longest=2),
    "sedd": tiny.drafter(TARGET.info, n_blocks=1),
    "sedd cached": tiny.drafter(
        TARGET.info, steps=2, n_blocks=1, attention="causal-context", time_conditioning=False
    ),
    "autoregressive": AutoregressiveDrafter(SmallLM(BASE.config, BASE), TARGET.info),
    "sedd any": AnyOrderDrafter(tiny.drafter(TARGET.info, n_blocks=1).denoiser, steps=2),
}


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def texts(drafter: Drafter[Any], call: int) -> dict[int, list[int]]:
    """A few requests through two rows, with the drafts they got."""
    queue = [
        Request([call % 5, i % 5], SamplingParams(max_tokens=8), 10 * call + i) for i in range(3)
    ]
    results: dict[int, list[int]] = {}
    for p in engine.run(TARGET, drafter, queue, verifier=VERIFIERS["token"], draft_len=3, rows=2):
        results.setdefault(p.request, []).extend([*p.tokens, -p.accepted])
    return results


@pytest.mark.parametrize("name", DRAFTERS)
def test_threads_give_what_one_gives(name: str) -> None:
    calls = list(range(THREADS * CALLS))
    serial = [texts(DRAFTERS[name], call) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda call: texts(DRAFTERS[name], call), calls)) == serial
