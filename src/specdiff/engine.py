"""Rows join and leave: a stream of requests around `step`, in memory bounded by the number of rows, not of requests.

`serve` is the loop, one `EngineStep` a round, cheap however many rows there are; `run` tells every row's tokens as they come.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import decode
from specdiff.devices import mapped
from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.prefix_cache import seats
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, Logprobs, Round, SamplingParams
from specdiff.verify import Verifier

DraftLength = int | Callable[[Round | None], int]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, what is asked of it, and its 64-bit seed."""

    prompt: Sequence[int]
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one round gave one request. The first `accepted` of `tokens` came from the draft; `finished` is set on the last.

    finished: "stop" (a stop id), "length" (max_tokens), "error" or None. disabled: the drafter broke, and drafts no more for this request.
    logprobs: of each token, where asked (else empty), and in top_logprobs (token id, logprob) of the likeliest ones in its place.
    error: why the request ended early, a sentence naming it; its tokens so far are no whole answer.
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


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One round. `owner[row]` is the place in the stream of the request that ran there (None: idle), `asked[row]` the request,
    `reused[row]` how many of its prompt's tokens the row had read for the request before, and `ended` the rows it was the last
    round of. Read it before asking for the next turn: rows then change hands."""

    round: Round
    owner: Sequence[int | None]
    asked: Sequence[Request]
    reused: Sequence[int]
    ended: list[int]

    def cancel(self, request: int) -> None:
        """End a request that would go on (at a stop string, or because nobody listens): its row is free before the next round."""
        row = self.owner.index(request)
        if row not in self.ended:
            self.ended.append(row)

    def progress(self) -> list[RequestOutput]:
        """One RequestOutput a running row; the round's tensors cross to the host once."""
        last, ended = self.round, frozenset(self.ended)
        emitted, accepted, tokens = (
            last.emitted.tolist(),
            last.verification.accepted.tolist(),
            last.verification.tokens.tolist(),
        )
        sizes = last.draft.sizes.tolist()
        disabled = last.disabled.tolist()
        errors = self.errors()
        told = _LogprobLists(last.verification.logprobs)
        found = []
        for row, (index, request) in enumerate(zip(self.owner, self.asked, strict=True)):
            if index is not None:
                new = tokens[row][: emitted[row]]
                stopped = bool(new) and new[-1] in request.params.stop_token_ids
                finished = ("stop" if stopped else "length") if row in ended else None
                error = errors.get(index)
                if error is not None:
                    finished = "error"
                kept = min(accepted[row], len(new))
                logs = told.of(row, len(new), request)
                found.append(
                    RequestOutput(
                        index,
                        new,
                        kept,
                        sizes[row],
                        finished,
                        disabled[row],
                        dict(last.seconds),
                        *logs,
                        error=error,
                    )
                )
        return found

    def errors(self) -> dict[int, str]:
        """Why each request that failed in this round did: the target's logits were NaN or infinite where it had arrived."""
        if not self.ended:
            return {}  # a row that fails is done, so nothing needs to be read
        failed = [
            (self.owner[row], at) for row, at in enumerate(self.round.failed.tolist()) if at >= 0
        ]
        return {
            request: f"request {request}: {decode.reason(at)}"
            for request, at in failed
            if request is not None
        }

    def finished(self) -> list[tuple[int, Int[Tensor, "L"], int]]:
        """(request, its tokens with the prompt in front, on the host, and the prompt's length) of every request that ended.

        Not of those in `errors()`: what they hold is no whole answer.
        """
        if not self.ended:
            return []
        batch, errors = self.round.batch, self.errors()
        rows = torch.tensor(self.ended, device=batch.length.device)
        ids, lengths, prompts = (
            batch.ids[rows].cpu(),
            batch.length[rows].tolist(),
            batch.prompt_length[rows].tolist(),
        )
        requests = [r for row in self.ended if (r := self.owner[row]) is not None]
        whole = zip(requests, ids, lengths, prompts, strict=True)
        return [(r, i[:n].clone(), p) for r, i, n, p in whole if r not in errors]


