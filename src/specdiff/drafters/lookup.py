"""Text indexes: where the newest tokens of a text occurred before, and what followed them.

An index grows with its text: each token costs one entry for each length of run, each question one
lookup for each length, however long the text is. All of it is on the host.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Run = tuple[int, ...]  # consecutive tokens


class Match(NamedTuple):
    """The `size` newest tokens also end before `after` in `text`.

    `period`: how far `after` is from the end of the text itself; 0 in another text.
    """

    size: int
    text: Sequence[int]
    after: int
    period: int

    def following(self, count: int) -> list[int]:
        """The tokens after the match, at most `count`.

        Where that reaches the end of the text itself it repeats periodically, as a loop would.
        """
        if self.period:
            return [self.text[self.after + k % self.period] for k in range(count)]
        return list(self.text[self.after : self.after + count])


def runs(text: Sequence[int], end: int, sizes: range) -> Iterator[Run]:
    """The runs of tokens before position `end`, of each of the sizes."""
    for size in sizes:
        if size <= end:
            yield tuple(text[end - size : end])


@dataclass(slots=True)
class TextIndex:
    """A growing text, and where each run of its tokens last ended.

    sizes: of the runs that are looked up, ascending.
    """

    sizes: range
    tokens: list[int] = field(default_factory=list)
    places: dict[Run, int] = field(default_factory=dict)

    def restart(self, tokens: list[int]) -> None:
        """Hold `tokens` instead; only the rest is read if they continue the text."""
        size = len(self.tokens)
        if not size or tokens[:size] != self.tokens:
            self.tokens = []
            self.places = {}
            size = 0
        self.extend(tokens[size:])

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. The newest run stays out of the index: it would match itself."""
        end = max(len(self.tokens), 1)
        self.tokens += tokens
        for place in range(end, len(self.tokens)):
            for run in runs(self.tokens, place, self.sizes):
                self.places[run] = place

    def match(self, memory: "Memory | None" = None) -> Match | None:
        """The longest run that ends the text and occurred before; of these the most recent.

        Of equally long ones, those in the text itself come before those in memory.
        """
        size = len(self.tokens)
        for run in reversed(list(runs(self.tokens, size, self.sizes))):
            after = self.places.get(run)
            if after is not None:
                return Match(len(run), self.tokens, after, size - after)
            other = None if memory is None else memory.find(run)
            if other is not None:
                return other
        return None


class Memory:
    """The last texts of a process, at most `limit` tokens. Threads may share it."""

    def __init__(self, limit: int, sizes: range) -> None:
        self.limit = limit
        self.sizes = sizes
        self.size = 0
        self.texts: deque[Run] = deque()
        self.places: dict[Run, tuple[Run, int]] = {}
        self.lock = threading.Lock()

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a text, or its last `limit` tokens, in place of those that it continues.

        The oldest texts are forgotten.
        """
        text = tuple(tokens[-self.limit :])
        with self.lock:
            for earlier in [old for old in self.texts if text[: len(old)] == old]:
                self.texts.remove(earlier)
                self._forget(earlier)
            self.texts.append(text)
            self.size += len(text)
            while self.size > self.limit:
                self._forget(self.texts.popleft())
            # a run at the very end has nothing after it
            for place in range(1, len(text)):
                for run in runs(text, place, self.sizes):
                    self.places[run] = text, place

    def find(self, run: Run) -> Match | None:
        """Where the run last occurred."""
        with self.lock:
            place = self.places.get(run)
        return None if place is None else Match(len(run), *place, 0)

    def _forget(self, text: Run) -> None:
        self.size -= len(text)
        for place in range(1, len(text)):
            for run in runs(text, place, self.sizes):
                if run in self.places and self.places[run][0] is text:
                    del self.places[run]
