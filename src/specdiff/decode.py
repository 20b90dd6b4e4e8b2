"""The decoding loop (Christopher et al. 2024, Algorithm 1): draft, score, verify, commit.

`step` is one round of it. `decode` runs rounds over a fixed batch; the engine runs the same `step`
while rows join and leave. Write the loop by hand with `start`, `admit`, `step` and `release` where
neither fits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff import features
from specdiff.drafters.base import Drafter
from specdiff.drafters.guarded import GuardedDrafter, GuardedState
from specdiff.errors import TargetError, UsageError
from specdiff.grammar_rows import GrammarRows
from specdiff.logits_processors import process_logits
from specdiff.noise import Noise
from specdiff.sampling import distribution, logprobs, most_likely
from specdiff.stopwatch import stopwatch
from specdiff.targets.base import Target
from specdiff.types import (
    Batch,
    Context,
    Draft,
    DraftPlan,
    Round,
    TargetOutput,
    Verification,
    tempered,
)
from specdiff.verify import VERIFIERS, Verifier, agree, block, refuse_trees, token

Stop = Callable[[Round], Bool[Tensor, "B"]]
DraftLength = Callable[[Round | None], int | DraftPlan]


@dataclass(slots=True)
class DecodeState:
    """A running batch: target and drafter with their states, the rows, the drafter's context.

    `read[b]`: of the tokens in the row's cache, the number whose features the drafter has read.
    `grammars`: of the rows whose answers have one.
    """

    target: Target[Any]
    drafter: GuardedDrafter
    verifier: Verifier
    cache: Any
    state: GuardedState
    batch: Batch
    context: Context
    read: Int[Tensor, "B"]
    grammars: GrammarRows = field(default_factory=GrammarRows)


@torch.inference_mode()
def step(
    run: DecodeState,
    plan: int | DraftPlan,
    stop: Stop | None = None,
    *,
    limits: Int[Tensor, "B"] | None = None,
) -> Round:
    """One round. Only this advances `run.batch`.

    plan: the draft length (0: a plain round), or all that is decided of the drafts. It must not
        depend on what is drawn in this round.
    limits: the most draft tokens of each row (None: all of them). A row's limit must not depend on
        what was drawn in this round.

    Logits that are NaN or infinite raise nothing here: `Round.failed` names the rows, and
    `raise_if_failed` raises.
    """
    clock = stopwatch(run.batch.length.device)
    noise = Noise.of(run.batch)
    run.grammars.advance(run.batch)
    plan = DraftPlan((plan,)) if isinstance(plan, int) else plan
    draft = _limited(_confident(_propose(run, noise, plan), plan.confidence), limits)
    drafted = run.grammars.drafted(draft)
    clock.lap("draft")
    output = run.target.score(run.cache, run.batch, draft)
    clock.lap("score")
    logits = run.grammars.masked(output.logits, drafted)
    finite = finite_rows(logits)
    verification = _verify(run, _cut(draft, finite), logits, noise)
    verification = _with_logprobs(verification, output, run.batch)
    clock.lap("verify")
    run.target.keep(run.cache, run.batch, verification)
    sound = sound_tokens(verification, finite)
    batch, emitted = commit(run.batch, verification, sound)
    failed = torch.where((emitted == 0) & ~run.batch.done, run.batch.length + sound, -1)
    clock.lap("commit")
    errors = run.grammars.errors()
    last = Round(draft, verification, emitted, batch, clock.seconds, run.state.off, failed, errors)
    if stop is not None:
        last = replace(last, batch=replace(batch, done=batch.done | stop(last)))
    run.batch = last.batch
    consumed = plan.longest > 0 and run.drafter.consumed(run.state)
    run.context = features.following(run.context, last, output.features, consumed=consumed)
    run.read = run.batch.length - 1 - run.context.feature_size
    return last


def commit(
    batch: Batch, verification: Verification, sound: Int[Tensor, "B"] | None = None
) -> tuple[Batch, Int[Tensor, "B"]]:
    """Append the verified tokens, cut at the first stop id and the row's limit; also their counts.

    sound: number of tokens before the first one whose scored row has no distribution (None: all). A
        row that would emit that one emits nothing, and is done.
    """
    tokens = verification.tokens
    n = verification.accepted + 1
    index = torch.arange(tokens.shape[1], device=tokens.device)
    stops = (tokens[..., None] == batch.params.stop_ids[:, None]).any(-1) & (index < n[:, None])
    first = torch.where(stops, index, tokens.shape[1]).amin(1)
    emitted = torch.minimum(torch.minimum(n, first + 1), batch.params.limit - batch.length)
    emitted = emitted.masked_fill(batch.done, 0)
    failed = torch.zeros_like(batch.done) if sound is None else emitted > sound
    emitted = emitted.masked_fill(failed, 0)
    offset = torch.arange(batch.ids.shape[1], device=tokens.device) - batch.length[:, None]
    new = (offset >= 0) & (offset < emitted[:, None])
    ids = torch.where(new, tokens.gather(1, offset.clamp(0, tokens.shape[1] - 1)), batch.ids)
    length = batch.length + emitted
    done = batch.done | failed | (first < emitted) | (length >= batch.params.limit)
    rounds = batch.round + (emitted > 0)
    return replace(batch, ids=ids, length=length, round=rounds, done=done), emitted


def start(
    target: Target[Any],
    drafter: Drafter[Any],
    batch: Batch,
    *,
    verifier: Verifier = token,
    slots: int | None = None,
) -> DecodeState:
    """Open target and drafter for the batch's rows.

    `slots` bounds a row's positions, drafts included (default: limit + draft_len + 1). The drafter
    is guarded: one that fails while decoding makes plain rounds, not errors.

    Raises UsageError for a row that may reach past the target's positions, and for a drafter of
    trees where the target or the verifier takes chains only.
    """
    rows = len(batch.length)
    limit = int(batch.params.limit.max())
    if limit > target.info.max_positions:
        raise UsageError(
            f"a row may reach {limit} tokens, but the target has {target.info.max_positions} "
            "positions; lower max_tokens",
            param="max_tokens",
        )
    slots = slots or limit + drafter.draft_len + 1
    check_trees(drafter, target, verifier)
    guarded = GuardedDrafter(drafter, target.info.vocab_size)
    return DecodeState(
        target=target,
        drafter=guarded,
        verifier=verifier,
        cache=target.open(rows, slots, drafter.taps),
        state=guarded.open(rows, slots),
        batch=batch,
        context=Context(batch, None, torch.zeros_like(batch.length), None),
        read=torch.zeros_like(batch.length),
    )


def check_trees(drafter: Drafter[Any], target: Target[Any], verifier: Verifier) -> None:
    """Raise UsageError for a drafter of trees where the target or the verifier takes chains only.

    A verifier of the user's own is trusted to read `Draft.parents`.
    """
    if not drafter.trees:
        return
    if not target.trees:
        raise UsageError(
            f"the target {target.info.name!r} ({type(target).__name__}) scores no trees; "
            "leave out the drafter's option 'tree'",
            param="tree",
        )
    if verifier is block:
        refuse_trees("block")


@torch.inference_mode()
def admit(
    run: DecodeState,
    rows: Int[Tensor, "R"],
    prefix_lengths: Int[Tensor, "R"] | None = None,
    held: tuple[Float[Tensor, "R W D"], Int[Tensor, "R"]] | None = None,
) -> None:
    """Fill both caches for the rows of `run.batch` that hold new prompts.

    prefix_lengths: how many of each prompt's first tokens the row's cache holds from an earlier
        request (None: none; at most len(prompt) - 1). If the drafter has taps it must keep features
        (`keeps_features`), and they must be at most len(prompt) - 2, because it needs the feature
        before the anchor.
    held: features of the last of these tokens that the drafter has not been given, right-padded,
        and their numbers.
    """
    prompts = [run.batch.ids[r, : run.batch.length[r]] for r in rows]
    if prefix_lengths is None:
        prefix_lengths = torch.zeros_like(rows)
    run.grammars.admit(run.batch, rows)
    new = run.target.admit(run.cache, rows, prompts, prefix_lengths)
    run.context = features.joined(run.context, run.batch, rows, new, prefix_lengths, run.read, held)
    run.read = run.read.index_copy(
        0, rows, run.batch.length[rows] - 1 - run.context.feature_size[rows]
    )
    run.drafter.admit(run.state, run.context, rows)


def release(run: DecodeState, rows: Int[Tensor, "R"]) -> None:
    """Free the rows in both caches, and mark them done even if their requests were not."""
    run.batch = replace(run.batch, done=run.batch.done.index_fill(0, rows, True))
    run.grammars.release(rows)
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
        batch: the prompts (`Batch.of`); seeds and sampling parameters are per row.
        draft_len: K, or a rule from the last round to the next K or plan; None: the drafter's own.
        stop: maps a Round to the rows that end with it.

    Raises UsageError as `start` does, and for a fixed `draft_len` below 1 (plain decoding is
    `NoDrafter`). Raises TargetError for rows that ended because the target's logits were NaN or
    infinite, after the last round: all other rows are decoded to their ends.
    """
    length = drafter.draft_len if draft_len is None else draft_len
    if isinstance(draft_len, int) and draft_len < 1:
        raise UsageError(
            f"draft_len must be at least 1, not {draft_len}; "
            "for plain decoding use the drafter 'none'",
            param="draft_len",
        )
    longest = max(drafter.draft_len, length) if isinstance(length, int) else drafter.draft_len
    slots = int(batch.params.limit.max()) + longest + 1
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
    finally:  # also if the caller stops iterating, or target or drafter raise
        release(run, rows)
    if last is not None:
        raise_if_failed(replace(last, failed=failed))


