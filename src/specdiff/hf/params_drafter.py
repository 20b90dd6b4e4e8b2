"""A drafter that is told what a request asks, where the target's law is made by other means than sampling parameters."""

from dataclasses import replace
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.noise import Noise
from specdiff.types import Context, Draft, Params

State = TypeVar("State")


class ParamsDrafter(Drafter[State]):
    """`drafter`, which sees `params` (one entry a row of the batch) as its batch's. It drafts closer to the target then; what it
    hands on is the law its tokens were drawn from, as ever, so nothing else depends on them."""

    def __init__(self, drafter: Drafter[State], params: Params) -> None:
        self.drafter, self.params = drafter, params
        self.taps, self.draft_len = drafter.taps, drafter.draft_len

    def open(self, rows: int, slots: int) -> State:
        return self.drafter.open(rows, slots)

    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.drafter.admit(state, self._asked(context), rows)

    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        return self.drafter.propose(self._asked(context), state, noise, draft_len)

    def release(self, state: State, rows: Int[Tensor, "R"]) -> None:
        self.drafter.release(state, rows)

    def _asked(self, context: Context) -> Context:
        return replace(context, batch=replace(context.batch, params=self.params))
