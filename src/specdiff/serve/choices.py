"""Choices: the answers of one request while they run, and the time they may take."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdiff.errors import TargetError
from specdiff.scoring import PromptScore
from specdiff.serve import payloads
from specdiff.serve.error_answers import RequestTimeoutError
from specdiff.serve.live import Job, LiveEngine, QueueFullError
from specdiff.serve.metrics import Metrics
from specdiff.serve.tool_calls import ToolCallReader
from specdiff.text.generation import Answer, Chunk


@dataclass(frozen=True, slots=True)
class Limits:
    """How long requests may take, in seconds.

    queue: until a request runs. request: until it has ended. shutdown: that running requests have
    to end when the server stops.
    """

    queue: float = 300.0
    request: float = 1800.0
    shutdown: float = 30.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to send: of the answer's tokens up to `tokens`. The `last` one ends the answer."""

    text: str
    tokens: int
    last: bool


class Pieces:
    """Cuts an answer into pieces of `size` tokens (None: of a round).

    Where a round ends shows how much of a draft was accepted; where `size` tokens end does not.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.sent = 0  # tokens
        self._chunks: deque[Chunk] = deque()

    def add(self, chunks: Sequence[Chunk], tokens: int, *, ended: bool) -> Iterator[Piece]:
        """The pieces that a round completes; `tokens` is the length of the answer after it."""
        self._chunks.extend(chunks)
        while self.size is not None and tokens - self.sent >= self.size:
            yield self._piece(self.sent + self.size, last=False)
        if ended or self.size is None:
            yield self._piece(tokens, last=ended)

    def _piece(self, end: int, *, last: bool) -> Piece:
        texts = []
        while self._chunks and (last or self._chunks[0].tokens <= end):
            texts.append(self._chunks.popleft().text)
        self.sent = end
        return Piece("".join(texts), end, last)


@dataclass(slots=True)
class Choice:
    """One answer of a request."""

    prompt: list[int]
    answer: Answer
    job: Job
    outputs: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    echo: str = ""  # text of the prompt, if it begins the answer
    score: PromptScore | None = None  # of the echo, until it is sent
    sent: int = 0  # tokens whose log probabilities have been written
    rounds: list[dict[str, Any]] = field(default_factory=list)  # records not streamed yet
    calls: ToolCallReader | None = None


class Reader:
    """Folds the outputs of the engine into the answers of choices."""

    def __init__(
        self,
        engine: LiveEngine,
        metrics: Metrics,
        limits: Limits,
        spell: Callable[[int], str],
        stream_chunk: int | None = None,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.limits = limits
        self.spell = spell
        self.stream_chunk = stream_chunk

    async def pieces(self, choice: Choice) -> AsyncIterator[Piece]:
        """The text as it comes.

        Raises EngineStoppedError, TargetError, QueueFullError or RequestTimeoutError.
        """
        began = time.monotonic()
        answer = choice.answer
        pieces = Pieces(self.stream_chunk)
        while not answer.done:
            output = await self._next(choice, began)
            if isinstance(output, Exception):
                raise output
            if isinstance(output, PromptScore):
                choice.score = output
                continue
            if output.tokens and not answer.generation.token_ids:
                self.metrics.first.labels(self.metrics.model).observe(time.monotonic() - began)
            before = len(answer.generation.token_ids)
            chunks = list(answer.add(output))
            if choice.job.request.with_drafts:
                count = len(answer.generation.token_ids) - before
                choice.rounds.append(payloads.round_record(output, count, chunks, self.spell))
            count = len(answer.generation.token_ids)
            for piece in pieces.add(chunks, count, ended=answer.done):
                yield piece
        self.engine.cancel(choice.job)  # it may run on, after a stop string
        generation = answer.generation
        self.metrics.total.labels(self.metrics.model).observe(time.monotonic() - began)
        self.metrics.ended(len(choice.prompt), generation.stats, generation.finish_reason)
        if generation.error is not None:
            raise TargetError(generation.error)

    async def finish(self, choice: Choice) -> None:
        """Read a choice to its end."""
        async for _ in self.pieces(choice):
            pass

    def cancel(self, choices: Sequence[Choice]) -> None:
        """End the choices that still run."""
        for choice in choices:
            if not choice.answer.done:
                self.engine.cancel(choice.job)

    async def _next(self, choice: Choice, began: float) -> Any:
        """The next output of a choice, which began at a monotonic time."""
        passed = time.monotonic() - began
        limits = self.limits
        if not choice.job.pulled:
            try:
                async with asyncio.timeout(min(limits.queue, limits.request) - passed):
                    return await choice.outputs.get()
            except TimeoutError:
                if not choice.job.pulled:
                    raise QueueFullError(
                        f"the request has waited {limits.queue:g} seconds; try again later"
                    ) from None
        try:
            async with asyncio.timeout(began + limits.request - time.monotonic()):
                return await choice.outputs.get()
        except TimeoutError:
            raise RequestTimeoutError(
                f"the request took longer than {limits.request:g} seconds; lower max_tokens"
            ) from None
