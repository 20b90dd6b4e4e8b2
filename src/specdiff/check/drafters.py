"""The suite for a drafter: sound drafts, steady state, the contract, the texts' law, its faults."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import decode
from specdiff.check.contract import Scores
from specdiff.check.findings import FALSE_ALARMS, Finding
from specdiff.check.goodness_of_fit import compare, law, texts
from specdiff.check.recording import (
    PARAMS,
    Record,
    WatchedDrafter,
    differing,
    drafts,
    requests,
    row_of,
    run,
    written,
)
from specdiff.drafters.base import Drafter, DrafterWrapper, NoDrafter
from specdiff.drafters.guarded import FAULTS, faults, shaped
from specdiff.engine import Request
from specdiff.errors import DrafterError, TargetError, UsageError
from specdiff.noise import Noise
from specdiff.targets.base import Target
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetInfo
from specdiff.verify import Verifier, match, token

LARGE = 16  # a draft longer than most use
# drafts of the texts that are counted
LAW_LEN = 3
LONG_LAW_LEN = 8
SMALL = 5  # the toy's vocabulary; 3 where whole texts are counted
LAWS = (
    SamplingParams(max_tokens=4),
    SamplingParams(max_tokens=3, temperature=0.6),
    SamplingParams(max_tokens=3, top_k=2),
)
LONG_LAW = SamplingParams(max_tokens=7)  # long enough for what goes wrong late in a draft
Build = Callable[[TargetInfo], Drafter[Any]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A drafter to be built, and its target: the toy, or the one target it was made for."""

    build: Build
    target: Target[Any] = field(default_factory=lambda: TableTarget.random(SMALL, seed=3))

    @property
    def toy(self) -> bool:
        """Can it be built for any vocabulary? Then texts are short enough to count."""
        return isinstance(self.target, TableTarget)


def check_drafter(
    subject: Subject, verifiers: Mapping[str, Verifier], *, quick: bool = False
) -> Iterator[Finding]:
    """Every finding about a drafter, one by one; drafts that cannot be read end the suite early."""
    drafter = subject.build(subject.target.info)
    sound = True
    lengths: list[int] = []
    for finding in soundness(drafter, subject.target, lengths):
        # "possible" finds wrong probabilities, which the contract's checks explain
        sound &= finding.passed or finding.name == "possible"
        yield finding
    if not sound:
        return
    yield from steadiness(drafter, subject.target)
    longest = max(lengths)
    yield from contract(drafter, subject.target, 300 if quick else 2000, longest)
    if subject.toy:
        yield from _laws(subject.build, verifiers, 5000 if quick else 50_000, longest)
    yield greedy(drafter, subject.target, verifiers)
    yield survives(drafter, subject.target)


@dataclass(slots=True)
class _Census:
    """Totals over all drafts: how many positions have each fault."""

    vocab_size: int
    rounds: int = 0
    counts: Int[Tensor, "F"] = field(
        default_factory=lambda: torch.zeros(len(FAULTS), dtype=torch.long)
    )
    impossible: int = 0

    def look(self, context: Context, noise: Noise, draft: Draft, draft_len: int) -> None:
        trees = draft.parents is not None
        shaped(draft, context.batch, draft_len, self.vocab_size, trees=trees)
        if trees and draft.probs is not None:
            raise UsageError(
                "trees with probabilities are not checked yet: their contract is about ancestors "
                "and earlier siblings; check the drafter of chains, or trees of point masses"
            )
        live = ~context.batch.done
        half = draft.probs is not None and draft.probs.dtype in (torch.float16, torch.bfloat16)
        fault = faults(draft, self.vocab_size, tolerance=1e-2 if half else 1e-4)
        fault = fault[live].flatten().cpu()
        self.rounds += 1
        self.counts += fault.bincount(minlength=len(FAULTS))
        # ids beyond the vocabulary have no probability to look up
        own = None if bool(fault.any()) else draft.token_probs()
        if own is not None:
            size = draft.sizes[live, None]
            counted = torch.arange(draft.tokens.shape[1], device=draft.tokens.device) < size
            self.impossible += int(((own[live] <= 0) & counted).sum())


