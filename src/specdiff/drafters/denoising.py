"""Drafting with a denoiser: the exact orders in which a canvas of MASK becomes K tokens.

Written once for every denoiser. Only orders that fix positions left to right between network passes
are here: with any other order the probabilities stored at draw time are not the distribution
P(x_k | x_<k, R_k) that the ratio test needs. (`any_order` drafts point masses instead.)

Shapes: B rows, K drafted positions, C columns (V, the target's vocabulary, or a draft vocabulary).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter, temperatures
from specdiff.drafters.hot_start import DraftHistory, HotStart
from specdiff.errors import UsageError
from specdiff.logits_processors import reachable
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw_tokens
from specdiff.types import Context, Draft, Params, tempered

DenoiserState = TypeVar("DenoiserState")
ORDERS = ("one-shot", "left-to-right")


class Denoiser(Protocol[DenoiserState]):
    """A network that maps a partly revealed canvas to logits of the clean tokens.

    Subclass it, set `mask_id` and implement `denoise`; the other methods are a drafter's, with the
    same defaults. `draft_len`, `taps` and `keeps_features` are a drafter's
    too.
    """

    # the token of a position not yet revealed; None: the process's noise is no token of its own
    mask_id: int | None
    draft_len: int = 8
    taps: tuple[int, ...] = ()
    keeps_features: bool = False
    # the ascending target ids that its logits are of; None: all of them
    columns: Int[Tensor, "C"] | None = None

    def open(self, rows: int, slots: int) -> DenoiserState:
        """State for `rows` rows of at most `slots` positions. By default None."""
        return cast(DenoiserState, None)

    def admit(self, state: DenoiserState, context: Context, rows: Int[Tensor, "R"]) -> None:
        """Forget what `rows` held before. By default nothing is done."""
        return None

    def release(self, state: DenoiserState, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left. By default nothing is done."""
        return None

    @abstractmethod
    def denoise(
        self,
        context: Context,
        state: DenoiserState,
        canvas: Int[Tensor, "B K"],
        revealed: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "B K C"]:
        """Logits of every canvas position, which hold `mask_id` unless `revealed`.

        C is V, or the number of `columns`.
        """


@dataclass(slots=True)
class HotState:
    """The denoiser's own state, and the last drafts; without a hot start it is the former alone."""

    inner: Any
    history: DraftHistory


