"""Continuous batching: requests join and leave a running batch between decoding steps.

Memory is bounded by the number of rows, not of requests. `serve` yields one EngineStep per round,
at a cost independent of the number of rows; `run` yields the tokens of each request as they come.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import decode
from specdiff.arrivals import Arrivals
from specdiff.arrivals import check as check
from specdiff.capacity import Capacity
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.request import Request as Request
from specdiff.request import Slot as Slot
from specdiff.rows import Rows
from specdiff.targets.base import Target
from specdiff.types import DraftPlan, Logprobs, Round
from specdiff.verify import Verifier

DraftLength = int | Callable[[Round | None], int | DraftPlan]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The output of one round for one request; its first `accepted` tokens came from the draft.

    finished: "stop" (a stop id), "length" (max_tokens), "error", or None while the request runs.
    disabled: the drafter failed; drafting is off for the rest of this request.
    logprobs: of each token, if requested (else empty); top_logprobs: the (token id, logprob) pairs
        of the most likely tokens at its position.
    error: why the request ended early, naming it; its answer is incomplete.
    draft: the drafted tokens, if requested.
    cached_tokens: prompt tokens that the row held already, so that they were not read again.
    """

    request: int
    tokens: list[int]
    accepted: int
    drafted: int
    finished: str | None
    disabled: bool
    seconds: dict[str, float]
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    error: str | None = None
    draft: list[int] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One round. `slots[row]` is what ran in the row (None: idle), `ended` the rows that ended."""

    round: Round
    slots: Sequence[Slot | None]
    ended: list[int]
    dropped: list[int] = field(default_factory=list)

    def cancel(self, request: int) -> None:
        """End a request that runs or is being read, so that its row is free in the next round."""
        rows = (i for i, slot in enumerate(self.slots) if slot and slot.index == request)
        row = next(rows, None)
        if row is None:
            self.dropped.append(request)
        elif row not in self.ended:
            self.ended.append(row)

    def outputs(self) -> list[RequestOutput]:
        """One RequestOutput per running row; the round's tensors cross to the host once."""
        last = self.round
        ended = frozenset(self.ended)
        emitted = last.emitted.tolist()
        accepted = last.verification.accepted.tolist()
        tokens = last.verification.tokens.tolist()
        sizes = last.draft.sizes.tolist()
        disabled = last.disabled.tolist()
        logprobs = _LogprobLists(last.verification.logprobs)
        reporting = any(slot is not None and slot.request.with_drafts for slot in self.slots)
        drafts = last.draft.tokens.tolist() if reporting else None
        errors = self.errors()
        outputs = []
        for row, slot in enumerate(self.slots):
            if slot is None:
                continue
            new = tokens[row][: emitted[row]]
            error = errors.get(slot.index)
            finished = None
            if error is not None:
                finished = "error"
            elif row in ended:
                stopped = bool(new) and new[-1] in slot.request.params.stop_token_ids
                finished = "stop" if stopped else "length"
            draft = drafts[row] if drafts is not None and slot.request.with_drafts else []
            output = RequestOutput(
                slot.index,
                new,
                min(accepted[row], len(new)),
                sizes[row],
                finished,
                disabled[row],
                dict(last.seconds),
                *logprobs.of(row, len(new), slot.request),
                error=error,
                draft=draft[: sizes[row]],
                cached_tokens=slot.reused,
            )
            outputs.append(output)
        return outputs

    def errors(self) -> dict[int, str]:
        """The errors of this round by request: its target logits were NaN or infinite."""
        if not self.ended:
            return {}  # a row that fails has ended, so nothing needs to be read
        positions = zip(self.slots, self.round.failed.tolist(), strict=True)
        return {
            slot.index: f"request {slot.index}: {decode.reason(at, self.round.errors.get(row))}"
            for row, (slot, at) in enumerate(positions)
            if slot is not None and at >= 0
        }

    def finished(self) -> list[tuple[int, Int[Tensor, "L"], int]]:
        """(request, its tokens on the host, prompt length) of each request that ended.

        The tokens begin with the prompt. Requests in `errors()` are omitted: they are incomplete.
        """
        if not self.ended:
            return []
        batch = self.round.batch
        errors = self.errors()
        rows = torch.tensor(self.ended, device=batch.length.device)
        ids = batch.ids[rows].cpu()
        lengths = batch.length[rows].tolist()
        prompt_lengths = batch.prompt_length[rows].tolist()
        finished = []
        for i, row in enumerate(self.ended):
            slot = self.slots[row]
            if slot is not None and slot.index not in errors:
                finished.append((slot.index, ids[i, : lengths[i]].clone(), prompt_lengths[i]))
        return finished