def soundness(drafter: Drafter[Any], target: Target[Any], accepted: list[int]) -> Iterator[Finding]:
    """Short, usual and long drafts under all sampling parameters: nothing is raised, shapes are
    right, and laws are laws.

    The draft lengths that it does not refuse are appended to `accepted`.
    """
    census = _Census(target.info.vocab_size)
    lengths = sorted({1, drafter.draft_len or 1, LARGE})
    refused = []
    for draft_len in lengths:
        look = partial(census.look, draft_len=draft_len)
        try:
            run(target, drafter, requests(target, 5), look, draft_len=draft_len, rows=3)
            accepted.append(draft_len)
        except UsageError as error:
            if draft_len == drafter.draft_len:
                yield Finding("drafts", False, f"it refuses its own draft_len {draft_len}: {error}")
                return
            refused.append(draft_len)
        except TargetError:
            raise
        except Exception as error:
            own = isinstance(error, DrafterError)
            fault = str(error) if own else f"raised {type(error).__name__}: {error}"
            yield Finding("drafts", False, f"with draft_len {draft_len} it {fault}")
            return
    exceptions = f"; it refuses {refused}" if refused else ""
    yield Finding("drafts", True, f"{census.rounds} rounds with draft_len {lengths}{exceptions}")
    for place, name in enumerate(("tokens", "probabilities", "size"), start=1):
        wrong = int(census.counts[place])
        message = "sound at every position"
        if wrong:
            message = f"it {FAULTS[place]}, at {wrong} positions"
        yield Finding(name, not wrong, message, wrong, 0)
    message = "every token has a chance in its law"
    if census.impossible:
        message = (
            f"{census.impossible} tokens have probability 0 in the very law they are said to be "
            f"drawn from"
        )
    yield Finding("possible", not census.impossible, message, census.impossible, 0)


def steadiness(drafter: Drafter[Any], target: Target[Any]) -> Iterator[Finding]:
    """The draft is a function of the row's text and noise, not of other rows or rejected tokens.

    A drafter that is not deterministic would fail the other checks for the same cause, so they are
    left out then.
    """
    queue = requests(target, 7)
    K = max(drafter.draft_len, 1)
    alone: Record = {}
    for request in queue:
        alone |= drafts(target, drafter, [request], draft_len=K, rows=1)
    deterministic = _same(
        "deterministic",
        alone,
        [drafts(target, drafter, queue[:1], draft_len=K, rows=1)],
        "the same text and noise gave another draft: draw from `noise` only (no torch.rand, "
        "torch.multinomial, random or clock), so that a seed gives a text",
    )
    yield deterministic
    if not deterministic.passed:
        return
    yield _same(
        "batches",
        alone,
        [drafts(target, drafter, q, draft_len=K, rows=len(q)) for q in (queue, queue[::-1])],
        "a row's draft depends on the other rows of its batch, or on its place among them: "
        "it may use its own text, state and noise only",
    )
    yield _same(
        "admission",
        alone,
        [drafts(target, drafter, queue, draft_len=K, rows=2)],
        "where a request takes a row over from another, or joins while others run, its draft is "
        "not what it is in a batch of its own: `admit` must forget what the rows held before, and "
        "touch no other row",
    )
    yield _same(
        "rejection",
        alone,
        [_fresh(target, drafter, alone, queue, K)],
        "after some rounds a row's draft is not what a new row with the same text drafts: "
        "rejected tokens, or positions counted wrongly, live on in its state",
    )


def _same(name: str, one: Record, others: Sequence[Record], otherwise: str) -> Finding:
    share = max(differing(one, other) for other in others)
    few = 0.02  # in float32 a draw may fall on the other side of an edge
    if share <= few:
        return Finding(name, True, f"{len(one)} drafts compared", share, few)
    return Finding(name, False, f"{otherwise} ({share:.0%} of the drafts differ)", share, few)


def _fresh(
    target: Target[Any],
    drafter: Drafter[Any],
    record: Record,
    queue: Sequence[Request],
    draft_len: int,
) -> Record:
    """The recorded drafts once more, each by a row that is admitted with the whole text, in the
    same round's noise."""
    fresh: Record = {}

    def look(context: Context, noise: Noise, draft: Draft) -> None:
        key = int(context.batch.seed[0]), int(context.batch.round[0])
        fresh[key] = row_of(draft, 0, record[key].text)

    device = target.info.device
    params = {int(Batch.of([r.prompt], [r.params], [r.seed]).seed[0]): r.params for r in queue}
    for seed, number in [key for key in record if key[1] > 0][:40]:
        text = record[seed, number].text
        slots = len(text) + 2 * draft_len + 2
        batch = Batch.of([text], [params[seed]], [seed], slots=slots, device=device)
        batch = replace(batch, round=batch.round + number)
        watched = WatchedDrafter(drafter, look)
        state = decode.start(target, watched, batch, verifier=match, slots=slots)
        decode.admit(state, torch.arange(1, device=device))
        decode.step(state, draft_len)
    return fresh


