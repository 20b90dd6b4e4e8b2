"""Both roles, waiting for the device at every call: the loop's host clock then tells the device's time. For cost curves only."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.noise import Noise
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, Draft, TargetOutput, Verification


class WaitingTarget(Target[Any]):
    """`inner`, its scoring passes timed whole."""

    def __init__(self, inner: Target[Any]) -> None:
        self.inner, self.info = inner, inner.info

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Any:
        return self.inner.open(rows, slots, taps)

    def admit(
        self,
        cache: Any,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        kept: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        return self.inner.admit(cache, rows, prompts, kept)

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        torch.cuda.synchronize(self.info.device)
        return output

    def keep(self, cache: Any, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache, batch, verification)

    def release(self, cache: Any, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache, rows)


class WaitingDrafter(Drafter[Any]):
    """`inner`, its drafts timed whole and nothing else with them."""

    def __init__(self, inner: Drafter[Any], device: torch.device) -> None:
        self.inner, self.device = inner, device
        self.taps, self.draft_len = inner.taps, inner.draft_len

    def open(self, rows: int, slots: int) -> Any:
        return self.inner.open(rows, slots)

    def admit(self, state: Any, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.inner.admit(state, context, rows)

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = self.inner.propose(context, state, noise, draft_len)
        torch.cuda.synchronize(self.device)
        return draft

    def release(self, state: Any, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(state, rows)