def run(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Sequence[Request],
    *,
    verifier: Verifier,
    draft_len: DraftLength,
    rows: int = 8,
) -> Iterator[RequestOutput]:
    """Serve every request, at most `rows` at a time, in order of arrival. Raises UsageError as `check` does.

    Each row has slots for the longest request; a row that ends takes the next request while the others go on.
    """
    check(requests, target)
    for turn in serve(target, drafter, requests, verifier=verifier, draft_len=draft_len, rows=rows):
        yield from turn.progress()


def serve(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Iterable[Request | None],
    *,
    verifier: Verifier,
    draft_len: DraftLength,
    rows: int = 8,
    slots: int | None = None,
) -> Iterator[EngineStep]:
    """Run the stream's requests, at most `rows` at a time, until it ends; one EngineStep a round.

    A request that joins takes the free row that holds the longest prefix of its prompt, and only the rest is read by the target
    (all of it where the drafter has taps: it needs every feature). Rows are opened as requests come: where more of them run than
    there are rows, twice as many are opened, and the running texts are read anew.

    Args:
        requests: pulled when a row is free, so a stream may be endless, and may answer to what earlier turns told. None in it
            means nothing for now: it is asked again after the next round, unless no row runs any more.
        slots: positions a row may reach, prompt and max_tokens; needed unless `requests` is a sequence.

    Raises UsageError as `check` does, and for a prompt that does not fit its slots.
    """
    if slots is None:
        if not isinstance(requests, Sequence):
            raise UsageError(
                "a stream of requests needs slots: the most tokens of prompt and answer together"
            )
        slots = max(
            (len(r.prompt) + r.params.max_tokens for r in requests if r is not None), default=0
        )
    queue = _Queue(iter(requests), slots, target)
    slots += (drafter.draft_len if callable(draft_len) else draft_len) + 1
    joining = queue.take(rows)
    if not joining:
        return
    owner: list[int | None] = [place for place, _ in joining]
    asked, reused = [request for _, request in joining], [0] * len(joining)
    running = decode.start(
        target, drafter, _batch(joining, slots, target), verifier=verifier, slots=slots
    )
    last: Round | None = None
    try:
        decode.admit(running, torch.arange(len(owner), device=target.info.device))
        while any(o is not None for o in owner):
            last = decode.step(running, draft_len(last) if callable(draft_len) else draft_len)
            done = last.batch.done.tolist()
            ended = [row for row, o in enumerate(owner) if o is not None and done[row]]
            yield EngineStep(last, owner, asked, reused, ended)
            if ended:
                decode.release(running, torch.tensor(ended, device=target.info.device))
            for row in ended:
                owner[row] = None
            live = [row for row, o in enumerate(owner) if o is not None]
            joining = queue.take(rows - len(live))
            more = len(live) + len(joining) - len(owner)
            if more > 0:
                more = max(more, min(len(owner), rows - len(owner)))
                _grow(running, live, len(owner) + more, slots)
                owner += [None] * more
                asked += [joining[0][1]] * more
                reused += [0] * more
            free = [row for row, o in enumerate(owner) if o is None]
            for (row, kept), (place, request) in zip(
                _join(running, free, joining, slots), joining, strict=True
            ):
                owner[row], asked[row], reused[row] = place, request, kept
    finally:  # also where nobody reads on, or a role raises
        left = [row for row, o in enumerate(owner) if o is not None]
        if left:
            decode.release(running, torch.tensor(left, device=target.info.device))


def _grow(running: decode.DecodeState, live: list[int], rows: int, slots: int) -> None:
    """Open `rows` rows in place of fewer: the live ones read their texts anew, the others hold nothing and are done."""
    old, previous, device = running.batch, running.context.previous, running.batch.length.device
    taken = torch.tensor(live, dtype=torch.long, device=device)
    source = torch.arange(rows, device=device).clamp(max=len(old.length) - 1)
    idle = torch.ones(rows, dtype=torch.bool, device=device).index_fill(0, taken, False)
    batch: Batch = mapped(old, lambda part: part[source])
    batch = replace(batch, done=idle, length=batch.length.masked_fill(idle, 1))
    cache, state = (
        running.target.open(rows, slots, running.drafter.taps),
        running.drafter.open(rows, slots),
    )
    if live:
        decode.release(running, taken)
    earlier, running.cache, running.state, running.batch = running.state, cache, state, batch
    previous = mapped(previous, lambda part: part[source])
    running.context = Context(batch, None, torch.zeros_like(batch.length), previous)
    if live:
        decode.admit(running, taken)
        running.drafter.resume(state, earlier, taken)


