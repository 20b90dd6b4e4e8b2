"""Load a server with the API of OpenAI, and measure it: python scripts/serve_load.py URL

Each client streams chat answers one after another, with the packaged prompts. A table of tokens per
second, of the time to the first token (TTFT) and of the time per further token (TPOT) is printed
for each number of clients; --json writes every figure.

--compare MODEL starts `specdiff serve` with and without drafter and `transformers serve` on this
machine instead, and loads them in turns.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import torch

from specdiff import catalog, environment
from specdiff.bench.suites import EMBEDDED

START_SECONDS = 300.0  # that a server may take to load its model
HEADER = """\
| server | clients | tok/s | TTFT p50 | p99 (ms) | TPOT p50 | p99 (ms) | tokens/chunk | failed |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer; times in seconds. `error`: why there is none.

    chunks: events with text. ttft: from the request to the first of them. tpot: from the first to
    the last, by token after the first.
    """

    tokens: int
    chunks: int
    ttft: float
    tpot: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What one server did for a number of clients. Times in milliseconds."""

    server: str
    clients: int
    requests: int
    failed: int
    seconds: float
    tokens: int
    throughput: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    tokens_per_chunk: float

    @classmethod
    def of(cls, server: str, clients: int, answers: Sequence[Answer], seconds: float) -> "Load":
        """Summarize answers that took `seconds` together."""
        good = [answer for answer in answers if not answer.error]
        tokens = sum(answer.tokens for answer in good)
        ttft = [1000 * answer.ttft for answer in good]
        tpot = [1000 * answer.tpot for answer in good if answer.tokens > 1]
        chunks = sum(answer.chunks for answer in good)
        return cls(
            server=server,
            clients=clients,
            requests=len(answers),
            failed=len(answers) - len(good),
            seconds=seconds,
            tokens=tokens,
            throughput=tokens / seconds,
            ttft_p50=percentile(ttft, 0.5),
            ttft_p99=percentile(ttft, 0.99),
            tpot_p50=percentile(tpot, 0.5),
            tpot_p99=percentile(tpot, 0.99),
            tokens_per_chunk=tokens / max(chunks, 1),
        )

    def row(self) -> str:
        """A line of the table."""
        figures = [
            f"{self.throughput:.1f}",
            *(f"{value:.0f}" for value in (self.ttft_p50, self.ttft_p99)),
            *(f"{value:.1f}" for value in (self.tpot_p50, self.tpot_p99)),
            f"{self.tokens_per_chunk:.2f}",
        ]
        failed = f"{self.failed} of {self.requests}"
        return f"| {self.server} | {self.clients} | {' | '.join(figures)} | {failed} |"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of all does not exceed (nearest rank); NaN of none."""
    ranked = sorted(values)
    return ranked[round(share * (len(ranked) - 1))] if ranked else float("nan")


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Stream one chat answer."""
    began = time.perf_counter()
    times: list[float] = []
    usage = 0
    try:
        async with client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Answer(0, 0, 0.0, 0.0, f"{response.status_code}: {response.text[:200]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Answer(0, 0, 0.0, 0.0, str(event["error"])[:200])
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
                if any(choice.get("delta", {}).get("content") for choice in event["choices"]):
                    times.append(time.perf_counter())
    except httpx.HTTPError as error:
        return Answer(0, 0, 0.0, 0.0, f"{type(error).__name__}: {error}")
    if not times:
        return Answer(0, 0, 0.0, 0.0, "no text")
    tokens = usage or len(times)  # a server without usage sends each token apart
    tpot = (times[-1] - times[0]) / max(tokens - 1, 1)
    return Answer(tokens, len(times), times[0] - began, tpot)


async def load(
    url: str, bodies: Sequence[dict[str, Any]], clients: int, headers: dict[str, str]
) -> tuple[list[Answer], float]:
    """Send all bodies, `clients` at a time. Returns the answers and the seconds they took."""
    remaining = iter(bodies)
    answers: list[Answer] = []
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=600, limits=limits
    ) as client:

        async def one() -> None:
            for body in remaining:
                answers.append(await stream(client, body))

        began = time.perf_counter()
        await asyncio.gather(*[one() for _ in range(clients)])
        return answers, time.perf_counter() - began


def messages() -> Iterator[list[dict[str, str]]]:
    """The packaged prompts as conversations of one turn, over and over."""
    lines = EMBEDDED.read_text(encoding="utf-8").splitlines()
    for record in cycle([json.loads(line) for line in lines]):
        yield record.get("messages") or [{"role": "user", "content": record["prompt"]}]