def run(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Sequence[Request],
    *,
    verifier: Verifier,
    draft_len: DraftLength,
    rows: int = 8,
) -> Iterator[RequestOutput]:
    """Serve every request, at most `rows` at a time, in order of arrival.

    Each row has positions for the longest request; when one ends, its row takes the next request.

    Raises UsageError as `check` does.
    """
    steps = serve(target, drafter, requests, verifier=verifier, draft_len=draft_len, rows=rows)
    for step in steps:
        yield from step.outputs()


def serve(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Iterable[Request | None],
    *,
    verifier: Verifier,
    draft_len: DraftLength,
    rows: int = 8,
    slots: int | None = None,
    chunk: int | None = None,
    positions: int | None = None,
) -> Iterator[EngineStep]:
    """Run a stream of requests, at most `rows` at a time, until it ends; one EngineStep per round.

    A joining request takes the free row that holds the longest prefix of its prompt, and the target
    reads only the remaining tokens (all of them if the drafter has taps and does not keep their
    features).
    Rows are opened on demand: when more requests run than there are rows, the number of rows
    doubles, and the running texts are read again.

    Args:
        requests: pulled when a row is free, so a stream may be endless and may depend on earlier
            steps. None means nothing for now: the stream is asked again after the next round,
            unless no row is running.
        slots: positions per row, for prompt and max_tokens; required unless `requests` is a
            sequence.
        chunk: the most prompt tokens read between two rounds, so that a long prompt does not hold
            up the requests that run (None: all).
        positions: of all rows of the target's cache together (None: no limit). A request waits
            until there is room for it, in order of arrival.

    Raises UsageError as `check` does, and for a request that does not fit into its row: at once for
    a sequence, on joining for a stream.
    """
    if slots is None:
        if not isinstance(requests, Sequence):
            raise UsageError(
                "a stream of requests needs slots: the most tokens of prompt and answer together",
                param="slots",
            )
        sizes = [len(r.prompt) + r.params.max_tokens for r in requests if r is not None]
        slots = max(sizes, default=0)
    longest = drafter.draft_len if callable(draft_len) else draft_len
    queue = Arrivals(requests, slots, target, longest)
    capacity = Capacity(rows, slots + longest + 1, positions)
    capacity.check()
    return _serve(target, drafter, queue, verifier, draft_len, capacity, chunk)


def _serve(
    target: Target[Any],
    drafter: Drafter[Any],
    queue: Arrivals,
    verifier: Verifier,
    draft_len: DraftLength,
    capacity: Capacity,
    chunk: int | None,
) -> Iterator[EngineStep]:
    joining = queue.take(capacity.rows, lambda slots: Rows.fit(slots, capacity, queue.longest))
    if not joining:
        return
    table = Rows(target, drafter, verifier, joining, capacity, queue.longest, chunk)
    last: Round | None = None
    try:
        table.start()
        while table.running or table.reading:
            if table.running:
                plan, limits = table.draft_length(draft_len, last)
                last = decode.step(table.state, plan, limits=limits)
                step = EngineStep(last, tuple(table.slots), table.ended(last))
                yield step
                table.release(step.ended)
                table.drop(step.dropped)
                queue.drop(step.dropped)
            table.join(queue.take(table.free, table.fits))
            table.read()
    finally:  # also if the caller stops early, or the target or the drafter raises
        table.release(table.running)


class _LogprobLists:
    """A round's log probabilities on the host, if any row requested them."""

    def __init__(self, logprobs: Logprobs | None) -> None:
        self.lists: tuple[list[Any], ...] = ()
        if logprobs is not None:
            parts = (logprobs.tokens, logprobs.top_ids, logprobs.top)
            self.lists = tuple(part.tolist() for part in parts)

    def of(
        self, row: int, length: int, request: Request
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """The logprobs and top logprobs of a row's new tokens, as its request wants them."""
        top = request.params.logprobs
        if not self.lists or top is None:
            return [], []
        logprobs, ids, values = (part[row][:length] for part in self.lists)
        pairs = zip(ids, values, strict=True)
        return logprobs, [list(zip(i[:top], v[:top], strict=True)) for i, v in pairs]
