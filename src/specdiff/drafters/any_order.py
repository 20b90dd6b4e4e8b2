"""SEDD's own sampler as a drafter: T steps of the reverse process, tokens settling in any order.

The paper's text stores each token's probabilities when it is drawn and verifies with them. That is
not exact here: they depend on tokens to the right, so they are not P(x_k | x_<k, ...), and the text
comes out biased by several percent. The draft consists of point masses instead, which are valid
whatever the order: token k is accepted with probability p_k(x_k).

Shapes: B rows, K drafted positions, V states of the process.
"""

from typing import Any, Generic, Protocol, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from specdiff.diffusion import reverse
from specdiff.diffusion.process import Process
from specdiff.diffusion.schedule import Schedule
from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import checked_temperature
from specdiff.errors import UsageError
from specdiff.noise import Noise, Purpose
from specdiff.sampling import probabilities
from specdiff.types import Context, Draft, tempered

ScorerState = TypeVar("ScorerState")


class Scorer(Protocol[ScorerState]):
    """A process's score network: ratios of each other token's probability to the present one's."""

    process: Process
    schedule: Schedule
    draft_len: int
    taps: tuple[int, ...]

    def open(self, rows: int, slots: int) -> ScorerState: ...

    def admit(self, state: ScorerState, context: Context, rows: Int[Tensor, "R"]) -> None: ...

    def release(self, state: ScorerState, rows: Int[Tensor, "R"]) -> None: ...

    def start(self, context: Context, draft_len: int) -> Float[Tensor, "B"]:
        """The time at which the expected share of noise is that of a fresh canvas after the
        committed tokens in view."""

    def log_score(
        self,
        context: Context,
        state: ScorerState,
        canvas: Int[Tensor, "B K"],
        sigma: Float[Tensor, "B"],
    ) -> Float[Tensor, "B K V"]: ...


class AnyOrderDrafter(Drafter[Any], Generic[ScorerState]):
    """K tokens in `steps` (T) network passes by the `sampler`, "analytic" or "euler".

    The last pass is the closing one. The request's sampling parameters, sharpened or flattened by
    `draft_temperature`, shape each token where it is drawn for good. The committed tokens stay as
    they are (projection). Raises UsageError for an option out of range.
    """

    def __init__(
        self,
        scorer: Scorer[ScorerState],
        *,
        steps: int = 1,
        sampler: str = "analytic",
        draft_temperature: float = 1.0,
    ) -> None:
        if steps < 1:
            raise UsageError(f"steps must be at least 1, not {steps}")
        if sampler not in reverse.SAMPLERS:
            samplers = ", ".join(reverse.SAMPLERS)
            raise UsageError(f"unknown sampler {sampler!r}; known are {samplers}")
        self.scorer = scorer
        self.steps = steps
        self.sampler = sampler
        self.draft_temperature = checked_temperature(draft_temperature)
        self.taps = scorer.taps
        self.draft_len = scorer.draft_len

    def open(self, rows: int, slots: int) -> ScorerState:
        return self.scorer.open(rows, slots)

    def admit(self, state: ScorerState, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.scorer.admit(state, context, rows)

    def release(self, state: ScorerState, rows: Int[Tensor, "R"]) -> None:
        self.scorer.release(state, rows)

    def propose(self, context: Context, state: ScorerState, noise: Noise, draft_len: int) -> Draft:
        """Every pass draws with its own uniforms; the draft has no probabilities, on purpose."""
        params = tempered(context.batch.params, self.draft_temperature)
        free = context.batch.ids.new_ones(len(context.batch.length), draft_len).bool()
        tokens = reverse.sample(
            lambda canvas, sigma: self.scorer.log_score(context, state, canvas, sigma),
            self.scorer.process,
            self.scorer.schedule,
            free.long(),
            free,
            self.steps,
            lambda i: noise.uniform(Purpose.DRAFT, draft_len, index=i),
            start=self.scorer.start(context, draft_len),
            sampler=self.sampler,
            shape=lambda clean: probabilities(clean.log(), params),
        )
        return Draft(tokens)
