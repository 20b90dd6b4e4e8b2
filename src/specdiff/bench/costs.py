"""Cost curves and acceptance: what a round costs, and how much of a draft is accepted.

Curves come from rounds of the real loop on random tokens, with widths taking turns, so that a
drafter is in its steady state: it has read the context, and two or three tokens are new. On a GPU
both roles wait for the device at every call here, and nowhere else.

Shapes: B rows, K drafted tokens, N = K + 1, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import decode
from specdiff.bench.baselines import OurDecoder, batch_of, without_faults
from specdiff.bench.experiment import Experiment, explain
from specdiff.bench.journal import FailureRecord
from specdiff.bench.metrics import Spread
from specdiff.bench.settings import Baseline
from specdiff.bench.suites import EncodedPrompt
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.noise import Noise
from specdiff.targets.base import Target, TargetWrapper
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetOutput, Verification
from specdiff.verify import Verifier, verifier

MARGIN = 128  # positions after a context in which its rounds take place


@dataclass(frozen=True, slots=True)
class TargetCost:
    """T_target(n): seconds of one scoring pass over n positions after `context` others."""

    context: int
    n: int
    seconds: Spread


@dataclass(frozen=True, slots=True)
class DraftCost:
    """T_draft(K): seconds of one draft of `draft_len` tokens after `context` committed ones."""

    baseline: str
    steps: int | None
    context: int
    draft_len: int
    seconds: Spread


@dataclass(frozen=True, slots=True)
class CostCurves:
    """The points of all contexts."""

    target: list[TargetCost]
    draft: list[DraftCost]


@dataclass(frozen=True, slots=True)
class CostRecord:
    """Points of the cost curves, at one context."""

    kind: ClassVar[str] = "cost"
    target: list[TargetCost] = field(default_factory=list)
    draft: list[DraftCost] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PositionCost:
    """Acceptance at one draft position, given that it was reached; `overlap` is the mean of
    1 - TV(p, q)."""

    reached: int
    accepted: int
    acceptance: float | None
    overlap: float | None


@dataclass(frozen=True, slots=True)
class Conditional:
    """Acceptance by position next to its expectation, under one setting of a baseline."""

    kind: ClassVar[str] = "conditional"
    baseline: str
    draft_len: int | str | None
    steps: int | None
    temperature: float
    verifier: str
    positions: list[PositionCost]


class RepeatDrafter(Drafter[None]):
    """Drafts one token over and over: the cheapest way to have K + 1 positions scored."""

    def open(self, rows: int, slots: int) -> None:
        return None

    def admit(self, state: None, context: Context, rows: Int[Tensor, "R"]) -> None:
        return None

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return Draft(context.batch.anchor[:, None].expand(-1, draft_len).contiguous())

    def release(self, state: None, rows: Int[Tensor, "R"]) -> None:
        return None


class WaitingTarget(TargetWrapper[Any]):
    """A target that waits for the device after every pass, so that the host's clock times it."""

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        torch.cuda.synchronize(self.info.device)
        return output


class WaitingDrafter(DrafterWrapper[Any]):
    """A drafter that waits for the device after every draft."""

    def __init__(self, inner: Drafter[Any], device: torch.device) -> None:
        super().__init__(inner)
        self.device = device

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = self.inner.propose(context, state, noise, draft_len)
        torch.cuda.synchronize(self.device)
        return draft


def reachable(contexts: Sequence[int], positions: int) -> list[int]:
    """The contexts that fit the model; its own limit replaces those that do not."""
    room = positions - MARGIN
    fits = [c for c in contexts if c <= room]
    if len(fits) == len(contexts) or room < 2 or room in fits:
        return fits
    return [*fits, room]


@dataclass(slots=True)
class StageSeconds:
    """Seconds of repeated rounds, by stage."""

    draft: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)


def round_seconds(
    target: Target[Any],
    drafter: Drafter[Any],
    context: int,
    draft_lens: Sequence[int],
    times: int,
    seed: int,
) -> dict[int, StageSeconds]:
    """Seconds of `times` rounds by draft length, after two warm-up rounds each.

    When the margin is used up, decoding starts again, with one round to warm up.
    """
    info = target.info
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(info.vocab_size, (context,), generator=generator).tolist()
    params = SamplingParams(max_tokens=min(MARGIN, info.max_positions - context))
    if info.device.type == "cuda":
        target = WaitingTarget(target)
        drafter = WaitingDrafter(drafter, info.device)
    slots = context + MARGIN + max(draft_lens) + 1
    rounds = {k: StageSeconds() for k in draft_lens}
    state: decode.DecodeState | None = None
    for i in range(times + 2):
        for k in draft_lens:
            if state is None or bool(state.batch.done.all()):
                batch = Batch.of([prompt], [params], [seed], slots=slots, device=info.device)
                state = decode.start(target, drafter, batch, slots=slots)
                decode.admit(state, torch.arange(1, device=info.device))
                decode.raise_if_failed(decode.step(state, k))
            last = decode.step(state, k)
            decode.raise_if_failed(last)
            if i >= 2:
                rounds[k].draft.append(last.seconds["draft"])
                rounds[k].score.append(last.seconds["score"])
    return rounds