class DenoisingDrafter(Drafter[Any], Generic[DenoiserState]):
    """K tokens in `steps` (T) network passes.

    one-shot: T = 1, positions independent. left-to-right: the K positions form T contiguous groups,
    one pass each, and later groups see what earlier ones drew. `draft_temperature` sharpens or
    flattens what is drawn *and* verified (0: greedy drafts, point masses); always lossless, it only
    moves the acceptance rate. `hot_start`: the weight of the last draft's predictions, or "canvas"
    to keep its confident tokens (see `hot_start.py`).
    """

    def __init__(
        self,
        denoiser: Denoiser[DenoiserState],
        *,
        steps: int = 1,
        order: str | None = None,
        draft_temperature: float = 1.0,
        hot_start: float | str = 0.0,
    ) -> None:
        order = order or ("one-shot" if steps == 1 else "left-to-right")
        if order not in ORDERS:
            raise UsageError(f"unknown order {order!r}; known are {', '.join(ORDERS)}")
        if steps < 1:
            raise UsageError(f"steps must be at least 1, not {steps}")
        if order == "one-shot" and steps != 1:
            raise UsageError(
                f"order 'one-shot' is one network pass; steps={steps} needs order 'left-to-right'"
            )
        if denoiser.mask_id is None:
            raise UsageError(
                f"order {order!r} reveals MASK tokens, and a drafter of the uniform process has "
                f"none; it takes order 'any'"
            )
        self.mask_id = denoiser.mask_id
        self.denoiser = denoiser
        self.steps = steps
        self.draft_temperature = checked_temperature(draft_temperature)
        self.temperatures = temperatures(draft_temperature)
        self.hot_start = HotStart.of(hot_start)
        self.taps = denoiser.taps
        self.keeps_features = denoiser.keeps_features
        self.draft_len = denoiser.draft_len

    def open(self, rows: int, slots: int) -> Any:
        inner = self.denoiser.open(rows, slots)
        history = self.hot_start.history(rows)
        return inner if history is None else HotState(inner, history)

    def admit(self, state: Any, context: Context, rows: Int[Tensor, "R"]) -> None:
        inner, history = _parts(state)
        self.denoiser.admit(inner, context, rows)
        if history is not None:
            history.forget(rows)

    def release(self, state: Any, rows: Int[Tensor, "R"]) -> None:
        self.denoiser.release(_parts(state)[0], rows)

    def resume(
        self, state: Any, earlier: Any, rows: Int[Tensor, "R"], sources: Int[Tensor, "R"]
    ) -> None:
        if isinstance(state, HotState):
            state.history.resume(earlier.history, rows, sources)

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        """One pass a group; every token is drawn from exactly its row of `probs`.

        Where all rows are greedy, the tokens are point masses.

        A group's penalties count the tokens of earlier groups, not of its own: those are drawn at
        once, and q is what they were drawn from.
        """
        params = tempered(context.batch.params, self.draft_temperature)
        batch = replace(context.batch, params=params)
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        canvas = uniform.new_full(uniform.shape, self.mask_id, dtype=torch.long)
        position = torch.arange(draft_len, device=canvas.device)
        probs: list[Tensor | None] = []
        predictions: list[Tensor] = []
        columns = self.denoiser.columns
        inner, history = _parts(state)
        tail = None if history is None else history.tail(context, draft_len)
        if tail is not None:
            canvas = torch.where(tail.mask, tail.tokens, canvas)
        first = 0
        for group in position.tensor_split(min(self.steps, draft_len)):
            revealed = (position < first).expand_as(canvas)
            if tail is not None:
                revealed = revealed | tail.mask
            logits = self.denoiser.denoise(context, inner, canvas, revealed)
            logits = logits[:, group]
            if tail is not None:
                logits = tail.mixed(logits, group)
            earlier = canvas[:, :first]
            tokens, q = draw_tokens(logits, batch, earlier, uniform[:, group], columns)
            if tail is not None:
                tokens, q = tail.keep(tokens, q, group, columns)
            canvas = canvas.index_copy(1, group, tokens)
            probs.append(q)
            predictions.append(logits)
            first += len(group)
        if history is not None:
            history.store(batch, canvas, torch.cat(predictions, dim=1), columns, tail)
        return drafted(canvas, probs, params, columns)


def _parts(state: Any) -> tuple[Any, DraftHistory | None]:
    if isinstance(state, HotState):
        return state.inner, state.history
    return state, None


def checked_temperature(draft_temperature: float) -> float:
    """The draft temperature itself. Raises UsageError unless it is finite and not negative."""
    if not 0 <= draft_temperature < float("inf"):
        raise UsageError(f"draft_temperature must be a finite number >= 0, not {draft_temperature}")
    return draft_temperature


def drafted(
    tokens: Int[Tensor, "B K"],
    probs: Sequence[Float[Tensor, "B N C"] | None],
    params: Params,
    columns: Int[Tensor, "C"] | None,
) -> Draft:
    """The draft of tokens that `draw_tokens` drew, from its probabilities in turn.

    Its size is 0 in rows whose allowed ids leave no column.
    """
    size = None
    if columns is not None and "allowed_token_ids" in params.active:
        size = reachable(params, columns).long() * tokens.shape[1]
    soft = [q for q in probs if q is not None]
    if not soft:
        return Draft(tokens, None, size)
    return Draft(tokens, torch.cat(soft, dim=1), size, columns=columns)
