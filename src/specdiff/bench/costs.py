"""What a round costs, and what a position is worth: cost curves against context, and acceptance beside 1 - TV(p, q).

Curves come from rounds of the real loop on random tokens, widths taking turns, so that a drafter is in its steady state: it has
read the context, and two or three tokens are new. On a GPU both roles wait for the device at every call here (nowhere else).

Shapes: B rows, K drafted tokens, N = K + 1, V vocabulary.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff import decode
from specdiff.bench.waiting import WaitingDrafter, WaitingTarget
from specdiff.drafters.base import Drafter
from specdiff.noise import Noise
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, Draft, SamplingParams, Verification
from specdiff.verify import Verifier

MARGIN = 128  # positions beyond a context in which its rounds take place


class Blank(Drafter[None]):
    """Drafts one token over and over: the cheapest way to have the target score K + 1 positions."""

    def open(self, rows: int, slots: int) -> None:
        return None

    def admit(self, state: None, context: Context, rows: Int[Tensor, "R"]) -> None:
        return None

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return Draft(context.batch.anchor[:, None].expand(-1, draft_len).contiguous())

    def release(self, state: None, rows: Int[Tensor, "R"]) -> None:
        return None


def reachable(contexts: Sequence[int], positions: int) -> list[int]:
    """The contexts that fit the model; where the longest does not, the model's own reach stands in for it."""
    room = positions - MARGIN
    fits = [c for c in contexts if c <= room]
    return fits if len(fits) == len(contexts) or room < 2 or room in fits else [*fits, room]


def round_seconds(
    target: Target[Any],
    drafter: Drafter[Any],
    context: int,
    draft_lens: Sequence[int],
    times: int,
    seed: int,
) -> dict[int, dict[str, list[float]]]:
    """{K: {"draft": seconds, "score": seconds}} of `times` rounds each, after two that warm up; fewer where the margin is used up."""
    info = target.info
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(info.vocab_size, (context,), generator=generator).tolist()
    room = min(MARGIN, info.max_positions - context)
    found: dict[int, dict[str, list[float]]] = {k: {"draft": [], "score": []} for k in draft_lens}
    watched = (
        (WaitingTarget(target), WaitingDrafter(drafter, info.device))
        if info.device.type == "cuda"
        else (target, drafter)
    )
    slots = context + MARGIN + max(draft_lens) + 1
    run: decode.DecodeState | None = None
    for i in range(times + 2):
        for k in draft_lens:
            if run is None or bool(
                run.batch.done.all()
            ):  # the margin is used up: begin again, one round to warm up
                batch = Batch.of(
                    [prompt],
                    [SamplingParams(max_tokens=room)],
                    [seed],
                    slots=slots,
                    device=info.device,
                )
                run = decode.start(*watched, batch, slots=slots)
                decode.admit(run, torch.arange(1, device=info.device))
                decode.raise_if_failed(decode.step(run, k))
            last = decode.step(run, k)
            decode.raise_if_failed(last)
            seconds = last.seconds
            if i >= 2:
                found[k]["draft"].append(seconds["draft"])
                found[k]["score"].append(seconds["score"])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def target_curve(
    target: Target[Any], context: int, widths: Sequence[int], times: int, seed: int
) -> Iterator[dict[str, Any]]:
    """T_target(n): seconds of one scoring pass over n positions behind `context` others."""
    found = round_seconds(target, Blank(), context, [n - 1 for n in widths], times, seed)
    return (
        {"context": context, "n": k + 1, "seconds": spread(s["score"])} for k, s in found.items()
    )


def draft_curve(
    target: Target[Any],
    drafter: Drafter[Any],
    context: int,
    draft_lens: Sequence[int],
    times: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """T_draft(gamma): seconds of one draft of gamma tokens behind `context` committed ones."""
    found = round_seconds(target, drafter, context, draft_lens, times, seed)
    return (
        {"context": context, "draft_len": k, "seconds": spread(s["draft"])}
        for k, s in found.items()
    )


@dataclass(slots=True)
class Overlap:
    """A verifier that also counts, for each draft position that was reached: how often, how often kept, and the mean of 1 - TV(p, q).

    Under `token` the last two agree but for sampling error: the chance to accept a position that is reached is its overlap.
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
            for row, (size, n) in enumerate(
                zip(sizes, verification.accepted.tolist(), strict=True)
            ):
                for k in range(min(size, n + 1)):
                    self._count(k, k < n, shared[row][k])
        return verification

    def _count(self, k: int, kept: bool, shared: float) -> None:
        missing = k + 1 - len(self.reached)
        self.reached += [0] * missing
        self.accepted += [0] * missing
        self.overlap += [0.0] * missing
        self.reached[k] += 1
        self.accepted[k] += kept
        self.overlap[k] += shared

    def positions(self) -> list[dict[str, Any]]:
        """One entry a draft position."""
        rows = zip(self.reached, self.accepted, self.overlap, strict=True)
        return [
            {"reached": n, "accepted": a, "acceptance": a / n, "overlap": o / n} for n, a, o in rows
        ]


def overlaps(draft: Draft, p: Float[Tensor, "B K V"]) -> Float[Tensor, "B K"]:
    """sum min(p, q) = 1 - TV(p, q) of each drafted position; p of the token itself where the draft is a point mass."""
    if draft.probs is None:
        return p.gather(2, draft.tokens[..., None])[..., 0]
    return torch.minimum(p, draft.probs.to(p.dtype)).sum(-1)


def conditional(
    target: Target[Any],
    drafter: Drafter[Any],
    batches: Sequence[Batch],
    verifier: Verifier,
    draft_len: int | None,
) -> list[dict[str, Any]]:
    """The positions of `draft_len`, over all batches."""
    counting = Overlap(verifier)
    for batch in batches:
        for _ in decode.decode(target, drafter, batch, verifier=counting, draft_len=draft_len):
            pass
    return counting.positions()