@contextmanager
def started(command: Sequence[str], url: Callable[[str], str | None], log: Path) -> Iterator[str]:
    """A server in a process of its own. Its address, once `url` finds it in the log.

    Raises RuntimeError with the end of the log if the server ends or takes too long.
    """
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end = time.monotonic() + START_SECONDS
        while (address := url(log.read_text(errors="replace"))) is None:
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command)} did not start:\n{tail}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def specdiff_server(
    a: argparse.Namespace, drafter: str
) -> tuple[list[str], Callable[[str], str | None]]:
    """The command of `specdiff serve`, and how its address is read from its log."""
    command = [sys.executable, "-m", "specdiff", "serve", "--port", "0"]
    command += ["--model", a.compare, "--dtype", a.dtype, "--drafter", drafter]
    command += ["--max-num-seqs", str(max(a.clients))]
    if drafter != "none" and a.draft_len:
        command += ["--draft-len", a.draft_len]

    def url(log: str) -> str | None:
        _, mark, rest = log.partition(f"{a.dtype}: ")
        return rest.partition(",")[0] if mark and "\n" in rest else None

    return command, url


def transformers_server(a: argparse.Namespace) -> tuple[list[str], Callable[[str], str | None]]:
    """The command of `transformers serve`, and how to see that it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(a.folder)]
    command += ["--dtype", a.dtype, "--device", "cpu", "--host", "127.0.0.1"]
    command += ["--port", str(port)]

    def url(_: str) -> str | None:
        try:
            ready = httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.HTTPError:
            return None
        return f"http://127.0.0.1:{port}/v1" if ready else None

    return command, url


def compare(a: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, tuple[str, str]]:
    """Start the servers to compare. Each one's name, address, and the model's name there."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    a.folder = catalog.model_folder(a.compare)
    commands = {
        "specdiff, no drafter": (specdiff_server(a, "none"), a.compare),
        f"specdiff, {a.drafter}": (specdiff_server(a, a.drafter), a.compare),
        "transformers": (transformers_server(a), str(a.folder)),
    }
    servers = {}
    for name, ((command, url), model) in commands.items():
        print(f"starting {name}", file=sys.stderr)
        log = folder / f"{name.replace(', ', '-').replace('/', '-')}.log"
        servers[name] = (stack.enter_context(started(command, url, log)), model)
    return servers


def measure(a: argparse.Namespace, servers: dict[str, tuple[str, str]]) -> list[Load]:
    """Load the servers in turns, `a.repeats` times; one result per server and clients."""
    headers = {"Authorization": f"Bearer {a.api_key}"}
    results: dict[tuple[str, int], tuple[list[Answer], float]] = {}
    for clients in a.clients:
        for repeat in range(a.repeats + 1):  # the first one warms up
            for name, (url, model) in servers.items():
                bodies = [
                    {
                        "model": model,
                        "messages": turn,
                        "max_tokens": a.max_tokens,
                        "temperature": a.temperature,
                        "stream": True,
                        "stream_options": {"include_usage": True},
                    }
                    for turn in islice(messages(), clients if not repeat else a.requests * clients)
                ]
                answers, seconds = asyncio.run(load(url, bodies, clients, headers))
                if repeat:
                    earlier, total = results.get((name, clients), ([], 0.0))
                    results[name, clients] = ([*earlier, *answers], total + seconds)
    loads = []
    for (name, clients), (answers, seconds) in sorted(results.items(), key=lambda e: e[0][1]):
        loads.append(Load.of(name, clients, answers, seconds))
        for error in {answer.error for answer in answers if answer.error}:
            print(f"{name}: {error}", file=sys.stderr)
    return loads


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("url", nargs="?", help="of the API, such as http://127.0.0.1:8000/v1")
    p.add_argument("--compare", metavar="MODEL", help="start and compare servers of this model")
    p.add_argument("--drafter", default="ngram", help="of specdiff serve, with --compare")
    p.add_argument("--draft-len", default="", help="of specdiff serve, with --compare")
    p.add_argument("--dtype", default="bfloat16", help="of all servers, with --compare")
    p.add_argument("--logs", type=Path, default=Path("runs/serve_load"), help="of the servers")
    p.add_argument("--model", default="", help="the model's name, if the server wants one")
    p.add_argument("--api-key", default="none")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    p.add_argument("--requests", type=int, default=4, help="of each client")
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--json", type=Path, help="file for the figures")
    a = p.parse_args(arguments)
    if (a.url is None) == (a.compare is None):
        p.error("give either the URL of a server, or --compare MODEL")
    with ExitStack() as stack:
        if a.compare is None:
            servers = {"server": (a.url, a.model)}
        else:
            a.logs.mkdir(parents=True, exist_ok=True)
            servers = compare(a, a.logs, stack)
        loads = measure(a, servers)
    print(HEADER)
    for row in loads:
        print(row.row())
    if a.json is not None:
        facts = environment.describe(torch.device("cpu"))
        options = {name: str(value) for name, value in vars(a).items() if name != "api_key"}
        record = {"environment": facts, "options": options, "loads": [asdict(one) for one in loads]}
        a.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