def contract(
    drafter: Drafter[Any], target: Target[Any], rows: int, longest: int = LARGE
) -> Iterator[Finding]:
    """The checks of `specdiff.check.contract`, at the drafter's own draft length and the longest.

    A real target gets as many texts as are affordable, fewer of the longest drafts.
    """
    small = target.info.vocab_size <= 64
    scores = Scores(target.info.vocab_size)
    sampled = [p for p in PARAMS if p.temperature]
    own = max(drafter.draft_len, 1) if small else min(max(drafter.draft_len, 1), 8)
    for draft_len in sorted({own, longest} if drafter.draft_len else {own}):
        affordable = rows // 16 if draft_len == own else rows // 32
        count = rows if small else affordable
        # each length has draws of its own
        queue = requests(target, count, sampled, seed=5 + draft_len)
        size = rows if small else 8
        run(target, drafter, queue, scores.look, draft_len=draft_len, rows=size, verifier=token)
    yield from scores.findings()


def _laws(
    build: Build, verifiers: Mapping[str, Verifier], count: int, longest: int
) -> Iterator[Finding]:
    target = TableTarget.random(3, seed=4)
    drafter = build(target.info)
    for name, verifier in verifiers.items():
        yield of_the_target(f"law under {name}", target, drafter, verifier, count, longest)


def of_the_target(
    name: str,
    target: TableTarget,
    drafter: Drafter[Any],
    verifier: Verifier,
    count: int,
    longest: int = LARGE,
) -> Finding:
    """Monte Carlo through the real loop: do whole texts have the chances the target gives them?

    With short drafts and with long ones.
    """
    short = min(LAW_LEN, longest)
    long = min(LONG_LAW_LEN, longest)
    trials = [(params, short, count) for params in LAWS] + [(LONG_LAW, long, count // 2)]

    def fit(params: SamplingParams, draft_len: int, count: int) -> float:
        sample = texts(
            target, drafter, verifier, params, count=count, rows=count, draft_len=draft_len
        )
        return compare(sample, law(target, params))

    p_values = [fit(*trial) for trial in trials]
    p = min(p_values)
    params, draft_len, size = trials[p_values.index(p)]
    threshold = FALSE_ALARMS / len(trials)
    if p >= threshold:
        total = sum(size for _, _, size in trials)
        return Finding(name, True, f"{total} texts have the target's law (p-value)", p, threshold)
    message = (
        f"texts do not have the target's law (temperature {params.temperature}, top_k "
        f"{params.top_k}, draft_len {draft_len}: {size} texts of {params.max_tokens} tokens, "
        f"G-test p = {p:.1e}): decoding with it is not lossless"
    )
    return Finding(name, False, message, p, threshold)


def greedy(
    drafter: Drafter[Any], target: Target[Any], verifiers: Mapping[str, Verifier]
) -> Finding:
    """At temperature 0 every text is plain decoding's."""
    queue = requests(target, 4, [SamplingParams(max_tokens=16, temperature=0)])
    plain = written(target, NoDrafter(), queue, match)
    wrong = [
        name
        for name, verifier in verifiers.items()
        if written(target, drafter, queue, verifier) != plain
    ]
    if not wrong:
        return Finding("greedy", True, "at temperature 0 the tokens are plain decoding's")
    message = f"at temperature 0 the tokens are not plain decoding's under {', '.join(wrong)}"
    if target.info.dtype not in (torch.float32, torch.float64):
        message += "; in low precision near-ties do this, check in float32"
    return Finding("greedy", False, message)


class _Failing(DrafterWrapper[Any]):
    """`inner`, raising in every second round *after* it has drafted: the state is left as a fault
    would leave it."""

    def __init__(self, inner: Drafter[Any]) -> None:
        super().__init__(inner)
        self.calls = 0

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = self.inner.propose(context, state, noise, draft_len)
        self.calls += 1
        if self.calls % 2 == 0:
            raise DrafterError("failed, to see what happens")
        return draft


def survives(drafter: Drafter[Any], target: Target[Any]) -> Finding:
    """Rounds that fail become plain ones, and requests that join later are drafted for again."""
    queue = requests(target, 6)
    plain = written(target, NoDrafter(), queue, match)
    passed = written(target, _Failing(drafter), queue, match) == plain
    message = (
        "after a round in which it raised, the texts are not the target's own: its state does not "
        "survive that"
    )
    if passed:
        message = "rounds it fails in become plain ones, and later requests are drafted for"
    return Finding("faults", passed, message)