def raise_if_failed(last: Round) -> None:
    """For loops written by hand: raises TargetError after a `step` with failed rows."""
    rows = (last.failed >= 0).nonzero()[:, 0].tolist()
    if rows:
        position = int(last.failed[rows[0]])
        raise TargetError(f"row {rows[0]}: {reason(position, last.errors.get(rows[0]))}")


def reason(position: int, grammar_error: str | None = None) -> str:
    """The error message for a position in `Round.failed`, and its row's entry in `Round.errors`."""
    if grammar_error is not None:
        return f"no token can be drawn at position {position}: {grammar_error}"
    return (
        f"the target's logits at position {position} are not finite (NaN or infinite), so no "
        "token can be drawn from them; check the model's weights, or load it in float32"
    )


def finite_rows(logits: Float[Tensor, "B N V"]) -> Bool[Tensor, "B N"]:
    """Which scored rows have a distribution: not those with NaN or +inf, or only -inf."""
    return logits.amax(-1).isfinite()  # NaN if any is; single -inf entries are legitimate


def sound_tokens(verification: Verification, finite: Bool[Tensor, "B N"]) -> Int[Tensor, "B"]:
    """Number of tokens before the first one whose scored row has no distribution."""
    return finite.gather(1, verification.path).long().cumprod(1).sum(1)


