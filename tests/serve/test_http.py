"""The server over real sockets: faults, hang-ups, limits, keys, logs and its end."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
import uvicorn

from doubles import SICKNESS, Sick
from specdiff import SpeculativeLM
from specdiff.drafters.base import Drafter
from specdiff.noise import Noise, row_seed
from specdiff.serve import guard, lifecycle
from specdiff.serve.app import build
from specdiff.serve.choices import Limits
from specdiff.serve.guard import MAX_BODY
from specdiff.serve.live import LiveEngine
from specdiff.targets.base import Target, TargetWrapper
from specdiff.types import Batch, Context, Draft, TargetOutput
from specdiff.verify import token
from test_lm import lm, target, tokenizer  # noqa: F401

SECRET = "a-secret-prompt"
LONG = 100


class Slow(TargetWrapper[Any]):
    """Takes `seconds` a round, or fails for good."""

    def __init__(self, inner: Target[Any], seconds: float = 0.0, crash: bool = False) -> None:
        super().__init__(inner)
        self.seconds = seconds
        self.crash = crash

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        time.sleep(self.seconds)
        if self.crash:
            raise RuntimeError("the device is gone")
        return self.inner.score(cache, batch, draft)


class Broken(Drafter[None]):
    """Raises whenever it drafts."""

    draft_len = 3

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        raise RuntimeError("no draft today")


class Running:
    """A server in a thread of this process."""

    def __init__(self, lm: SpeculativeLM, engine: LiveEngine, **options: Any) -> None:
        self.engine = engine
        self.address = lifecycle.bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.address.getsockname()[1]}"
        self.lm = lm
        config = uvicorn.Config(
            build(lm, engine, name="tiny", **options),
            http=lifecycle.TimedConnection,
            log_level="critical",
            ws="none",
        )
        self.server = lifecycle.Server(config, engine, timeout=20.0)
        self.thread = threading.Thread(target=self.server.run, args=([self.address],))
        self.thread.start()
        until(lambda: self.server.started)

    def post(self, timeout: float = 60, **body: Any) -> httpx.Response:
        body = {"prompt": "the rain", "max_tokens": 4, "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout)


@contextmanager
def serving(
    lm: SpeculativeLM,
    target: Target[Any] | None = None,
    drafter: Drafter[Any] | None = None,
    *,
    rows: int = 4,
    queue: int = 8,
    **options: Any,
) -> Iterator[Running]:
    drafter = drafter or lm.drafter
    engine = LiveEngine(
        target or lm.target,
        drafter,
        token,
        drafter.draft_len,
        max_rows=rows,
        max_len=lm.max_len,
        max_queue=queue,
    )
    running = Running(lm, engine, **options)
    try:
        yield running
    finally:
        running.server.handle_exit(15, None)
        running.thread.join(60)
        assert not running.thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def busy(server: Running, count: int, **body: Any) -> list[threading.Thread]:
    """Requests that run or wait, in threads."""
    options = {"max_tokens": LONG, **body}
    threads = [threading.Thread(target=server.post, kwargs=options) for _ in range(count)]
    for thread in threads:
        thread.start()
    engine = server.engine
    until(lambda: engine.running + engine.waiting == count)
    return threads


def test_logits_that_are_nan_fail_one_request_alone(lm: SpeculativeLM) -> None:
    sick = Sick(lm.target, SICKNESS["all nan"], first=0, seed=row_seed(7, 0))
    with serving(lm, sick) as server:
        others = busy(server, 2, seed=1)
        answer = server.post(seed=7)
        for thread in others:
            thread.join(60)
        assert server.post(seed=1).json()["usage"]["completion_tokens"] == 4
    error = answer.json()["error"]
    assert answer.status_code == 500
    assert error["type"] == "server_error"
    assert "not finite" in error["message"]


@pytest.mark.filterwarnings("ignore:the drafter:RuntimeWarning")
def test_a_drafter_that_raises_costs_no_request(lm: SpeculativeLM) -> None:
    with serving(lm, drafter=Broken()) as server:
        for seed in range(3):
            answer = server.post(seed=seed)
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(lm: SpeculativeLM, stream: bool) -> None:
    slow = Slow(lm.target, seconds=0.05)
    with serving(lm, slow, rows=1) as server:
        engine = server.engine
        for _ in range(2):  # one runs, one waits
            body = {"prompt": "the", "max_tokens": LONG, "stream": stream, "ignore_eos": True}
            with socket.create_connection(server.address.getsockname()) as client:
                text = json.dumps(body)
                client.sendall(
                    f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                    f"application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
                )
                until(lambda: engine.running + engine.waiting > 0)
            until(lambda: engine.running + engine.waiting == 0, 3)
        assert server.post().status_code == 200


def test_a_full_queue_is_503_before_any_work(lm: SpeculativeLM) -> None:
    with serving(lm, Slow(lm.target, 0.02), rows=1, queue=1) as server:
        threads = busy(server, 2)
        began = time.monotonic()
        answer = server.post(prompt=["not tokenized"])
        assert time.monotonic() - began < 1
        for thread in threads:
            thread.join(60)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "the queue holds 1" in answer.json()["error"]["message"]


def test_a_signal_drains(lm: SpeculativeLM) -> None:
    answers = []
    with serving(lm, Slow(lm.target, 0.03)) as server:
        thread = threading.Thread(target=lambda: answers.append(server.post(max_tokens=40)))
        thread.start()
        until(lambda: server.engine.running == 1)
        server.server.handle_exit(15, None)
        assert httpx.get(f"{server.url}/health").status_code == 503
        refused = server.post()
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        thread.join(60)
        server.thread.join(30)
        assert not server.thread.is_alive()
    assert answers[0].json()["usage"]["completion_tokens"] == 40
    assert server.engine.error is None


def test_a_dead_engine_is_503_and_ends_the_server(lm: SpeculativeLM) -> None:
    with serving(lm, Slow(lm.target, crash=True)) as server:
        assert server.post().status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.post().status_code == 503
        server.thread.join(30)
        assert not server.thread.is_alive()
    assert str(server.engine.error) == "the device is gone"


def test_requests_that_take_too_long_end(lm: SpeculativeLM) -> None:
    limits = Limits(queue=0.2, request=0.5)
    with serving(lm, Slow(lm.target, 0.05), rows=1, limits=limits) as server:
        threads = busy(server, 1)
        waiting = server.post()
        for thread in threads:
            thread.join(60)
        running = server.post(max_tokens=LONG)
        until(lambda: server.engine.running == 0)
    assert waiting.status_code == 503
    assert "has waited 0.2 seconds" in waiting.json()["error"]["message"]
    assert running.status_code == 408
    assert "longer than 0.5 seconds" in running.json()["error"]["message"]


def test_keys(lm: SpeculativeLM) -> None:
    with serving(lm, api_key="secret") as server:
        codes = {
            header: httpx.get(f"{server.url}/v1/models", headers={"authorization": header})
            for header in ("Bearer secret", "bearer secret", "secret", "Bearer other", "Bearer")
        }
        assert httpx.get(f"{server.url}/version").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
    assert [codes[header].status_code for header in codes] == [200, 200, 401, 401, 401]


def test_other_host_names_and_origins_are_not_served(lm: SpeculativeLM) -> None:
    with serving(lm, hosts=guard.LOOPBACK) as server:
        evil = {"host": "evil.example"}
        assert httpx.get(f"{server.url}/v1/models", headers=evil).status_code == 421
        origin = {"origin": "http://evil.example"}
        answer = httpx.get(f"{server.url}/v1/models", headers=origin)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        plain = {"content-type": "text/plain"}  # what a page of another site may send
        body = json.dumps({"prompt": "the"})
        crossed = httpx.post(f"{server.url}/v1/completions", content=body, headers=plain)
        assert crossed.status_code == 400


def test_bounds(lm: SpeculativeLM) -> None:
    bad: dict[str, Any] = {
        "n": 17, "stop": ["x" * 257], "logit_bias": {str(i): 1 for i in range(301)},
        "max_tokens": 1000, "temperature": -1, "top_p": 1.5, "best_of": 2, "prompt": "x" * 100_000,
        "allowed_token_ids": [-1], "seed": "one",
    }  # fmt: skip
    with serving(lm) as server:
        for name, value in bad.items():
            answer = server.post(**{name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        headers = {"content-type": "application/json"}
        for number in ("NaN", "Infinity", "1e999", "-1"):
            body = f'{{"prompt": "a", "temperature": {number}}}'
            answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")
        large = httpx.post(f"{server.url}/v1/completions", content=b" " * (MAX_BODY + 1))
        assert large.status_code == 413
        chunks = httpx.post(f"{server.url}/tokenize", content=iter([b" " * 2**20] * 5))
        assert chunks.status_code == 413
        assert httpx.get(f"{server.url}/nothing").json()["error"]["code"] == 404
        assert httpx.get(f"{server.url}/tokenize").json()["error"]["code"] == 405
        body = '{"prompt": "\\ud800 \\u0000", "max_tokens": 2}'
        odd = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert odd.status_code == 200
        body = '{"prompt": "a", "\\ud800": 1, "stop": "\\ud800"}'
        odd = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert odd.status_code < 500


def test_prompts_and_keys_are_never_logged(
    lm: SpeculativeLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ValueError(f"cannot read {SECRET}")

    caplog.set_level(logging.DEBUG)
    with serving(lm, api_key="the-key") as server:
        headers = {"authorization": "Bearer the-key"}
        with httpx.Client(base_url=server.url, headers=headers) as client:
            body = {"prompt": SECRET, "max_tokens": 2}
            assert client.post(f"/v1/completions?q={SECRET}", json=body).status_code == 200
            assert client.post("/v1/completions", json={**body, "top_p": 9}).status_code == 400
            monkeypatch.setattr(lm, "encode", fail)
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 500
            assert SECRET not in answer.text
            client.get("/a%0Ab")
    lines = [record.getMessage() for record in caplog.records if record.name[:8] == "specdiff"]
    assert any("POST /v1/completions 200" in line for line in lines)
    assert any(f"{answer.headers['x-request-id']}: ValueError at" in line for line in lines)
    assert not any(SECRET in line or "the-key" in line or "\n" in line for line in lines)


def test_slow_clients_delay_nobody_and_are_closed(
    lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    with serving(lm) as server:
        clients = [socket.create_connection(server.address.getsockname()) for _ in range(200)]
        for index, client in enumerate(clients):
            client.sendall(head + (b"Content-Length: 9\r\n\r\n{" if index % 2 else b"X-"))
        assert server.post().status_code == 200
        for client in clients:
            client.settimeout(30)
            answer = client.recv(1000)
            assert not answer or b" 408 " in answer
            client.close()
        assert server.post().status_code == 200


def test_a_stream_is_the_text_in_whole_characters(lm: SpeculativeLM, tokenizer: Any) -> None:
    with serving(lm) as server:
        for seed in range(4):
            body = {"prompt": "🦊 日本", "max_tokens": 40, "seed": seed, "stop": "e"}
            want = server.post(**body).json()["choices"][0]
            lines = [
                line.removeprefix("data: ")
                for line in server.post(**body, stream=True).text.splitlines()
                if line
            ]
            assert lines.pop() == "[DONE]"
            parts = [json.loads(line)["choices"][0] for line in lines]
            assert "".join(part["text"] for part in parts) == want["text"]
            reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
            assert reasons == [want["finish_reason"]]


def test_a_stream_that_fails_says_so_and_ends(lm: SpeculativeLM) -> None:
    with serving(lm, Slow(lm.target, crash=True)) as server:
        lines = server.post(stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == 503
