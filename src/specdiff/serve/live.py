"""A live engine: one thread runs the rounds; requests join from any thread and leave at any time.

The thread owns target, drafter and rows. It pulls from a bounded queue in order of arrival, and
reads prompts in chunks, so that a long one holds up the others for one chunk a round at most.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from specdiff import engine
from specdiff.devices import out_of_memory
from specdiff.drafters.base import Drafter
from specdiff.errors import SpecdiffError, UsageError
from specdiff.targets.base import Target
from specdiff.verify import Verifier, match, match_gumbel

CHUNK = 512  # prompt tokens read between two rounds

Receive = Callable[[engine.RequestOutput | Exception], None]


class QueueFullError(SpecdiffError):
    """More requests wait than the queue holds; try again later."""


class EngineStoppedError(SpecdiffError):
    """The engine has failed or is shutting down, and takes no request."""


class MemoryFullError(SpecdiffError):
    """The device's memory did not hold the batch. The requests in it have failed, no others."""


@dataclass(eq=False, slots=True)
class Job:
    """A submitted request. `receive` is called in the engine's thread with each of its outputs.

    The last output has `finished`; an exception instead means that the engine has failed, or the
    memory was full. A `receive` that raises ends its own job only.
    """

    request: engine.Request
    receive: Receive
    canceled: bool = False
    pulled: bool = False  # it has left the queue


class LiveEngine:
    """Runs requests until `close`. All methods may be called from any thread.

    Args:
        max_rows: requests that run at a time; rows are opened by need.
        max_len: the most tokens of prompt and answer.
        max_queue: requests that wait at most.
        chunk: prompt tokens read between two rounds.
        observe: called in the engine's thread with every step.
    """

    def __init__(
        self,
        target: Target[Any],
        drafter: Drafter[Any],
        verifier: Verifier,
        draft_len: engine.DraftLength,
        *,
        max_rows: int = 8,
        max_len: int = 2048,
        max_queue: int = 256,
        chunk: int = CHUNK,
        observe: Callable[[engine.EngineStep], None] | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.verifier = verifier
        self.draft_len = draft_len
        self.max_rows = max_rows
        self.max_len = max_len
        self.max_queue = max_queue
        self.max_draft_len = drafter.draft_len if callable(draft_len) else draft_len
        self.chunk = chunk
        self.observe = observe
        self.error: BaseException | None = None
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._pulled = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="specdiff-engine", daemon=True)
        self._thread.start()

    @property
    def seeded(self) -> bool:
        """Whether requests above temperature 0 may name a seed; see `Drafter.reproducible`."""
        return self.drafter.reproducible or self.verifier in (match, match_gumbel)

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that have a row."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests."""
        return self.error is None and not self._closing and self.alive

    def check_room(self, count: int = 1) -> None:
        """Raise QueueFullError if `count` more requests do not fit, before any work is done."""
        self._check_open()
        idle = self.max_rows - self.running
        if self.waiting + count > self.max_queue + idle:
            raise QueueFullError(
                f"the queue holds {self.max_queue} requests and is full; try again later"
            )

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none.

        Raises UsageError for a request that the target cannot serve, QueueFullError, and
        EngineStoppedError.
        """
        engine.check([job.request for job in jobs], self.target, longest=self.max_draft_len)
        for job in jobs:
            size = len(job.request.prompt) + job.request.params.max_tokens
            if size > self.max_len:
                raise UsageError(
                    f"a request may reach {size} tokens, but slots are {self.max_len}; shorten "
                    "the prompt or lower max_tokens",
                    param="max_tokens",
                )
        with self._changed:
            self.check_room(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job after the current round; it receives nothing more."""
        with self._changed:
            job.canceled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def drain(self) -> None:
        """Take no more requests; the thread ends with the last of those submitted.

        Safe in signal handlers: it waits for no lock that a round may hold.
        """
        self._closing = True
        threading.Thread(target=self._wake, daemon=True).start()

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and wait until the requests submitted have ended, or are canceled.

        After `timeout` seconds the rest is canceled. Returns whether the thread has ended.
        """
        self.drain()
        self._thread.join(timeout)
        if self._thread.is_alive():
            stopped = EngineStoppedError("the server is shutting down")
            with self._changed:
                jobs = [*self._waiting, *self._running.values()]
            for job in jobs:
                self.cancel(job)
                _send(job, stopped)
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self.error is not None:
            raise EngineStoppedError(f"the engine has failed: {self.error}")
        if self._closing:
            raise EngineStoppedError("the server is shutting down")

    def _run(self) -> None:
        while True:
            try:
                self._serve()
                return
            except BaseException as error:
                if not out_of_memory(error):  # of the target or the device: nothing can go on
                    self._fail(error)
                    return
            self._drop_batch()

    def _serve(self) -> None:
        """Run requests until the engine drains."""
        steps = engine.serve(
            self.target,
            self.drafter,
            self._stream(),
            verifier=self.verifier,
            draft_len=self.draft_len,
            rows=self.max_rows,
            slots=self.max_len,
            chunk=self.chunk,
        )
        for step in steps:
            self._deliver(step)
            if self.observe is not None:
                self.observe(step)

    def _stream(self) -> Iterator[engine.Request | None]:
        """The next request by arrival; None while others run and none waits."""
        while True:
            with self._changed:
                while not self._waiting and not self._running and not self._closing:
                    self._changed.wait()
                if not self._waiting and not self._running:
                    return
                job = self._waiting.popleft() if self._waiting else None
                if job is not None:
                    job.pulled = True
                    self._running[self._pulled] = job
                    self._pulled += 1
            yield None if job is None else job.request

    def _deliver(self, step: engine.EngineStep) -> None:
        for output in step.outputs():
            job = self._running[output.request]
            if not job.canceled:
                _send(job, output)
            if output.finished is not None:
                self._end(output.request)
        for index, job in list(self._running.items()):
            if job.canceled:
                step.cancel(index)
                self._end(index)

    def _end(self, index: int) -> None:
        with self._changed:
            del self._running[index]

    def _drop_batch(self) -> None:
        """Fail the requests that have left the queue; those that wait get new rows."""
        with self._changed:
            jobs = [*self._running.values()]
            self._running.clear()
            self._pulled = 0
        for job in jobs:
            _send(job, MemoryFullError("out of memory; try again later, or with a shorter prompt"))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            jobs = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in jobs:
            _send(job, EngineStoppedError(f"the engine has failed: {error}"))


def _send(job: Job, output: engine.RequestOutput | Exception) -> None:
    """Hand an output to its job. One that cannot take it, as its loop has ended, is canceled."""
    try:
        job.receive(output)
    except Exception:
        job.canceled = True
