"""The server under load: bursts, hang-ups, a soak, and its end.

The long forms (-m slow) have the bounds of an idle machine; the short ones hold on a busy one.
"""

import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
from process import Process, burst, connect, percentile, process, save, written
from test_http import Slow, serving, until

from specdiff import SpeculativeLM
from specdiff.targets.base import Target, TargetWrapper
from specdiff.types import Batch, Draft, TargetOutput
from test_lm import lm, target, tokenizer  # noqa: F401

BODY: dict[str, Any] = {"prompt": "the rain " * 20, "max_tokens": 8, "ignore_eos": True}
BURST = 300
ROWS = 8
QUEUE = 24


class Gate(TargetWrapper[Any]):
    """Scores nothing until it is opened."""

    def __init__(self, inner: Target[Any]) -> None:
        super().__init__(inner)
        self.opened = threading.Event()

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        assert self.opened.wait(120)
        return self.inner.score(cache, batch, draft)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return save(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Its options come from a file, the environment and flags."""
    file = tmp_path_factory.mktemp("options") / "server.yaml"
    file.write_text(
        "served-model-name: of-the-file\ndrafter: ngram\n"
        "serve:\n  max-queue: 3\n  max-num-seqs: 3\n  max-model-len: 1000\n"
    )
    options = ("--model", folder, "--config", str(file), "--max-num-seqs", str(ROWS))
    environment = {"SPECDIFF_MAX_QUEUE": str(QUEUE), "SPECDIFF_MAX_NUM_SEQS": "2"}
    with process(*options, **environment) as one:
        one.post()  # the first request is slower
        yield one


def test_a_burst_is_answered_and_only_what_runs_is_tokenized(
    lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = lm.encode
    prompts: list[Any] = []

    def counted(prompt: Any, **options: Any) -> list[int]:
        prompts.append(prompt)
        return encode(prompt, **options)

    monkeypatch.setattr(lm, "encode", counted)
    gate = Gate(lm.target)
    codes = []
    with serving(lm, gate, rows=ROWS, queue=QUEUE) as server:
        try:
            for code, _ in burst(server.url, BURST, {**BODY, "prompt": "the rain"}):
                codes.append(code)
                if len(codes) == BURST - ROWS - QUEUE:
                    gate.opened.set()
        finally:
            gate.opened.set()
    assert codes[: BURST - ROWS - QUEUE] == [503] * (BURST - ROWS - QUEUE)
    assert codes[BURST - ROWS - QUEUE :] == [200] * (ROWS + QUEUE)
    assert len(prompts) == ROWS + QUEUE


def test_refused_and_bad_requests_leave_their_places(lm: SpeculativeLM) -> None:
    with serving(lm, rows=1, queue=1) as server:
        for _ in range(3):
            assert server.post(top_p=9).status_code == 400
            assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 400
        assert server.post().status_code == 200


@pytest.mark.slow
def test_refusals_are_quick(server: Process) -> None:
    for _ in range(3):
        answers = list(burst(server.url, BURST, {**BODY, "max_tokens": 100}))
        refusals = [seconds for code, seconds in answers if code == 503]
        print(f"refused {len(refusals)}, p99 {1000 * percentile(refusals, 0.99):.0f} ms")
        assert {code for code, _ in answers} == {200, 503}
        assert len(answers) == BURST
        assert percentile(refusals, 0.99) <= 0.2


def abort(url: str, seconds: float, **fields: Any) -> None:
    """Hang up `seconds` after asking for a long answer."""
    with connect(url) as client:
        client.sendall(written({**BODY, "max_tokens": 100, **fields}))
        time.sleep(seconds)


def aborts(url: str, count: int, seed: int) -> None:
    """Hang up on streams and others, running, waiting or not read yet; eight at a time."""

    def some(number: int) -> None:
        draw = random.Random(seed + number)
        for _ in range(count // 8):
            stream = bool(draw.getrandbits(1))
            abort(url, draw.choice((0, 0.002, 0.02, 0.1)), stream=stream, n=draw.choice((1, 1, 3)))

    threads = [threading.Thread(target=some, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_hang_ups_hold_no_row(lm: SpeculativeLM) -> None:
    with serving(lm, Slow(lm.target, 0.01), rows=2, queue=30) as server:
        aborts(server.url, 48, seed=0)
        until(lambda: server.engine.running + server.engine.waiting == 0)
        assert server.post().status_code == 200


@pytest.mark.slow
def test_a_thousand_hang_ups_cost_no_memory(server: Process) -> None:
    aborts(server.url, 200, seed=0)
    before = server.rss()
    aborts(server.url, 1000, seed=1000)
    until(lambda: server.load() == 0)
    print(f"RSS {before} KiB, then {server.rss()} KiB")
    assert server.rss() <= 1.05 * before
    assert server.post().status_code == 200


def kinds() -> list[tuple[str, dict[str, Any], int]]:
    """Requests of all kinds: path, body, and the status of the answer."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "the rain 🦊"}]}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    return [
        ("completions", {"prompt": "the rain", "max_tokens": 30}, 200),
        ("completions", {"prompt": ["in", "spain"], "max_tokens": 9, "n": 2}, 200),
        ("completions", {"prompt": "the rain " * 60, "max_tokens": 5, "logprobs": 3}, 200),
        ("completions", {"prompt": "the", "stop": ["a", "e"], "temperature": 0}, 200),
        ("chat/completions", {**chat, "max_tokens": 20, "top_p": 0.9}, 200),
        ("chat/completions", {**chat, "max_tokens": 20, "logit_bias": {"5": -9}}, 200),
        ("chat/completions", {**chat, "max_tokens": 30, "response_format": form}, 200),
        ("completions", {"prompt": "the", "temperature": -1}, 400),
        ("completions", {"prompt": "the", "max_tokens": 10**6}, 400),
        ("chat/completions", {"messages": []}, 400),
    ]


