"""The algorithm of the paper (Christopher et al. 2024, Algorithm 1): draft, score, verify, commit.

`step` is one round of it. `decode` runs rounds over a fixed batch; the engine runs the same `step` while rows join and
leave. Write the loop by hand with `start`, `admit`, `step` and `release` where neither fits.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.drafters.guarded import GuardedDrafter, GuardedState
from specdiff.errors import TargetError, UsageError
from specdiff.noise import Noise
from specdiff.sampling import distribution, logprobs
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, Draft, Round, Verification
from specdiff.verify import Verifier, token

Stop = Callable[[Round], Bool[Tensor, "B"]]
DraftLength = Callable[[Round | None], int]


@dataclass(slots=True)
class DecodeState:
    """One running batch: the two roles with the state each handed out, the rows, and what the drafter may see of them."""

    target: Target[Any]
    drafter: GuardedDrafter
    verifier: Verifier
    cache: Any
    state: GuardedState
    batch: Batch
    context: Context


@torch.inference_mode()
def step(run: DecodeState, draft_len: int, stop: Stop | None = None) -> Round:
    """One round of `draft_len` tokens (0: a plain one). Advances `run.batch`; nobody else does.

    Raises nothing for a target whose logits are NaN or infinite: `Round.failed` names the rows, and `raise_if_failed` raises.
    """
    clock = stopwatch(run.batch.length.device)
    noise = Noise.of(run.batch)
    draft = (
        run.drafter.propose(run.context, run.state, noise, draft_len)
        if draft_len
        else Draft.empty(run.batch)
    )
    clock.lap("draft")
    output = run.target.score(run.cache, run.batch, draft)
    clock.lap("score")
    finite = finite_rows(output.logits)
    verification = run.verifier(
        _cut(draft, finite), distribution(output.logits, run.batch, draft), noise
    )
    if run.batch.params.logprobs is not None:
        verification = replace(
            verification, logprobs=logprobs(output.logits, verification, run.batch.params.logprobs)
        )
    clock.lap("verify")
    run.target.keep(run.cache, run.batch, verification)
    batch, emitted = commit(run.batch, verification, finite)
    failed = torch.where((emitted == 0) & ~run.batch.done, run.batch.length + finite, -1)
    clock.lap("commit")
    done = Round(draft, verification, emitted, batch, clock.seconds, run.state.off, failed)
    if stop is not None:
        batch = replace(batch, done=batch.done | stop(done))
        done = replace(done, batch=batch)
    run.batch = batch
    run.context = _seen(run.context, done, output.features, proposed=bool(draft_len))
    return done


def finite_rows(logits: Float[Tensor, "B N V"]) -> Int[Tensor, "B"]:
    """How many scored rows come before the first without a distribution: one with NaN, with +inf, or with -inf alone."""
    peak = logits.amax(-1)  # NaN if any is; single -inf entries are legitimate
    index = torch.arange(peak.shape[1], device=peak.device)
    return torch.where(peak.isfinite(), peak.shape[1], index).amin(1)


def _cut(draft: Draft, finite: Int[Tensor, "B"]) -> Draft:
    """The draft up to the first scored row without a distribution, where a row's next token would have to come from.

    That row depends on the tokens before it alone, and they all stay, so this is exact: a row fails only where it really arrives.
    """
    size = draft.tokens.shape[1]
    if size == 0:
        return draft
    return replace(
        draft,
        size=finite.clamp(max=size) if draft.size is None else torch.minimum(draft.size, finite),
    )


def raise_if_failed(last: Round) -> None:
    """For loops written by hand, after a `step`: raises TargetError where the target's logits were NaN or infinite."""
    rows = (last.failed >= 0).nonzero()[:, 0].tolist()
    if rows:
        raise TargetError(f"row {rows[0]}: {reason(int(last.failed[rows[0]]))}")


def reason(position: int) -> str:
    """What is wrong where `Round.failed` names a position."""
    return (
        f"the target's logits at position {position} are not finite (NaN or infinite), so no token can be drawn from them; "
        "check the model's weights, or load it in float32"
    )


