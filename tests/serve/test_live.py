"""The live engine: joins, leaves, limits and failures, with a real target."""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import tiny
from specdiff import catalog, engine
from specdiff.errors import UsageError
from specdiff.serve.live import EngineStoppedError, Job, LiveEngine, QueueFullError
from specdiff.targets.causal import CausalTarget
from specdiff.types import SamplingParams
from specdiff.verify import token

WAIT = 60


class Inbox(queue.Queue[Any]):
    """Receives the outputs of one job."""

    def tokens(self) -> list[int]:
        tokens: list[int] = []
        while True:
            output = self.get(timeout=WAIT)
            if isinstance(output, Exception):
                raise output
            tokens += output.tokens
            if output.finished:
                return tokens


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    return tiny.target("llama")


def live(target: CausalTarget, **options: Any) -> LiveEngine:
    drafter = catalog.drafter("ngram", target.info, {})
    return LiveEngine(target, drafter, token, 3, max_len=200, **options)


@pytest.fixture
def running(target: CausalTarget) -> Iterator[LiveEngine]:
    server = live(target, max_rows=4, max_queue=64)
    yield server
    assert server.close(WAIT)


def request(prompt: Sequence[int], max_tokens: int = 16, seed: int = 0) -> engine.Request:
    return engine.Request(prompt, SamplingParams(max_tokens=max_tokens), seed)


def alone(target: CausalTarget, one: engine.Request) -> list[int]:
    drafter = catalog.drafter("ngram", target.info, {})
    outputs = engine.run(target, drafter, [one], verifier=token, draft_len=3)
    return [t for output in outputs for t in output.tokens]


def test_eight_threads_get_the_tokens_of_requests_alone(
    target: CausalTarget, running: LiveEngine
) -> None:
    requests = [request(p, seed=i) for i, p in enumerate(tiny.prompts(24))]
    want = [alone(target, one) for one in requests]
    texts: dict[int, list[int]] = {}

    def client(first: int) -> None:
        for i in range(first, len(requests), 8):
            inbox = Inbox()
            running.submit(Job(requests[i], inbox.put))
            texts[i] = inbox.tokens()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert [texts[i] for i in range(len(requests))] == want
    assert running.running == running.waiting == 0


def test_a_canceled_job_leaves_and_hurts_nobody(target: CausalTarget, running: LiveEngine) -> None:
    inbox = Inbox()
    job = Job(request([1, 2, 3], max_tokens=190), inbox.put)
    running.submit(job)
    inbox.get(timeout=WAIT)
    running.cancel(job)
    other = Inbox()
    running.submit(Job(request([4, 5]), other.put))
    assert other.tokens() == alone(target, request([4, 5]))
    assert running.running == 0


def test_a_full_queue_refuses(target: CausalTarget) -> None:
    server = live(target, max_rows=1, max_queue=1)
    inboxes = [Inbox() for _ in range(2)]
    with pytest.raises(QueueFullError, match="the queue holds 1"):
        server.submit(*[Job(request([1]), Inbox().put) for _ in range(3)])
    server.submit(*[Job(request([1]), inbox.put) for inbox in inboxes])
    for inbox in inboxes:
        assert len(inbox.tokens()) == 16
    assert server.close(WAIT)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        server.submit(Job(request([1]), Inbox().put))


def test_a_bad_request_is_refused_at_once(running: LiveEngine) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        running.submit(Job(request([]), Inbox().put))
    with pytest.raises(UsageError, match="slots are 200"):
        running.submit(Job(request([1], max_tokens=200), Inbox().put))
    assert running.healthy


def test_a_long_prompt_holds_nobody_up(target: CausalTarget) -> None:
    """Rounds go on between the chunks of a prompt: count them, not seconds."""
    rounds: list[list[int]] = []
    drafter = catalog.drafter("none", target.info, {})
    prompt = [*range(40)] * 3
    stream = [request([1, 2], max_tokens=60), request(prompt, max_tokens=4)]
    for step in engine.serve(target, drafter, stream, verifier=token, draft_len=0, rows=2, chunk=8):
        rounds.append([output.request for output in step.outputs()])
    first = next(i for i, running in enumerate(rounds) if 1 in running)
    assert first >= len(prompt) // 8 - 1
    assert all(0 in running for running in rounds[:first])


def test_a_dead_engine_answers_everyone(target: CausalTarget) -> None:
    def crash(step: engine.EngineStep) -> None:
        raise RuntimeError("out of memory")

    server = live(target, max_rows=1, max_queue=4, observe=crash)
    inboxes = [Inbox() for _ in range(3)]
    server.submit(*[Job(request([1]), inbox.put) for inbox in inboxes])
    for inbox in inboxes:
        with pytest.raises(EngineStoppedError, match="out of memory"):
            inbox.tokens()
    assert not server.healthy