class _Queue:
    """The stream, numbered and checked as it is pulled."""

    def __init__(self, stream: Iterator[Request | None], slots: int, target: Target[Any]) -> None:
        self.stream, self.slots, self.target, self.place = stream, slots, target, 0

    def take(self, most: int) -> list[tuple[int, Request]]:
        taken: list[tuple[int, Request]] = []
        while len(taken) < most and (request := next(self.stream, None)) is not None:
            check([request], self.target, self.place)
            if len(request.prompt) + request.params.max_tokens > self.slots:
                raise UsageError(
                    f"request {self.place} may reach {len(request.prompt)} + {request.params.max_tokens} tokens, but slots are {self.slots}"
                )
            taken.append((self.place, request))
            self.place += 1
        return taken


def check(requests: Iterable[Request], target: Target[Any], first: int = 0) -> None:
    """Raises UsageError for a prompt without tokens, one that may reach past the target's positions, and for options that name
    tokens the target does not have."""
    size, positions = target.info.vocab_size, target.info.max_positions
    for place, request in enumerate(requests, first):
        if not request.prompt:
            raise UsageError(f"prompt {place} holds no tokens; give at least one")
        if len(request.prompt) + request.params.max_tokens > positions:
            raise UsageError(
                f"request {place} may reach {len(request.prompt)} + {request.params.max_tokens} tokens, but the target has {positions} "
                "positions; shorten the prompt or lower max_tokens"
            )
        named = {
            "logit_bias": [token for token, _ in request.params.logit_bias],
            "allowed_token_ids": request.params.allowed_token_ids or (),
        }
        for option, ids in named.items():
            if ids and max(ids) >= size:
                raise UsageError(
                    f"{option} names token id {max(ids)}, which is outside the target's vocabulary of {size}"
                )


class _LogprobLists:
    """The round's log probabilities on the host, if any row asked for them."""

    def __init__(self, found: Logprobs | None) -> None:
        self.lists = (
            None
            if found is None
            else (found.tokens.tolist(), found.top_ids.tolist(), found.top.tolist())
        )

    def of(
        self, row: int, length: int, request: Request
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """What this row's request asked to be told of its new tokens."""
        if self.lists is None or request.params.logprobs is None:
            return [], []
        (own, ids, top), most = (x[row][:length] for x in self.lists), request.params.logprobs
        return own, [
            list(zip(i[:most], v[:most], strict=True)) for i, v in zip(ids, top, strict=True)
        ]


def _batch(chosen: Sequence[tuple[int, Request]], slots: int, target: Target[Any]) -> Batch:
    rows = [request for _, request in chosen]
    return Batch.of(
        [r.prompt for r in rows],
        [r.params for r in rows],
        [r.seed for r in rows],
        slots=slots,
        device=target.info.device,
    )


def _join(
    running: decode.DecodeState, free: list[int], joining: Sequence[tuple[int, Request]], slots: int
) -> list[tuple[int, int]]:
    """Admit the requests to free rows; (row, how many of its prompt's tokens were held there) of each."""
    if not joining:
        return []
    device, prompts = running.batch.length.device, [request.prompt for _, request in joining]
    chosen = [(row, 0) for row in free[: len(joining)]]
    if not running.drafter.taps:
        places = torch.tensor(free, device=device)
        ids, lengths = (
            running.batch.ids[places, : max(map(len, prompts))].tolist(),
            running.batch.length[places].tolist(),
        )
        # all but the last committed token: the anchor of a row's last round was never scored
        held = [tokens[: length - 1] for tokens, length in zip(ids, lengths, strict=True)]
        chosen = [(free[place], kept) for place, kept in seats(held, prompts)]
    rows, kept = torch.tensor(chosen, device=device).unbind(1)
    running.batch = running.batch.with_rows(rows, _batch(joining, slots, running.target))
    decode.admit(running, rows, kept)
    return chosen
