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
from specdiff.grammar import Grammar
from specdiff.prefix_cache import seats
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, DraftPlan, Round, SamplingParams
from specdiff.verify import Verifier

PASS_TOKENS = 2048  # of prompts read together, padding included


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, its sampling parameters, and its 64-bit seed.

    draft_len: the most tokens of this request's drafts, 0 for plain decoding (None: no limit of
        its own).
    with_drafts: report the drafted tokens of each round.
    grammar: of the answer, if it has one.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    draft_len: int | None = None
    with_drafts: bool = False
    grammar: Grammar | None = None


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
        chunk: int | None = None,
    ) -> None:
        self.limit = limit
        self.chunk = chunk
        self.reading: dict[int, tuple[Slot, int]] = {}  # row: its request, and the tokens read
        self.width = width
        self.device = target.info.device
        self.slots: list[Slot | None] = [*joining]
        batch = _batch(joining, width, self.device)
        self.state = decode.start(target, drafter, batch, verifier=verifier, slots=width)
        if self.state.drafter.taps:
            self.chunk = None  # the features of a prompt come at once
        self.by_rule = True  # the last draft length was the rule's

    @property
    def running(self) -> list[int]:
        return [row for row, slot in enumerate(self.slots) if slot is not None]

    @property
    def free(self) -> int:
        """How many more requests may join."""
        return self.limit - len(self.running) - len(self.reading)

    def start(self) -> None:
        """Admit the first requests."""
        if self.chunk is None:
            self._prefill([(row, 0) for row in range(len(self.slots))])
            return
        self.reading = {row: (slot, 0) for row, slot in enumerate(self.slots) if slot is not None}
        self.slots = [None] * len(self.slots)
        self._suspend()
        self.read()

    def ended(self, last: Round) -> list[int]:
        done = last.batch.done.tolist()
        return [row for row in self.running if done[row]]

    def draft_length(
        self, rule: int | decode.DraftLength, last: Round | None
    ) -> tuple[int | DraftPlan, Int[Tensor, "B"] | None]:
        """The next round's plan, and each row's limit where some row has a lower one.

        The plan is the rule's, or the highest limit where every request has its own.
        """
        own = {row: slot.request.draft_len for row, slot in enumerate(self.slots) if slot}
        limits = {row: limit for row, limit in own.items() if limit is not None}
        previous = last if self.by_rule else None  # a rule learns from rounds of its own
        self.by_rule = len(limits) < len(own)
        plan: int | DraftPlan
        if not self.by_rule:
            plan = max(limits.values())
        elif callable(rule):
            plan = rule(previous)
        else:
            plan = rule
        length = plan if isinstance(plan, int) else plan.longest
        if min(limits.values(), default=length) >= length:
            return plan, None
        most = [limits.get(row, length) for row in range(len(self.slots))]
        return plan, torch.tensor(most, device=self.device)

    def release(self, rows: Sequence[int]) -> None:
        if rows:
            decode.release(self.state, torch.tensor(rows, device=self.device))
        for row in rows:
            self.slots[row] = None

    def drop(self, requests: Sequence[int]) -> None:
        """Forget requests whose prompts are still being read."""
        for row, (slot, _) in list(self.reading.items()):
            if slot.index in requests:
                del self.reading[row]

    def join(self, joining: Sequence[Slot]) -> None:
        """Admit requests to idle rows, opening more if there are too few.

        With a `chunk`, each row's prompt is read by `read`, over as many calls as it needs.
        """
        if not joining:
            return
        size = len(self.slots)
        missing = len(self.running) + len(self.reading) + len(joining) - size
        if missing > 0:
            self._grow(size + max(missing, min(size, self.limit - size)))
        places = self._places([slot.request.prompt for slot in joining])
        joined = [
            (row, replace(slot, reused=reused))
            for slot, (row, reused) in zip(joining, places, strict=True)
        ]
        if self.chunk is None:
            self._admit([(row, slot, slot.reused) for row, slot in joined])
            return
        self.reading |= {row: (slot, slot.reused) for row, slot in joined}
        self._suspend()

    def read(self) -> None:
        """Read at most `chunk` more prompt tokens, by arrival; requests read to the end run."""
        if self.chunk is None or not self.reading:
            return
        budget = self.chunk
        complete = []
        for row, (slot, start) in sorted(self.reading.items(), key=lambda entry: entry[1][0].index):
            remaining = len(slot.request.prompt) - start
            if remaining > budget:
                if budget:
                    self._read_piece(row, slot, start, budget)
                break
            budget -= remaining
            complete.append((row, slot, start))
        for row, _, _ in complete:
            del self.reading[row]
        if complete:
            self._admit(complete)
        self._suspend()

    @torch.inference_mode()
    def _read_piece(self, row: int, slot: Slot, start: int, count: int) -> None:
        """Read prompt tokens start : start + count into the target's cache."""
        state = self.state
        prompt = slot.request.prompt[: start + count + 1]  # the target leaves out the last token
        piece = torch.tensor(prompt, device=self.device)
        rows, lengths = torch.tensor([[row], [start]], device=self.device)
        state.target.admit(state.cache, rows, [piece], lengths)
        self.reading[row] = slot, start + count

    def _admit(self, joined: Sequence[tuple[int, Slot, int]]) -> None:
        """Let requests run. Each: its row, the request, and the prompt tokens its cache holds."""
        places = [(row, length) for row, _, length in joined]
        rows = torch.tensor([row for row, _ in places], device=self.device)
        batch = _batch([slot for _, slot, _ in joined], self.width, self.device)
        self.state.batch = self.state.batch.with_rows(rows, batch)
        self._prefill(places)
        for row, slot, _ in joined:
            self.slots[row] = slot

    def _suspend(self) -> None:
        """Keep the rounds away from the rows that are being read.

        A row that is done is still scored, and the scores are written from its last token on: after
        the tokens read so far, where the next piece replaces them.
        """
        if not self.reading:
            return
        state = self.state
        lengths = [start + 1 for _, start in self.reading.values()]
        places = torch.tensor([[*self.reading], lengths], device=self.device)
        prompts = [replace(slot, reused=0) for slot, _ in self.reading.values()]
        batch = state.batch.with_rows(places[0], _batch(prompts, self.width, self.device))
        state.batch = replace(
            batch,
            length=batch.length.index_copy(0, *places),
            done=batch.done.index_fill(0, places[0], True),
        )
        state.context = replace(state.context, batch=state.batch)

    def _prefill(self, places: Sequence[tuple[int, int]]) -> None:
        """Read the texts of rows, given with how many of their first tokens the cache holds."""
        lengths = self.state.batch.length.tolist()
        new = [lengths[row] - reused for row, reused in places]
        for group in alike(new, PASS_TOKENS):
            part = torch.tensor([places[i] for i in group], device=self.device)
            decode.admit(self.state, part[:, 0], part[:, 1])

    def _places(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """For each prompt an idle row, and how many of its first tokens the row's cache holds."""
        idle = [
            row for row, slot in enumerate(self.slots) if slot is None and row not in self.reading
        ]
        drafter = self.state.drafter
        if drafter.taps and not drafter.keeps_features:
            return [(row, 0) for row in idle[: len(prompts)]]
        rows = torch.tensor(idle, device=self.device)
        ids = self.state.batch.ids[rows, : max(map(len, prompts))].tolist()
        lengths = self.state.batch.length[rows].tolist()
        # all but the last committed token: the anchor of a row's last round was never scored
        prefixes = [tokens[: length - 1] for tokens, length in zip(ids, lengths, strict=True)]
        places = [(idle[place], length) for place, length in seats(prefixes, prompts)]
        if not drafter.taps:
            return places
        # one feature at least is read: the drafter needs the one before the anchor. A drafter that
        # failed in a row has missed features of it
        off = self.state.state.off.tolist()
        rest = [len(prompt) - 2 for prompt in prompts]
        return [
            (row, 0 if off[row] else min(length, max(most, 0)))
            for (row, length), most in zip(places, rest, strict=True)
        ]

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
        state.read = torch.zeros_like(batch.length)
        if len(running):
            self._prefill([(row, 0) for row in self.running])
            state.drafter.resume(drafting, earlier, running)
        self.slots += [None] * (rows - len(self.slots))
        self.reading = {
            row: (replace(slot, reused=0), 0) for row, (slot, _) in self.reading.items()
        }


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
        grammars=[r.grammar for r in requests],
    )
