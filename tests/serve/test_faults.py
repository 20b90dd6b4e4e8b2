"""Faults of drafter, target, memory and clients: who pays, and who goes on."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
import torch
from process import connect, process, save, written
from test_http import LONG, Slow, serving, until

from specdiff import SpeculativeLM
from specdiff.drafters.base import DrafterWrapper
from specdiff.noise import Noise
from specdiff.targets.base import Target, TargetWrapper
from specdiff.types import Batch, Context, Draft, TargetOutput
from test_lm import VOCAB, lm, target, tokenizer  # noqa: F401

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20}


def memory(draft: Draft) -> Draft:
    raise MemoryError("no room for a draft")


def not_a_number(draft: Draft) -> Draft:
    shape = (*draft.tokens.shape, VOCAB)
    return Draft(draft.tokens, torch.full(shape, float("nan")))


def outside(draft: Draft) -> Draft:
    return Draft(torch.full_like(draft.tokens, VOCAB), None)


class Faulty(DrafterWrapper[Any]):
    """Its third draft is faulty."""

    def __init__(self, lm: SpeculativeLM, fault: Callable[[Draft], Draft]) -> None:
        super().__init__(lm.drafter)
        self.fault = fault
        self.count = 0

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        self.count += 1
        return self.fault(draft) if self.count == 3 else draft


@pytest.mark.filterwarnings("ignore:the drafter:RuntimeWarning")
@pytest.mark.parametrize("fault", [memory, not_a_number, outside])
def test_a_fault_of_the_drafter_costs_a_draft(
    lm: SpeculativeLM, fault: Callable[[Draft], Draft]
) -> None:
    want = lm.generate("the rain", raw=True, ignore_eos=True, **GREEDY).text
    drafter = Faulty(lm, fault)
    with serving(lm, drafter=drafter) as server:
        for _ in range(2):
            answer = server.post(**GREEDY)
            assert answer.json()["choices"][0]["text"] == want
        assert server.engine.healthy
    assert drafter.count >= 3


class Full(TargetWrapper[Any]):
    """Raises `error` in its next round, once `full` is set."""

    def __init__(self, inner: Target[Any], error: Exception) -> None:
        super().__init__(inner)
        self.error = error
        self.full = threading.Event()

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        time.sleep(0.01)
        if self.full.is_set():
            self.full.clear()
            raise self.error
        return self.inner.score(cache, batch, draft)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_memory_fails_the_batch_alone(lm: SpeculativeLM, error: Exception) -> None:
    full = Full(lm.target, error)
    codes: list[int] = []
    with serving(lm, full, rows=2) as server:
        want = server.post(**GREEDY).json()["choices"]

        def ask(**body: Any) -> None:
            codes.append(server.post(**body).status_code)

        running = [threading.Thread(target=ask, kwargs={"max_tokens": LONG}) for _ in range(2)]
        for thread in running:
            thread.start()
        until(lambda: server.engine.running == 2)
        late = threading.Thread(target=ask, kwargs={"max_tokens": 4})
        late.start()
        until(lambda: server.engine.waiting == 1)
        full.full.set()
        for thread in (*running, late):
            thread.join(60)
        assert server.post(**GREEDY).json()["choices"] == want
        assert server.engine.healthy
    assert codes == [503, 503, 200]


def test_a_full_memory_is_named(lm: SpeculativeLM) -> None:
    full = Full(lm.target, MemoryError())
    with serving(lm, full) as server:
        full.full.set()
        answer = server.post()
        full.full.set()
        stream = server.post(stream=True).text
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["message"].startswith("out of memory")
    assert '"out of memory' in stream
    assert stream.endswith("data: [DONE]\n\n")


def test_a_client_that_reads_nothing_holds_nobody_up(lm: SpeculativeLM) -> None:
    with serving(lm, Slow(lm.target, 0.001), rows=2) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(server.address.getsockname())
            body = {"prompt": "the", "max_tokens": LONG, "ignore_eos": True, "logprobs": 20}
            client.sendall(written({**body, "stream": True, "n": 2}))
            until(lambda: server.engine.running == 2)
            assert server.post().status_code == 200
            until(lambda: server.engine.running == 0)
        assert server.post().status_code == 200


DEADLY = """
from pathlib import Path
from specdiff.drafters.ngram import NGramDrafter

class Deadly(NGramDrafter):
    def propose(self, *arguments):
        if Path(__file__).with_name("armed").exists():
            raise SystemExit("the end")
        return super().propose(*arguments)
"""


def test_a_dead_engine_ends_the_process(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    folder = save(tmp_path / "model", tokenizer)
    with process("--model", folder, "--drafter", f"{tmp_path}/deadly.py:Deadly") as server:
        idle = connect(server.url)
        (tmp_path / "armed").touch()  # the server has drafted to time its rounds
        assert server.post().status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
        began = time.monotonic()
        assert server.popen.wait(60) == 1
        assert time.monotonic() - began < 30
        idle.close()
    assert any("the engine has failed" in line for line in server.log)