def _propose(run: DecodeState, noise: Noise, plan: DraftPlan) -> Draft:
    if plan.longest == 0:
        return Draft.empty(run.batch)
    context = replace(run.context, plan=plan)
    if plan.temperature != 1:
        params = tempered(context.batch.params, plan.temperature)
        context = replace(context, batch=replace(context.batch, params=params))
    if run.grammars:
        mask = run.grammars.next_mask(run.batch, run.target.info.vocab_size)
        context = replace(context, batch=replace(context.batch, next_mask=mask))
    return run.drafter.propose(context, run.state, noise, plan.longest)


def _verify(
    run: DecodeState, draft: Draft, logits: Float[Tensor, "B N V"], noise: Noise
) -> Verification:
    """Run the verifier. Where all rows are greedy, one of ours needs no distribution."""
    if run.batch.params.all_greedy and any(run.verifier is own for own in VERIFIERS.values()):
        return agree(draft, most_likely(process_logits(logits, run.batch, draft)))
    return run.verifier(draft, distribution(logits, run.batch, draft), noise)


def _cut(draft: Draft, finite: Bool[Tensor, "B N"]) -> Draft:
    """The draft up to the first scored row without a distribution.

    That row depends on the tokens before it alone, and they all stay, so this is exact: a request
    fails only if its text really arrives there. A tree stays whole: each of its nodes is judged by
    the rows above it alone.
    """
    if draft.tokens.shape[1] == 0 or draft.parents is not None:
        return draft
    return replace(draft, size=torch.minimum(draft.sizes, finite.long().cumprod(1).sum(1)))


def _confident(draft: Draft, confidence: float) -> Draft:
    """Each row's draft up to the first position that is too unsure; narrower if all rows are.

    Row k of `probs` depends on the tokens before k alone, and they all stay, so this is exact. (An
    unlikely token that was drawn is no reason: it would be dropped for what it is.) Point masses
    are sure, and so is a tree.
    """
    if not confidence or draft.probs is None or draft.parents is not None:
        return draft
    sure = (draft.probs.amax(-1) >= confidence).long().cumprod(1).sum(1)
    size = torch.minimum(draft.sizes, sure)
    if size.device.type != "cpu":
        return replace(draft, size=size)  # reading it would wait for the device
    K = int(size.max())
    return replace(draft, tokens=draft.tokens[:, :K], probs=draft.probs[:, :K], size=size)


def _limited(draft: Draft, limits: Int[Tensor, "B"] | None) -> Draft:
    """The first `limits` tokens of each row's draft: known before drafting, so this is exact."""
    if limits is None or draft.tokens.shape[1] == 0:
        return draft
    return replace(draft, size=torch.minimum(draft.sizes, limits))


def _with_logprobs(verification: Verification, output: TargetOutput, batch: Batch) -> Verification:
    top = batch.params.logprobs
    if top is None:
        return verification
    return replace(verification, logprobs=logprobs(output.logits, verification, top))