def commit(
    batch: Batch, verification: Verification, finite: Int[Tensor, "B"] | None = None
) -> tuple[Batch, Int[Tensor, "B"]]:
    """Append what was verified, cut exactly at the first stop id and at the row's limit; returns the emitted counts too.

    finite: how many scored rows have a distribution (None: all). A row that would emit a token of a later one emits nothing, and is done.
    """
    tokens, n = verification.tokens, verification.accepted + 1
    index = torch.arange(tokens.shape[1], device=tokens.device)
    stops = (tokens[..., None] == batch.params.stop_ids[:, None]).any(-1) & (index < n[:, None])
    first = torch.where(stops, index, tokens.shape[1]).amin(1)
    emitted = torch.minimum(
        torch.minimum(n, first + 1), batch.params.limit - batch.length
    ).masked_fill(batch.done, 0)
    failed = torch.zeros_like(batch.done) if finite is None else emitted > finite
    emitted = emitted.masked_fill(failed, 0)
    offset = torch.arange(batch.ids.shape[1], device=tokens.device) - batch.length[:, None]
    new = (offset >= 0) & (offset < emitted[:, None])
    ids = torch.where(new, tokens.gather(1, offset.clamp(0, tokens.shape[1] - 1)), batch.ids)
    length = batch.length + emitted
    done = batch.done | failed | (first < emitted) | (length >= batch.params.limit)
    return replace(
        batch, ids=ids, length=length, round=batch.round + (emitted > 0), done=done
    ), emitted


def start(
    target: Target[Any],
    drafter: Drafter[Any],
    batch: Batch,
    *,
    verifier: Verifier = token,
    slots: int | None = None,
) -> DecodeState:
    """Open both roles for the batch's rows. `slots` bounds a row's positions, drafts included (default: limit + draft_len).

    The drafter is guarded: one that breaks while decoding makes plain rounds, not errors.

    Raises UsageError for a row that may reach past the target's positions.
    """
    rows, limit = len(batch.length), int(batch.params.limit.max())
    if limit > target.info.max_positions:
        raise UsageError(
            f"a row may reach {limit} tokens, but the target has {target.info.max_positions} positions; lower max_tokens"
        )
    room = slots or limit + drafter.draft_len + 1
    context = Context(batch, None, torch.zeros_like(batch.length), None)
    guarded = GuardedDrafter(drafter, target.info.vocab_size)
    return DecodeState(
        target,
        guarded,
        verifier,
        target.open(rows, room, drafter.taps),
        guarded.open(rows, room),
        batch,
        context,
    )


@torch.inference_mode()
def admit(run: DecodeState, rows: Int[Tensor, "R"], kept: Int[Tensor, "R"] | None = None) -> None:
    """Fill both caches for the rows of `run.batch` that hold new prompts.

    kept: how many of each prompt's first tokens the target's cache holds in that row, from a request before that began alike (None:
        none; at most len(prompt) - 1). Must be 0 where the drafter has taps, for it needs every feature.
    """
    prompts = [run.batch.ids[r, : run.batch.length[r]] for r in rows]
    features = run.target.admit(
        run.cache, rows, prompts, torch.zeros_like(rows) if kept is None else kept
    )
    seen, size = (
        run.context.features,
        run.context.feature_size.index_copy(0, rows, run.batch.length[rows] - 1),
    )
    if features is not None:
        width = max(features.shape[1], 0 if seen is None else seen.shape[1])
        seen = _widen(
            features.new_zeros(len(size), 0, features.shape[2]) if seen is None else seen, width
        )
        seen = seen.index_copy(0, rows, _widen(features, width))
    run.context = replace(run.context, batch=run.batch, features=seen, feature_size=size)
    run.drafter.admit(run.state, run.context, rows)


def release(run: DecodeState, rows: Int[Tensor, "R"]) -> None:
    """Give up the rows' places in both caches; rows that had more to say are done all the same."""
    run.batch = replace(run.batch, done=run.batch.done.index_fill(0, rows, True))
    run.target.release(run.cache, rows)
    run.drafter.release(run.state, rows)