def target_cost(experiment: Experiment, context: int, times: int) -> CostRecord | FailureRecord:
    """One context's T_target(n)."""
    settings = experiment.settings
    lengths = [n - 1 for n in settings.scored]
    target = experiment.lm.target
    try:
        rounds = round_seconds(target, RepeatDrafter(), context, lengths, times, settings.seed)
    except Exception as error:  # the other units still run
        return FailureRecord(explain(error, 1))
    points = [TargetCost(context, k + 1, Spread.of(s.score)) for k, s in rounds.items()]
    return CostRecord(target=points)


def draft_cost(
    experiment: Experiment, baseline: Baseline, context: int, steps: int | None, times: int
) -> CostRecord | FailureRecord:
    """One context's T_draft(K) of a baseline, at `steps` network passes per draft."""
    settings = experiment.settings
    lengths = [n for n in settings.widths if n > 1]
    target = experiment.lm.target
    decoder = _decoder(experiment, baseline)
    try:
        with without_faults():
            drafter = decoder.drafter(steps)
            rounds = round_seconds(target, drafter, context, lengths, times, settings.seed)
    except Exception as error:
        return FailureRecord(explain(error, 1))
    points = [
        DraftCost(baseline.name, steps, context, k, Spread.of(s.draft)) for k, s in rounds.items()
    ]
    return CostRecord(draft=points)


def _decoder(experiment: Experiment, baseline: Baseline) -> OurDecoder:
    decoder = experiment.decoders[baseline.name]
    assert isinstance(decoder, OurDecoder)
    return decoder


@dataclass(slots=True)
class OverlapCounter:
    """A verifier that counts, per draft position: reached, accepted, and 1 - TV(p, q).

    Under `token` the mean of the last is the acceptance but for sampling error: the chance to
    accept a position that is reached is its overlap.
    """

    inner: Verifier
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)

    def __call__(self, draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
        verification = self.inner(draft, p, noise)
        K = draft.tokens.shape[1]
        if K:
            shared = overlaps(draft, p[:, :K]).tolist()
            sizes = draft.sizes.tolist()
            counts = verification.accepted.tolist()
            for row, (size, n) in enumerate(zip(sizes, counts, strict=True)):
                for k in range(min(size, n + 1)):
                    self._count(k, k < n, shared[row][k])
        return verification

    def _count(self, k: int, accepted: bool, shared: float) -> None:
        missing = k + 1 - len(self.reached)
        self.reached += [0] * missing
        self.accepted += [0] * missing
        self.overlap += [0.0] * missing
        self.reached[k] += 1
        self.accepted[k] += accepted
        self.overlap[k] += shared

    def positions(self) -> list[PositionCost]:
        """One entry per draft position."""
        rows = zip(self.reached, self.accepted, self.overlap, strict=True)
        return [PositionCost(n, accepted, accepted / n, sums / n) for n, accepted, sums in rows]


def overlaps(draft: Draft, p: Float[Tensor, "B K V"]) -> Float[Tensor, "B K"]:
    """sum min(p, q) = 1 - TV(p, q) of each drafted position; p(token) for point masses."""
    if draft.probs is None:
        return p.gather(2, draft.tokens[..., None])[..., 0]
    own = p if draft.columns is None else p[..., draft.columns]
    return torch.minimum(own, draft.probs.to(p.dtype)).sum(-1)


def acceptance(
    target: Target[Any],
    drafter: Drafter[Any],
    batches: Iterable[Batch],
    verifier: Verifier,
    draft_len: int | None,
) -> list[PositionCost]:
    """Acceptance by position, over all batches."""
    counter = OverlapCounter(verifier)
    for batch in batches:
        for _ in decode.decode(target, drafter, batch, verifier=counter, draft_len=draft_len):
            pass
    return counter.positions()


def conditional(
    experiment: Experiment,
    baseline: Baseline,
    temperature: float,
    prompts: Sequence[EncodedPrompt],
) -> Conditional | FailureRecord:
    """Acceptance of a baseline at its best setting, under `token`. Untimed."""
    cell = experiment.cell("conditional", baseline, temperature, 1)
    target = experiment.lm.target
    decoder = _decoder(experiment, baseline)
    batches = (
        batch_of(experiment.workload([p], temperature, seed=i), target.info.device)
        for i, p in enumerate(prompts)
    )
    length = cell.draft_len if isinstance(cell.draft_len, int) else None
    try:
        with without_faults():
            drafter = decoder.drafter(cell.steps)
            positions = acceptance(target, drafter, batches, verifier("token"), length)
    except Exception as error:
        return FailureRecord(explain(error, 1))
    return Conditional(baseline.name, cell.draft_len, cell.steps, temperature, "token", positions)
