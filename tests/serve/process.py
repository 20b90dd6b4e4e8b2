"""`specdiff serve` in a process of its own, and clients that cost next to nothing themselves."""

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

import tiny

URL = re.compile(r"http://[\d.:]+")
POSITIONS = 2048


class Process:
    """A running server. `log`: what it has written to stderr."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        self.popen = popen
        self.log: list[str] = []
        assert popen.stderr is not None
        for line in popen.stderr:
            self.log.append(line)
            if "playground at" in line:
                break
        else:
            raise AssertionError("".join(self.log))
        match = URL.search(self.log[-1])
        assert match is not None
        self.url = match[0]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.log.extend(self.popen.stderr)

    def rss(self) -> int:
        """Resident memory in KiB."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def load(self) -> float:
        """The number of requests that run or wait."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        counts = re.findall(r"num_requests_\w+\{.*?\} ([\d.]+)", text)
        assert len(counts) == 2
        return sum(map(float, counts))

    def post(self, path: str = "completions", **body: Any) -> httpx.Response:
        body = {"prompt": "the rain", "max_tokens": 8, **body}
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=300)

    def end(self) -> int:
        """Send SIGTERM. Returns the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(120)


@contextmanager
def process(*options: str, **environment: str) -> Iterator[Process]:
    """A server with these options, at a free port unless they name one."""
    command = [sys.executable, "-m", "specdiff", "serve", "--port", "0", *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    server = None
    try:
        server = Process(popen)
        yield server
    finally:
        if popen.poll() is None:
            popen.terminate()
        try:
            popen.wait(60)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        if server is not None:
            server._reader.join()
        assert popen.stderr is not None
        popen.stderr.close()


def save(folder: Path, tokenizer: Any) -> str:
    """Write a tiny model with a tokenizer of `VOCAB` entries at most."""
    from test_lm import VOCAB

    tiny.model("llama", vocab=VOCAB, positions=POSITIONS).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(body: dict[str, Any], path: str = "completions") -> bytes:
    """A whole request, as a client writes it."""
    text = json.dumps(body)
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return (head + text).encode()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def burst(url: str, count: int, body: dict[str, Any]) -> Iterator[tuple[int, float]]:
    """Send one request `count` times at once. Yields (status, seconds) of each answer as it ends.

    One thread on bare sockets, so that the times are the server's.
    """
    address = (urlsplit(url).hostname, urlsplit(url).port)
    request = written(body)
    selector = selectors.DefaultSelector()
    began: dict[socket.socket, float] = {}
    answers: dict[socket.socket, bytes] = {}
    for _ in range(count):
        client = socket.socket()
        client.setblocking(False)
        began[client] = time.monotonic()
        answers[client] = b""
        client.connect_ex(address)
        selector.register(client, selectors.EVENT_WRITE)
    while answers:
        events = selector.select(60)
        assert events, "no answer within a minute"
        for key, mask in events:
            client = key.fileobj  # type: ignore[assignment]
            if mask & selectors.EVENT_WRITE:
                client.send(request)
                selector.modify(client, selectors.EVENT_READ)
            elif data := client.recv(65536):
                answers[client] += data
            else:
                selector.unregister(client)
                client.close()
                answer = answers.pop(client)
                yield int(answer.split()[1]), time.monotonic() - began[client]
    selector.close()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]
