"""Rows: the rows of a running batch, which requests join and leave between decoding steps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import decode
from specdiff.capacity import Capacity
from specdiff.devices import mapped
from specdiff.drafters.base import Drafter
from specdiff.prefix_cache import seats
from specdiff.reading import Reading, held
from specdiff.reading import alike as alike
from specdiff.request import Request as Request
from specdiff.request import Slot as Slot
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, DraftPlan, Round
from specdiff.verify import Verifier

PASS_TOKENS = 2048  # of prompts read together, padding included


class Rows:
    """The rows of a running batch: the decoding state, and the request in each row (None: idle)."""

    def __init__(
        self,
        target: Target[Any],
        drafter: Drafter[Any],
        verifier: Verifier,
        joining: Sequence[Slot],
        capacity: Capacity,
        longest: int,
        chunk: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.longest = longest  # draft
        self.chunk = chunk
        self.reading: dict[int, Reading] = {}  # by row
        self.width = capacity.width
        self.reach = max(self._need(slot) for slot in joining)  # the widest since rows were opened
        self.device = target.info.device
        self.slots: list[Slot | None] = [*joining]
        batch = _batch(joining, self.width, self.device)
        self.state = decode.start(target, drafter, batch, verifier=verifier, slots=self.width)
        self.by_rule = True  # the last draft length was the rule's

    @property
    def running(self) -> list[int]:
        return [row for row, slot in enumerate(self.slots) if slot is not None]

    @property
    def free(self) -> int:
        """How many more requests may join."""
        return self.capacity.rows - len(self.running) - len(self.reading)

    @staticmethod
    def fit(slots: Sequence[Slot], capacity: Capacity, longest: int) -> bool:
        """Whether a cache has room for these requests alone."""
        return capacity.holds(len(slots), max(need(slot, capacity, longest) for slot in slots))

    def fits(self, joining: Sequence[Slot]) -> bool:
        """Whether there is room for more requests, next to those that run or are being read."""
        return self.fit([*self._occupants(), *joining], self.capacity, self.longest)

    def _occupants(self) -> list[Slot]:
        """The requests that run, and those that are being read."""
        reading = [reading.slot for reading in self.reading.values()]
        return [slot for slot in self.slots if slot] + reading

    def start(self) -> None:
        """Admit the first requests."""
        if self.chunk is None:
            self._prefill([(row, 0) for row in range(len(self.slots))])
            return
        self.reading = {row: Reading(slot, 0) for row, slot in enumerate(self.slots) if slot}
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
        if not rows:
            return
        decode.release(self.state, torch.tensor(rows, device=self.device))
        for row in rows:
            self.slots[row] = None
        self._count_running()

    def drop(self, requests: Sequence[int]) -> None:
        """Forget requests whose prompts are still being read."""
        rows = [row for row, one in self.reading.items() if one.slot.index in requests]
        for row in rows:
            del self.reading[row]
        if rows and self.state.drafter.taps:  # it has missed features: the rows share no prefix
            places = torch.tensor(rows, device=self.device)
            batch = self.state.batch
            self.state.batch = replace(batch, length=batch.length.index_fill(0, places, 1))

    def join(self, joining: Sequence[Slot]) -> None:
        """Admit requests to idle rows, opening more if there are too few.

        With a `chunk`, each row's prompt is read by `read`, over as many calls as it needs.
        """
        if not joining:
            return
        size = len(self.slots)
        missing = max(0, len(self.running) + len(self.reading) + len(joining) - size)
        reach = max(self.reach, *[self._need(slot) for slot in joining])
        if not self.capacity.holds(size + missing, reach):
            self._open_anew(joining)
        elif missing:
            self._open(self.capacity.grown(size, missing, reach), range(size))
        self.reach = max(self.reach, *[self._need(slot) for slot in joining])
        places = self._places([slot.request.prompt for slot in joining])
        joined = {
            row: Reading(replace(slot, reused=reused), reused)
            for slot, (row, reused) in zip(joining, places, strict=True)
        }
        if self.chunk is None:
            self._admit(joined)
            return
        if self.state.drafter.taps:
            self._hold_features(joined)
        self.reading |= joined
        self._suspend()

    def read(self) -> None:
        """Read at most `chunk` more prompt tokens, by arrival; requests read to the end run."""
        if self.chunk is None or not self.reading:
            return
        budget = self.chunk
        complete = {}
        by_arrival = sorted(self.reading.items(), key=lambda entry: entry[1].slot.index)
        for row, reading in by_arrival:
            remaining = len(reading.slot.request.prompt) - reading.start
            if remaining > budget:
                if budget:
                    self._read_piece(row, reading, budget)
                break
            budget -= remaining
            complete[row] = self.reading.pop(row)
        if complete:
            self._admit(complete)
        self._suspend()

    @torch.inference_mode()
    def _read_piece(self, row: int, reading: Reading, count: int) -> None:
        """Read the next `count` prompt tokens into the target's cache."""
        state = self.state
        end = reading.start + count
        prompt = reading.slot.request.prompt[: end + 1]  # the target leaves out the last token
        piece = torch.tensor(prompt, device=self.device)
        rows, lengths = torch.tensor([[row], [reading.start]], device=self.device)
        new = state.target.admit(state.cache, rows, [piece], lengths)
        if new is not None:
            reading.features.append(new[0])
        reading.start = end

    def _hold_features(self, joined: Mapping[int, Reading]) -> None:
        """Hold what earlier requests left of the features of shared prefixes: rounds drop them."""
        features = self.state.context.features
        read = self.state.read.tolist()
        for row, reading in joined.items():
            waiting = reading.start - read[row]
            if features is not None and reading.start and waiting > 0:
                reading.features.append(features[row, :waiting])

    def _admit(self, joined: Mapping[int, Reading]) -> None:
        """Let requests run, by row; the rest of their prompts is read here."""
        rows = torch.tensor([*joined], device=self.device)
        slots = [reading.slot for reading in joined.values()]
        batch = _batch(slots, self.width, self.device)
        self.state.batch = self.state.batch.with_rows(rows, batch)
        self._prefill([(row, reading.start) for row, reading in joined.items()], joined)
        for row, reading in joined.items():
            self.slots[row] = reading.slot
        self._count_running()

    def _count_running(self) -> None:
        """Let the options of requests that have ended cost nothing."""
        params = [slot.request.params for slot in self.slots if slot is not None]
        batch = self.state.batch
        self.state.batch = replace(batch, params=batch.params.used_by(params))

    def _suspend(self) -> None:
        """Keep the rounds away from the rows that are being read.

        A row that is done is still scored, and the scores are written from its last token on: after
        the tokens read so far, where the next piece replaces them. Its drafter is given nothing.
        """
        if not self.reading:
            return
        state = self.state
        starts = [reading.start for reading in self.reading.values()]
        rows, read = torch.tensor([[*self.reading], starts], device=self.device)
        prompts = [replace(reading.slot, reused=0) for reading in self.reading.values()]
        batch = state.batch.with_rows(rows, _batch(prompts, self.width, self.device))
        state.batch = replace(
            batch,
            length=batch.length.index_copy(0, rows, read + 1),
            done=batch.done.index_fill(0, rows, True),
        )
        self._count_running()
        sizes = state.context.feature_size.index_fill(0, rows, 0)
        state.context = replace(state.context, batch=state.batch, feature_size=sizes)

    def _prefill(
        self, places: Sequence[tuple[int, int]], joined: Mapping[int, Reading] | None = None
    ) -> None:
        """Read the texts of rows, given with how many of their first tokens the cache holds."""
        lengths = self.state.batch.length.tolist()
        new = [lengths[row] - reused for row, reused in places]
        for group in alike(new, PASS_TOKENS):
            part = torch.tensor([places[i] for i in group], device=self.device)
            features = held([joined[places[i][0]] for i in group]) if joined else None
            decode.admit(self.state, part[:, 0], part[:, 1], features)

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

    def _need(self, slot: Slot) -> int:
        return need(slot, self.capacity, self.longest)

    def _open_anew(self, joining: Sequence[Slot]) -> None:
        """Open as few rows as hold the requests that run, are read or join: memory is short."""
        order = [*self.running, *self.reading]
        self._open(len(order) + len(joining), order)
        self.reach = max([self._need(slot) for slot in self._occupants()], default=0)

    def _open(self, rows: int, order: Sequence[int]) -> None:
        """Open `rows` rows, the first of which take the requests of the old rows in `order`.

        Running texts are read again, other rows are idle.
        """
        state = self.state
        cache = state.target.open(rows, self.width, state.drafter.taps)
        drafting = state.drafter.open(rows, self.width)
        old = state.batch
        if self.running:
            decode.release(state, torch.tensor(self.running, device=self.device))
        places = {row: place for place, row in enumerate(order)}
        self.slots = [self.slots[row] for row in order] + [None] * (rows - len(order))
        running = torch.tensor(self.running, dtype=torch.long, device=self.device)
        source = torch.tensor([*order, *[0] * (rows - len(order))], device=self.device)
        idle = torch.ones(rows, dtype=torch.bool, device=self.device).index_fill(0, running, False)
        batch: Batch = mapped(old, lambda part: part[source])
        batch = replace(
            batch,
            done=idle,
            length=batch.length.masked_fill(idle, 1),
            grammars={places[row]: one for row, one in old.grammars.items() if row in places},
        )
        earlier = state.state
        previous = _tiled(state.context.previous, source)
        state.cache = cache
        state.state = drafting
        state.batch = batch
        state.context = Context(batch, None, torch.zeros_like(batch.length), previous)
        state.read = torch.zeros_like(batch.length)
        if len(running):
            self._prefill([(row, 0) for row in self.running])
            state.drafter.resume(drafting, earlier, running, source[running])
        self.reading = {places[row]: one.again() for row, one in self.reading.items()}


def need(slot: Slot, capacity: Capacity, longest: int) -> int:
    """The positions that a request may take: prompt, answer, and a draft of `longest` tokens."""
    request = slot.request
    return capacity.need(len(request.prompt) + request.params.max_tokens + longest + 1)


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
