"""A conversation: its turns share one row of the engine, so that each turn's prompt is read from where the last one ended."""

import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from specdiff import engine
from specdiff.arguments import brief
from specdiff.controller import Controller
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.noise import row_seed
from specdiff.prefix_cache import shared
from specdiff.stats import Stats
from specdiff.text.generation import Chunk, Generation, demand_whole
from specdiff.text.lm import SpeculativeLM
from specdiff.text.options import Options
from specdiff.unicode import valid
from specdiff.verify import Verifier


@dataclass(slots=True)
class Reading:
    """Prompt tokens of all turns: `read` by the target, or `reused` from its cache.

    `parted` counts the turns whose prompt left the tokens of the turns before too early, so that some were read twice: an answer
    whose text the tokenizer splits in another way, or that ended in a stop string, or a template that rewrites earlier turns.
    """

    read: int = 0
    reused: int = 0
    parted: int = 0


class Conversation:
    """`for piece in Conversation(lm, system="Be brief.", max_tokens=200).say("Hello"): ...`

    Each answer is the one `lm.chat(messages, ...)` would give. `messages` grows by two with every answer and may be edited in
    between; `stats` and `reading` are of all answers so far, cleared ones included. `options` are generate's (but raw, system, rows);
    None stands for an option's default.

    Raises UsageError for a bad option.
    """

    def __init__(self, lm: SpeculativeLM, system: str | None = None, **options: Any) -> None:
        Options.of(options, lm.defaults)
        self.lm, self.system, self.options = lm, system, options
        self.stats, self.reading = Stats(), Reading()
        self._answering = self._stopped = (
            False  # plain flags: a signal handler may wait for no lock
        )
        self._row: _Row | None = None
        self.clear()

    def say(self, text: str, **options: Any) -> Iterator[Chunk]:
        """Answer `text`, piece by piece; `options` hold for this answer. When it ends, is stopped or is no longer read, text and
        answer are in `messages`; if it fails before its first round, neither is.

        Raises UsageError for a bad option, for a conversation that no longer fits max_len, and while another answer is running;
        TargetError if the target fails under the answer, which is kept up to there.
        """
        self._demand_idle()
        if not isinstance(text, str):
            raise UsageError(f"a message must be a string, not {brief(text)}")
        self._answering, self._stopped = True, False
        try:
            yield from self._answer(
                valid(text), Options.of({**self.options, **options}, self.lm.defaults)
            )
        finally:
            self._answering = False

    def stop(self) -> None:
        """End the running answer after its running round, and keep what is written. Safe in signal handlers and other threads."""
        self._stopped = True

    def clear(self) -> None:
        """Forget every message but the system prompt. Raises UsageError while an answer is running."""
        self._demand_idle()
        self.messages: list[dict[str, str]] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )
        self._told: list[int] = []  # the tokens of the last prompt and its answer

    @property
    def size(self) -> int:
        """How many tokens the last prompt and its answer were, of `lm.max_len`."""
        return len(self._told)

    def _answer(self, text: str, asked: Options) -> Iterator[Chunk]:
        said = {"role": "user", "content": text}
        root = secrets.randbits(63) if asked.seed is None else asked.seed
        request = self.lm.request(self._prompt(said, asked), asked, row_seed(root, 0))
        engine.check([request], self.lm.target)
        answer, row, turn = self.lm.answer(asked), self._row_for(asked), None
        told = answer.generation
        try:
            with closing(row.run(request)) as turns:
                for turn in turns:
                    for piece in (
                        piece for progress in turn.progress() for piece in answer.add(progress)
                    ):
                        told.text += piece.text
                        yield piece
                    if self._stopped and not answer.done:
                        rest = answer.interrupt()
                        told.text += rest.text
                        yield rest
                    if answer.done:
                        break
        finally:
            if turn is not None:
                told.finish_reason = told.finish_reason or "interrupted"
                self._keep(said, request.prompt, turn.reused[0], told)
        demand_whole([told])

    def _prompt(self, said: dict[str, str], asked: Options) -> list[int]:
        most = self.lm.max_len
        ids = self.lm.render(
            [*self.messages, said],
            tools=asked.tools,
            documents=asked.documents,
            chat_template_kwargs=asked.chat_template_kwargs,
        )
        if len(ids) >= most:
            raise UsageError(
                f"the conversation has {len(ids)} tokens with this message, which leaves none to answer within max_len {most}: clear it, "
                f"say less, or raise max_len (the model's own limit is {self.lm.target.info.max_positions})"
            )
        return ids

    def _row_for(self, asked: Options) -> "_Row":
        """The row that is open; a new one, with nothing held, for another way of drafting, or where the last one broke."""
        drafter, length = self.lm.drafting(asked)
        wanted = drafter, asked.verifier, length if isinstance(length, int) else None
        if self._row is None or self._row.broken or self._row.made_for != wanted:
            self._row = _Row(self.lm, drafter, asked.judge(), length, wanted)
        return self._row

    def _keep(
        self, said: dict[str, str], prompt: Sequence[int], reused: int, told: Generation
    ) -> None:
        self.messages += [said, {"role": "assistant", "content": told.text}]
        self.reading.read += len(prompt) - reused
        self.reading.reused += reused
        self.reading.parted += shared(self._told, prompt) < len(self._told) - 1
        self._told = [*prompt, *told.token_ids]
        self.stats.merge(told.stats)

    def _demand_idle(self) -> None:
        if self._answering:
            raise UsageError(
                "an answer is still being written; read it to its end, or stop() it, before this"
            )


class _Row:
    """One row of the engine that stays open: what it holds goes from request to request."""

    def __init__(
        self,
        lm: SpeculativeLM,
        drafter: Drafter[Any],
        verifier: Verifier,
        length: int | Controller,
        made_for: tuple[Any, ...],
    ) -> None:
        self.made_for, self.broken = made_for, False
        self._next: engine.Request | None = None
        self._turns = engine.serve(
            lm.target, drafter, self._stream(), verifier=verifier, draft_len=length, rows=1, slots=lm.max_len
        )  # fmt: skip

    def _stream(self) -> Iterator[engine.Request]:
        while self._next is not None:
            request, self._next = self._next, None
            yield request

    def run(self, request: engine.Request) -> Generator[engine.EngineStep]:
        """Its turns; closing this generator ends it early."""
        self._next, turn = request, None
        try:
            while turn is None or not turn.ended:
                self.broken = True  # unless the engine comes back
                turn = next(self._turns)
                self.broken = False
                yield turn
        finally:
            if turn is not None and (place := turn.owner[0]) is not None:
                turn.cancel(place)
