"""Rows: the rows of a running batch, which requests join and leave between decoding steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import decode
from specdiff.devices import mapped
from specdiff.drafters.base import Drafter
from specdiff.prefix_cache import seats
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, Round, SamplingParams
from specdiff.verify import Verifier

PASS_TOKENS = 2048  # of prompts read together, padding included


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, its sampling parameters, and its 64-bit seed."""

    prompt: Sequence[int]
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Slot:
    """The request in a row: its index in the stream, and how many prompt tokens the cache held."""

    index: int
    request: Request
    reused: int = 0


class Rows:
    """The rows of a running batch: the decoding state, and the request in each row (None: idle)."""

    def __init__(
        self,
        target: Target[Any],
        drafter: Drafter[Any],
        verifier: Verifier,
        joining: Sequence[Slot],
        limit: int,
        width: int,
    ) -> None:
        self.limit = limit
        self.width = width
        self.device = target.info.device
        self.slots: list[Slot | None] = [*joining]
        batch = _batch(joining, width, self.device)
        self.state = decode.start(target, drafter, batch, verifier=verifier, slots=width)

    @property
    def running(self) -> list[int]:
        return [row for row, slot in enumerate(self.slots) if slot is not None]

    def start(self) -> None:
        """Admit the first requests."""
        self._admit([(row, 0) for row in range(len(self.slots))])

    def ended(self, last: Round) -> list[int]:
        done = last.batch.done.tolist()
        return [row for row in self.running if done[row]]

    def release(self, rows: Sequence[int]) -> None:
        if rows:
            decode.release(self.state, torch.tensor(rows, device=self.device))
        for row in rows:
            self.slots[row] = None

    def join(self, joining: Sequence[Slot]) -> None:
        """Admit requests to idle rows, opening more if there are too few."""
        if not joining:
            return
        size = len(self.slots)
        missing = len(self.running) + len(joining) - size
        if missing > 0:
            self._grow(size + max(missing, min(size, self.limit - size)))
        places = self._places([slot.request.prompt for slot in joining])
        rows = torch.tensor([row for row, _ in places], device=self.device)
        batch = _batch(joining, self.width, self.device)
        self.state.batch = self.state.batch.with_rows(rows, batch)
        self._admit(places)
        for slot, (row, reused) in zip(joining, places, strict=True):
            self.slots[row] = replace(slot, reused=reused)

    def _admit(self, places: Sequence[tuple[int, int]]) -> None:
        """Read the texts of rows, given with how many of their first tokens the cache holds."""
        lengths = self.state.batch.length.tolist()
        new = [lengths[row] - reused for row, reused in places]
        for group in alike(new, PASS_TOKENS):
            part = torch.tensor([places[i] for i in group], device=self.device)
            decode.admit(self.state, part[:, 0], part[:, 1])

    def _places(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """For each prompt an idle row, and how many of its first tokens the row's cache holds."""
        idle = [row for row, slot in enumerate(self.slots) if slot is None]
        if self.state.drafter.taps:
            return [(row, 0) for row in idle[: len(prompts)]]
        rows = torch.tensor(idle, device=self.device)
        ids = self.state.batch.ids[rows, : max(map(len, prompts))].tolist()
        lengths = self.state.batch.length[rows].tolist()
        # all but the last committed token: the anchor of a row's last round was never scored
        prefixes = [tokens[: length - 1] for tokens, length in zip(ids, lengths, strict=True)]
        return [(idle[place], length) for place, length in seats(prefixes, prompts)]

    def _grow(self, rows: int) -> None:
        """Open `rows` rows in place of fewer: running texts are read again, other rows are idle."""
        state = self.state
        old = state.batch
        running = torch.tensor(self.running, dtype=torch.long, device=self.device)
        source = torch.arange(rows, device=self.device).clamp(max=len(old.length) - 1)
        idle = torch.ones(rows, dtype=torch.bool, device=self.device).index_fill(0, running, False)
        batch: Batch = mapped(old, lambda part: part[source])
        batch = replace(batch, done=idle, length=batch.length.masked_fill(idle, 1))
        cache = state.target.open(rows, self.width, state.drafter.taps)
        drafting = state.drafter.open(rows, self.width)
        if len(running):
            decode.release(state, running)
        earlier = state.state
        previous = _tiled(state.context.previous, source)
        state.cache = cache
        state.state = drafting
        state.batch = batch
        state.context = Context(batch, None, torch.zeros_like(batch.length), previous)
        if len(running):
            self._admit([(row, 0) for row in self.running])
            state.drafter.resume(drafting, earlier, running)
        self.slots += [None] * (rows - len(self.slots))


def alike(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Groups of indices, shortest first, each of at most `tokens` tokens once it is padded.

    One long prompt among many would have all of them padded to its length. All of them are one
    group if they fit; a longer one is a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[index] > tokens:
            yield sorted(group)
            group = []
        group.append(index)
    if group:
        yield sorted(group)


def _tiled(last: Round | None, source: Int[Tensor, "R"]) -> Round | None:
    """The last round with rows repeated; a draft's columns are no row's own."""
    if last is None:
        return None
    columns = last.draft.columns
    tiled: Round = mapped(last, lambda part: part if part is columns else part[source])
    return tiled


def _batch(joining: Sequence[Slot], width: int, device: torch.device) -> Batch:
    requests = [slot.request for slot in joining]
    return Batch.of(
        [r.prompt for r in requests],
        [r.params for r in requests],
        [r.seed for r in requests],
        slots=width,
        device=device,
    )