def soak(server: Process, seconds: float, clients: int = 6) -> list[str]:
    """Mixed load until the time is over. Returns what went wrong."""
    faults: list[str] = []
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=300) as http:
            while time.monotonic() < end:
                path, body, code = draw.choice(kinds())
                if draw.random() < 0.1:
                    abort(server.url, 0.01, stream=True)
                body = {**body, "stream": bool(draw.getrandbits(1))}
                answer = http.post(f"/v1/{path}", json=body)
                whole = answer.text.endswith("data: [DONE]\n\n") or not body["stream"]
                if answer.status_code != code or (code == 200 and not whole):
                    faults.append(f"{answer.status_code} {body} {answer.text[-300:]}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def test_flags_come_before_the_environment_and_that_before_the_file(server: Process) -> None:
    entry = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert entry["id"] == "of-the-file"
    assert entry["max_model_len"] == 1000
    body = {"prompt": ["the"] * (ROWS + QUEUE + 1)}
    refusal = server.post(**body)
    assert refusal.status_code == 400
    assert f"takes at most {ROWS + QUEUE}" in refusal.json()["error"]["message"]


def test_a_soak_has_no_faults(server: Process) -> None:
    pytest.importorskip("llguidance", reason="the structured extra is not installed")
    assert soak(server, 6) == []
    until(lambda: server.load() == 0)


@pytest.mark.slow
def test_a_long_soak_has_no_faults_and_costs_no_memory(server: Process) -> None:
    pytest.importorskip("llguidance", reason="the structured extra is not installed")
    assert soak(server, 60) == []
    before = server.rss()
    assert soak(server, 600) == []
    until(lambda: server.load() == 0)
    print(f"RSS {before} KiB, then {server.rss()} KiB")
    assert server.rss() <= 1.05 * before


@pytest.mark.slow
def test_slow_clients_delay_others_by_little(server: Process) -> None:
    def latency() -> float:
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert server.post(**BODY).status_code == 200
            times.append(time.monotonic() - began)
        return percentile(times, 0.5)

    alone = latency()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    clients = [connect(server.url) for _ in range(200)]
    for index, client in enumerate(clients):
        client.sendall(head + (b"Content-Length: 9\r\n\r\n{" if index % 2 else b"X-"))
    crowded = latency()
    for client in clients:
        client.settimeout(60)
        answer = client.recv(1000)
        assert not answer or b" 408 " in answer
        client.close()
    print(f"median {1000 * alone:.0f} ms alone, {1000 * crowded:.0f} ms among slow clients")
    assert crowded <= 2 * alone


def test_no_piece_of_an_answer_waits_for_an_acknowledgment(lm: SpeculativeLM) -> None:
    """The kernel holds a small piece back for 40 ms, unless it is asked not to."""
    with serving(lm) as server, httpx.Client(base_url=server.url) as http:
        times = []
        for _ in range(40):  # on one connection: the kernel is lenient at its beginning
            began = time.monotonic()
            assert http.post("/v1/completions", json={"n": 17}).status_code == 400
            times.append(time.monotonic() - began)
    assert min(times[20:]) < 0.035


@pytest.mark.slow
def test_bad_requests_are_refused_quickly(server: Process) -> None:
    bad: list[dict[str, Any]] = [
        {"n": 17},
        {"stop": ["x" * 257]},
        {"stop": ["x"] * 5},
        {"logit_bias": {str(i): 1 for i in range(301)}},
        {"max_tokens": 10**6},
        {"temperature": -1},
        {"top_p": 1.5},
    ]
    with httpx.Client(base_url=server.url) as http:
        for body in bad:
            http.post("/v1/completions", json={"prompt": "the", **body})
            began = time.monotonic()
            answer = http.post("/v1/completions", json={"prompt": "the", **body})
            seconds = time.monotonic() - began
            assert answer.status_code == 400
            print(f"{next(iter(body))}: {1000 * seconds:.1f} ms")
            assert seconds < 0.05


def answers(server: Process, ends: list[tuple[int, float]], **body: Any) -> threading.Thread:
    """A request in a thread that notes its status and when it ends."""

    def ask() -> None:
        code = server.post(ignore_eos=True, **body).status_code
        ends.append((code, time.monotonic()))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def ended(server: Process, bound: float) -> None:
    """SIGTERM while requests run: they end, and so does the process, `bound` seconds later."""
    ends: list[tuple[int, float]] = []
    idle = connect(server.url)  # a connection that sends nothing holds nothing up
    threads = [answers(server, ends, max_tokens=400, stream=stream) for stream in (True, False)]
    until(lambda: server.load() == 2)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    refusal = server.post()
    assert refusal.status_code == 503
    assert refusal.headers["retry-after"]
    for thread in threads:
        thread.join()
    code = server.popen.wait(60)
    seconds = time.monotonic() - max(end for _, end in ends)
    print(f"exit {seconds:.2f} s after the last answer")
    assert [status for status, _ in ends] == [200, 200]
    assert code == 0
    assert seconds <= bound
    idle.close()


def test_a_signal_ends_the_process(folder: str) -> None:
    with process("--model", folder, "--drafter", "ngram", "--dtype", "float32") as server:
        ended(server, 15)


@pytest.mark.slow
def test_a_signal_ends_the_process_soon(folder: str) -> None:
    with process("--model", folder, "--drafter", "ngram", "--dtype", "float32") as server:
        ended(server, 2)


@pytest.mark.slow
def test_requests_that_outlast_the_timeout_are_canceled(folder: str) -> None:
    options = ("--model", folder, "--drafter", "none", "--max-num-seqs", "1")
    with process(*options, "--shutdown-timeout", "1", "--max-queue", "64") as server:
        ends: list[tuple[int, float]] = []
        threads = [answers(server, ends, max_tokens=2000) for _ in range(20)]
        until(lambda: server.load() == 20)
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began <= 3
        for thread in threads:
            thread.join()
    assert {code for code, _ in ends} <= {200, 503}
    assert len(ends) == 20


def test_a_connection_that_closes_early_is_no_fault(server: Process) -> None:
    for text in (b"", b"GET", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n", b"\0" * 99):
        with connect(server.url) as client:
            client.sendall(text)
            client.shutdown(socket.SHUT_WR)
    assert server.post().status_code == 200
    assert not any("Traceback" in line for line in server.log)
