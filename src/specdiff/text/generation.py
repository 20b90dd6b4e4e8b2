"""Generations: the answer of a request, folded from the engine's outputs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from specdiff.engine import EngineStep, RequestOutput
from specdiff.errors import TargetError
from specdiff.stats import Stats
from specdiff.text.detokenizer import Detokenizer


@dataclass(slots=True)
class Generation:
    """One answer. `accepted[i]`: token i came from the draft.

    `text` ends before a stop string, `token_ids` with the token that completed it.

    finish_reason: "stop" (end of text, stop id or stop string), "length", "interrupted" (by the
        user of a conversation), or "error" (the target failed; `error` says how).
    logprobs: the target's own logprob of each token, before any sampling option, if requested.
    top_logprobs: the (token id, logprob) pairs of the most likely tokens at each position.
    cached_tokens: prompt tokens that an earlier request left in the cache.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    finish_reason: str = ""
    stats: Stats = field(default_factory=Stats)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    error: str | None = None
    cached_tokens: int = 0


def raise_if_failed(generations: Sequence[Generation]) -> None:
    """Raise TargetError, with all generations, if the target failed during one of them."""
    failures = [(place, g.error) for place, g in enumerate(generations) if g.error is not None]
    if failures:
        place, error = failures[0]
        more = f" (and {len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise TargetError(f"answer {place} of {len(generations)}: {error}{more}", generations)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of streamed text. `accepted`: it came from the draft.

    `generation` is the answer so far; the last chunk completes it. `tokens`: how many of its tokens
    the text reaches up to.
    """

    text: str
    accepted: bool
    generation: Generation
    tokens: int = 0


class Answer:
    """Folds the outputs of one request into `generation`.

    `done` may become true before the request has ended, at a stop string: cancel the request then.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.generation = Generation()
        self.detokenizer = detokenizer
        self.done = False

    def add(self, output: RequestOutput) -> Iterator[Chunk]:
        """The text of a round: a chunk for each token that completes some, and a final one.

        The text of the generation grows as the chunks are read. Tokens after the one that completes
        a stop string are dropped, from the lists and from the stats.
        """
        texts: list[tuple[str, bool, int]] = []
        before = len(self.generation.token_ids)
        count = 0
        while count < len(output.tokens) and not self.detokenizer.stopped:
            if text := self.detokenizer.add(output.tokens[count]):
                texts.append((text, count < output.accepted, before + count + 1))
            count += 1
        stopped = self.detokenizer.stopped
        self.done = stopped or output.finished is not None
        if self.done:
            texts.append((self.detokenizer.finish(), False, before + count))
            self.generation.finish_reason = "stop" if stopped else output.finished or ""
            self.generation.error = None if stopped else output.error
        self._record(output, count)
        for text, accepted, tokens in texts:
            yield self._chunk(text, accepted, tokens)

    def interrupt(self) -> Chunk:
        """End the answer here, with the text that was buffered for a possible stop string."""
        self.done = True
        self.generation.finish_reason = "interrupted"
        return self._chunk(self.detokenizer.finish(), False, len(self.generation.token_ids))

    def _record(self, output: RequestOutput, count: int) -> None:
        """Add the first `count` tokens of a round to the lists and the stats."""
        generation = self.generation
        generation.cached_tokens = output.cached_tokens
        generation.token_ids += output.tokens[:count]
        generation.accepted += [i < output.accepted for i in range(count)]
        generation.logprobs += output.logprobs[:count]
        generation.top_logprobs += output.top_logprobs[:count]
        generation.stats.add(
            output.drafted, output.accepted, count, output.seconds, disabled=output.disabled
        )

    def _chunk(self, text: str, accepted: bool, tokens: int) -> Chunk:
        self.generation.text += text
        return Chunk(text, accepted, self.generation, tokens)


def fold(steps: Iterable[EngineStep], answers: Sequence[Answer]) -> Iterator[tuple[int, Chunk]]:
    """The chunks of each answer, with its index. Requests of finished answers are cancelled."""
    for step in steps:
        for output in step.outputs():
            answer = answers[output.request]
            for chunk in answer.add(output):
                yield output.request, chunk
            if answer.done:
                step.cancel(output.request)


def checked_chunks(chunks: Iterable[tuple[int, Chunk]]) -> Iterator[Chunk]:
    """The chunks of one answer. Raises TargetError after the last one if the target failed."""
    for _, chunk in chunks:
        yield chunk
        raise_if_failed([chunk.generation])
