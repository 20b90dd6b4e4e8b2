"""A drafter with sampling parameters of its own, for targets that other means than these shape."""

from dataclasses import replace
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.noise import Noise
from specdiff.types import Context, Draft, Params, tempered

State = TypeVar("State")


class ParamsDrafter(DrafterWrapper[State]):
    """`inner`, which sees `params` (one entry for each row) in place of its batch's.

    The draft temperature of a round applies to them as well.

    Its drafts are then closer to the target. The output does not depend on them: the drafter
    reports the distribution that its tokens were drawn from, as always.
    """

    def __init__(self, inner: Drafter[State], params: Params) -> None:
        super().__init__(inner)
        self.params = params

    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.inner.admit(state, self._with_params(context), rows)

    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        return self.inner.propose(self._with_params(context), state, noise, draft_len)

    def _with_params(self, context: Context) -> Context:
        factor = 1.0 if context.plan is None else context.plan.temperature
        params = tempered(self.params, factor)
        return replace(context, batch=replace(context.batch, params=params))
