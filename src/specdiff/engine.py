"""Rows join and leave: a queue of requests around `step`, in memory bounded by the number of rows, not of requests."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.targets.base import Target
from specdiff.types import Batch, Round, SamplingParams
from specdiff.verify import Verifier


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, what is asked of it, and its 64-bit seed."""

    prompt: Sequence[int]
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What one round gave one request. The first `accepted` of `tokens` came from the draft; `finished` is set on the last.

    finished: "stop" (a stop id), "length" (max_tokens) or None.
    """

    request: int
    tokens: list[int]
    accepted: int
    drafted: int
    finished: str | None
    seconds: dict[str, float]


def run(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Sequence[Request],
    *,
    verifier: Verifier,
    draft_len: int | Callable[[Round | None], int],
    rows: int = 8,
) -> Iterator[Progress]:
    """Serve every request, at most `rows` at a time, in order of arrival. Raises UsageError for a prompt without tokens.

    Each row has slots for the longest request; a row that ends takes the next request while the others go on.
    """
    for i, request in enumerate(requests):
        if not request.prompt:
            raise UsageError(f"prompt {i} holds no tokens; give at least one")
    if not requests:
        return
    widest = drafter.draft_len if callable(draft_len) else draft_len
    slots = max(len(r.prompt) + r.params.max_tokens for r in requests) + widest + 1
    queue = deque(range(len(requests)))
    owner: list[int | None] = [queue.popleft() for _ in range(min(rows, len(requests)))]
    running = decode.start(target, drafter, _batch(requests, owner, slots, target), verifier=verifier, slots=slots)
    decode.admit(running, torch.arange(len(owner), device=target.info.device))
    last: Round | None = None
    while any(o is not None for o in owner):
        last = decode.step(running, draft_len(last) if callable(draft_len) else draft_len)
        free = []
        for row, progress in _report(last, owner, requests):
            if progress.finished:
                owner[row] = None
                free.append(row)
            yield progress
        _refill(running, owner, free, queue, requests, slots)


def _batch(requests: Sequence[Request], chosen: Sequence[int | None], slots: int, target: Target[Any]) -> Batch:
    rows = [requests[i] for i in chosen if i is not None]
    return Batch.of([r.prompt for r in rows], [r.params for r in rows], [r.seed for r in rows], slots=slots, device=target.info.device)


def _report(last: Round, owner: Sequence[int | None], requests: Sequence[Request]) -> Iterator[tuple[int, Progress]]:
    """One Progress a running row; the round's tensors cross to the host once."""
    emitted, done = last.emitted.tolist(), last.batch.done.tolist()
    accepted, tokens = last.verification.accepted.tolist(), last.verification.tokens.tolist()
    sizes = [last.draft.tokens.shape[1]] * len(owner) if last.draft.size is None else last.draft.size.tolist()
    for row, index in enumerate(owner):
        if index is None:
            continue
        new = tokens[row][: emitted[row]]
        stopped = bool(new) and new[-1] in requests[index].params.stop_token_ids
        finished = ("stop" if stopped else "length") if done[row] else None
        yield row, Progress(index, new, min(accepted[row], len(new)), sizes[row], finished, dict(last.seconds))


def _refill(
    running: decode.Run, owner: list[int | None], free: list[int], queue: deque[int], requests: Sequence[Request], slots: int
) -> None:
    if not free:
        return
    device = running.batch.length.device
    decode.release(running, torch.tensor(free, device=device))
    joining = [row for row in free if queue]
    joining = joining[: len(queue)]
    if not joining:
        return
    for row in joining:
        owner[row] = queue.popleft()
    rows = torch.tensor(joining, device=device)
    running.batch = running.batch.with_rows(rows, _batch(requests, [owner[r] for r in joining], slots, running.target))
    decode.admit(running, rows)