def decode(
    target: Target[Any],
    drafter: Drafter[Any],
    batch: Batch,
    *,
    verifier: Verifier = token,
    draft_len: int | DraftLength | None = None,
    stop: Stop | None = None,
) -> Iterator[Round]:
    """Rounds until every row is done: at a stop id, at its limit, or where `stop` says so.

    Args:
        batch: the prompts (`Batch.of`); seeds and sampling parameters are the rows' own.
        draft_len: K, or a rule that names the next round's from the last round; None: the drafter's own.
        stop: looks at each Round and says which rows end with it.

    Raises UsageError as `start` does, and if a fixed `draft_len` is below 1 (plain decoding is `NoDrafter`); and TargetError for rows
    that ended where the target's logits are NaN or infinite, after the last round: the other rows are decoded to their ends.
    """
    length = drafter.draft_len if draft_len is None else draft_len
    if isinstance(draft_len, int) and draft_len < 1:
        raise UsageError(
            f"draft_len must be at least 1, not {draft_len}; for plain decoding use the drafter 'none'"
        )
    slots = (
        int(batch.params.limit.max())
        + max(drafter.draft_len, length if isinstance(length, int) else 0)
        + 1
    )
    run = start(target, drafter, batch, verifier=verifier, slots=slots)
    rows = torch.arange(len(batch.length), device=batch.length.device)
    last: Round | None = None
    failed = torch.full_like(batch.length, -1)
    try:
        admit(run, rows)
        while not bool(run.batch.done.all()):
            last = step(run, length if isinstance(length, int) else length(last), stop)
            failed = torch.maximum(failed, last.failed)
            yield last
    finally:  # also where nobody reads on, or a role raises
        release(run, rows)
    if last is not None:
        raise_if_failed(replace(last, failed=failed))


def _seen(context: Context, done: Round, features: Tensor | None, proposed: bool) -> Context:
    """What the drafter sees next: a proposing drafter has consumed its features; the round's own come behind them."""
    size = torch.zeros_like(context.feature_size) if proposed else context.feature_size
    if features is None:
        return Context(done.batch, None, size, done)
    old = features[:, :0] if proposed or context.features is None else context.features
    entered = (
        done.emitted
    )  # the anchor and all but the last of the emitted tokens are in the target's cache now
    merged = _widen(old, int((size + entered).max()))
    index = torch.arange(merged.shape[1], device=size.device)
    fresh = (
        (index - size[:, None])
        .clamp(0, features.shape[1] - 1)[..., None]
        .expand(-1, -1, features.shape[2])
    )
    merged = torch.where((index >= size[:, None])[..., None], features.gather(1, fresh), merged)
    return Context(done.batch, merged, size + entered, done)


def _widen(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, max(0, width - x.shape[1])))


class Event(Protocol):
    """A mark on a device's stream: the device notes when it gets there."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Self) -> float: ...


class Stopwatch:
    """Host seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now


class DeviceStopwatch:
    """Seconds by stage on the device, where a stage returns to the host as soon as its work is queued."""

    def __init__(self, event: Callable[[], Event]) -> None:
        self.event = event
        self.seconds = DeviceSeconds(self._mark())

    def lap(self, stage: str) -> None:
        self.seconds.ends[stage] = self._mark()

    def _mark(self) -> Event:
        event = self.event()
        event.record()
        return event


class DeviceSeconds(Mapping[str, float]):
    """Read at the first look, which waits for the round's last stage; a loop that has read `done` waits no more."""

    def __init__(self, start: Event) -> None:
        self.start = start
        self.ends: dict[str, Event] = {}
        self.read: dict[str, float] = {}

    def __getitem__(self, stage: str) -> float:
        if not self.read:
            last = self.start
            for name, end in self.ends.items():
                end.synchronize()
                self.read[name] = last.elapsed_time(end) / 1000  # events count milliseconds
                last = end
        return self.read[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ends)

    def __len__(self) -> int:
        return len(self.ends)


def stopwatch(device: torch.device) -> Stopwatch | DeviceStopwatch:
    """The one that measures what a stage takes on a device, not what queueing it takes."""
    if device.type != "cuda":
        return Stopwatch()
    stream = torch.cuda.current_stream(device)
    return DeviceStopwatch(lambda: StreamEvent(stream))


class StreamEvent:
    """A CUDA event on one stream, whichever device is the current one."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self.event.record(self.stream)

    def synchronize(self) -> None:
        self.event.synchronize()

    def elapsed_time(self, end: Self) -> float:
        return float(self.event.elapsed_time(end.event))
