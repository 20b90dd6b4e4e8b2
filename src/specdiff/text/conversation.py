"""Conversations: turns that share one row of the engine, so that each reads only its new tokens."""

import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Unpack

from specdiff import engine
from specdiff.arguments import brief
from specdiff.controller import Controller
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.noise import row_seed
from specdiff.prefix_cache import shared
from specdiff.stats import Stats
from specdiff.text.generation import Answer, Chunk, Generation, raise_if_failed
from specdiff.text.lm import SpeculativeLM
from specdiff.text.options import ChatOptions, Options
from specdiff.unicode import valid
from specdiff.verify import Verifier


@dataclass(slots=True)
class Reading:
    """Prompt tokens of all turns: `read` by the target, or `reused` from its cache.

    `parted` counts the turns whose prompt diverged from the tokens of earlier turns, so that some
    were read again: the tokenizer splits an answer's text differently, an answer ended at a stop
    string, or the template rewrites earlier turns.
    """

    read: int = 0
    reused: int = 0
    parted: int = 0


class Conversation:
    """`for chunk in Conversation(lm, system="Be brief.", max_tokens=200).say("Hello"): ...`

    Each answer equals that of `lm.chat(messages, ...)`. `messages` grows by two with every answer
    and may be edited in between; `stats` and `reading` cover all answers, cleared ones included.

    Raises UsageError for a bad option.
    """

    def __init__(
        self, lm: SpeculativeLM, system: str | None = None, **options: Unpack[ChatOptions]
    ) -> None:
        Options.of(options, lm.defaults)
        self.lm = lm
        self.system = system
        self.options = options
        self.stats = Stats()
        self.reading = Reading()
        # plain flags, because a signal handler must not wait for a lock
        self._answering = False
        self._stopped = False
        self._row: _Row | None = None
        self.clear()

    def say(self, text: str, **options: Unpack[ChatOptions]) -> Iterator[Chunk]:
        """Answer `text` chunk by chunk; `options` apply to this answer only.

        When the answer ends or is stopped, or the iterator is closed, text and answer are in
        `messages`; if it fails before its first round, neither is.

        Raises UsageError for a bad option, for a conversation that no longer fits max_len, and
        while another answer is running; TargetError if the target fails during the answer, which is
        kept up to there.
        """
        self._check_idle()
        if not isinstance(text, str):
            raise UsageError(f"a message must be a string, not {brief(text)}", param="text")
        self._answering = True
        self._stopped = False
        try:
            merged = Options.of({**self.options, **options}, self.lm.defaults)
            yield from self._answer(valid(text), merged)
        finally:
            self._answering = False

    def stop(self) -> None:
        """End the running answer after its current round, and keep its text.

        Safe in signal handlers and other threads.
        """
        self._stopped = True

    def clear(self) -> None:
        """Forget every message but the system prompt. Raises UsageError during an answer."""
        self._check_idle()
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._tokens: list[int] = []  # of the last prompt and its answer

    @property
    def size(self) -> int:
        """Number of tokens of the last prompt and its answer; the limit is `lm.max_len`."""
        return len(self._tokens)

    def _answer(self, text: str, options: Options) -> Iterator[Chunk]:
        message = {"role": "user", "content": text}
        root = secrets.randbits(63) if options.seed is None else options.seed
        request = self.lm.request(self._prompt(message, options), options, row_seed(root, 0))
        engine.check([request], self.lm.target)  # an error in the engine would lose the row
        answer = self.lm.answer(options)
        row = self._row_for(options)
        slot: engine.Slot | None = None
        try:
            with closing(row.run(request)) as steps:
                for step in steps:
                    slot = step.slots[0]
                    yield from self._chunks(step, answer)
                    if answer.done:
                        break
        finally:
            if slot is not None:
                answer.generation.finish_reason = answer.generation.finish_reason or "interrupted"
                self._keep(message, request.prompt, slot.reused, answer.generation)
        raise_if_failed([answer.generation])

    def _chunks(self, step: engine.EngineStep, answer: Answer) -> Iterator[Chunk]:
        for output in step.outputs():
            yield from answer.add(output)
        if self._stopped and not answer.done:
            yield answer.interrupt()

    def _prompt(self, message: dict[str, str], options: Options) -> list[int]:
        max_len = self.lm.max_len
        ids = self.lm.render([*self.messages, message], **options.template)
        if len(ids) >= max_len:
            raise UsageError(
                f"the conversation has {len(ids)} tokens with this message, which leaves none to "
                f"answer within max_len {max_len}: clear it, say less, or raise max_len "
                f"(the model's own limit is {self.lm.target.info.max_positions})",
                param="text",
            )
        return ids

    def _row_for(self, options: Options) -> "_Row":
        """The open row; a new, empty one if the way of drafting changed or the last one failed."""
        drafter, length = self.lm.drafting(options)
        config = (drafter, options.verifier, length if isinstance(length, int) else None)
        if self._row is None or self._row.broken or self._row.config != config:
            self._row = _Row(self.lm, drafter, options.build_verifier(), length, config)
        return self._row

    def _keep(
        self, message: dict[str, str], prompt: Sequence[int], reused: int, generation: Generation
    ) -> None:
        self.messages += [message, {"role": "assistant", "content": generation.text}]
        self.reading.read += len(prompt) - reused
        self.reading.reused += reused
        self.reading.parted += shared(self._tokens, prompt) < len(self._tokens) - 1
        self._tokens = [*prompt, *generation.token_ids]
        self.stats.merge(generation.stats)

    def _check_idle(self) -> None:
        if self._answering:
            raise UsageError(
                "an answer is still running; exhaust its iterator or call stop() first"
            )


class _Row:
    """One row of the engine that stays open, so that its cache serves one request after another."""

    def __init__(
        self,
        lm: SpeculativeLM,
        drafter: Drafter[Any],
        verifier: Verifier,
        length: int | Controller,
        config: tuple[Any, ...],
    ) -> None:
        self.config = config
        self.broken = False
        self._next: engine.Request | None = None
        self._steps = engine.serve(
            lm.target,
            drafter,
            self._stream(),
            verifier=verifier,
            draft_len=length,
            rows=1,
            slots=lm.max_len,
        )

    def _stream(self) -> Iterator[engine.Request]:
        while self._next is not None:
            request = self._next
            self._next = None
            yield request

    def run(self, request: engine.Request) -> Generator[engine.EngineStep]:
        """The steps of a request; closing this generator ends it early."""
        self._next = request
        step: engine.EngineStep | None = None
        try:
            while step is None or not step.ended:
                self.broken = True  # unless the engine returns
                step = next(self._steps)
                self.broken = False
                yield step
        finally:
            if step is not None and (slot := step.slots[0]) is not None:
                step.cancel(slot.index)
