"""A drafter that may fail: its faults cost a draft, never the text or its distribution.

What may be inspected decides what stays exact. A row's draft is cut before probabilities that are
no distribution: that depends on nothing drawn from them, and the tokens before keep their own q. It
is also cut before a token outside the vocabulary, which the target never emits. A drafter that
raises, or whose draft cannot be read (its shape, type, layout or device; a tree that it has not
announced), makes the round a plain one. Either way drafting is disabled for the row until its next
request; falling back to `match` after inspecting the tokens would be biased.

Shapes: B rows, K drafted tokens.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.errors import DrafterError, UsageError
from specdiff.noise import Noise
from specdiff.types import Batch, Context, Draft, column_index

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 has no arithmetic
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TOLERANCE = 1e-3  # how far from 1 the probabilities may sum: float16 rounds that much
FAULTS = (
    "",
    "drafted a token outside the target's vocabulary",
    "gave probabilities that are no distribution (NaN, infinite, negative, or not summing to 1)",
    "gave a draft size below 0 or above its own length",
    "drafted a token outside its own columns",
    "gave columns that are not ascending ids of the target's vocabulary",
    "gave a node a parent that does not come before it",
)


@dataclass(slots=True)
class GuardedState:
    """The inner state, and the rows whose drafting is disabled (`off`).

    `consumed`: the last propose read its features, or they are lost, and its rows are off.
    `news` (the last round's worst fault; whether every running row is off) stays on the device
    until the next propose: by then the loop has waited for the round's tokens, and reading it waits
    for nothing more.
    """

    inner: Any
    off: Bool[Tensor, "B"]
    news: Int[Tensor, "2"] | None = None
    disabled: bool = False
    consumed: bool = True
    warned: bool = False


class GuardedDrafter(Drafter[GuardedState]):
    """`inner`, watched: a valid drafter's tokens and probabilities pass unchanged.

    Warns once a run, naming drafter and fault. A UsageError is raised: the caller can fix it. So is
    anything that is not an Exception, like an interrupt.
    """

    def __init__(self, inner: Drafter[Any], vocab_size: int) -> None:
        self.inner = inner
        self.vocab_size = vocab_size
        self.taps = inner.taps
        self.draft_len = inner.draft_len
        self.keeps_features = inner.keeps_features
        self.branches = inner.branches
        self.temperatures = inner.temperatures
        self.reproducible = inner.reproducible
        self.trees = inner.trees

    def open(self, rows: int, slots: int) -> GuardedState:
        return GuardedState(self.inner.open(rows, slots), torch.zeros(rows, dtype=torch.bool))

    def admit(self, state: GuardedState, context: Context, rows: Int[Tensor, "R"]) -> None:
        self._read(state)
        state.off = state.off.to(rows.device).index_fill(0, rows, False)
        state.disabled = False
        try:
            self.inner.admit(state.inner, context, rows)
        except UsageError:
            raise
        except Exception as error:
            state.off = state.off.index_fill(0, rows, True)
            self._warn(state, f"raised {type(error).__name__} as requests joined: {error}", error)

    def release(self, state: GuardedState, rows: Int[Tensor, "R"]) -> None:
        try:
            self.inner.release(state.inner, rows)
        except Exception as error:  # the rows' requests are answered: nothing is lost
            self._warn(state, f"raised {type(error).__name__} as requests left: {error}", error)

    def resume(
        self,
        state: GuardedState,
        earlier: GuardedState,
        rows: Int[Tensor, "R"],
        sources: Int[Tensor, "R"],
    ) -> None:
        """`rows` continue from an earlier state: disabled rows stay so, and no warning repeats."""
        self._read(earlier)
        off = earlier.off.to(rows.device)
        state.off = state.off.to(rows.device).index_copy(0, rows, off[sources])
        state.warned = earlier.warned
        try:
            self.inner.resume(state.inner, earlier.inner, rows, sources)
        except Exception as error:
            state.off = state.off.index_fill(0, rows, True)
            self._warn(state, f"raised {type(error).__name__} as requests went on: {error}", error)

    def propose(self, context: Context, state: GuardedState, noise: Noise, draft_len: int) -> Draft:
        self._read(state)
        state.consumed = True
        if state.disabled:
            state.off = torch.ones_like(context.batch.done)  # idle rows miss their features too
            return Draft.empty(context.batch)
        try:
            draft = self.inner.propose(context, state.inner, noise, draft_len)
            state.consumed = self.inner.consumed(state.inner)
            shaped(draft, context.batch, draft_len, self.vocab_size, trees=self.trees)
            if not draft.tokens.shape[1]:
                return Draft.empty(context.batch)
            return self._sound(context.batch, state, draft)
        except UsageError:
            raise
        except Exception as error:
            state.off = torch.ones_like(context.batch.done)
            state.disabled = True
            state.consumed = True
            own = isinstance(error, DrafterError)
            fault = str(error) if own else f"raised {type(error).__name__}: {error}"
            self._warn(state, fault, error)
            return Draft.empty(context.batch)

    def consumed(self, state: GuardedState) -> bool:
        return state.consumed

    def _sound(self, batch: Batch, state: GuardedState, draft: Draft) -> Draft:
        """The draft, each row cut before its first fault."""
        fault = faults(draft, self.vocab_size)
        off = state.off.to(fault.device)
        size = draft.sizes.long()
        sound = (fault == 0).long().cumprod(1).sum(1)
        worst = torch.where(batch.done | off, 0, fault.amax(1))
        size = torch.where(off, 0, sound.clamp(max=size).clamp(min=0))
        # tokens after the cut do not count, but the target still looks up their embeddings
        last = self.vocab_size - 1
        columns = None if draft.columns is None else draft.columns.clamp(0, last)
        draft = replace(draft, tokens=draft.tokens.clamp(0, last), size=size, columns=columns)
        if draft.parents is not None:
            node = torch.arange(draft.tokens.shape[1], device=size.device)
            draft = replace(draft, parents=torch.minimum(draft.parents.clamp(min=-1), node - 1))
        state.off = off | (worst > 0)
        state.news = torch.stack([worst.amax(), (state.off | batch.done).all().long()])
        return draft

    def _read(self, state: GuardedState) -> None:
        if state.news is not None:
            worst, disabled = state.news.tolist()
            state.news = None
            state.disabled = bool(disabled)
            if worst:
                self._warn(state, FAULTS[worst], None)

    def _warn(self, state: GuardedState, fault: str, cause: Exception | None) -> None:
        if not state.warned:
            state.warned = True
            warning = RuntimeWarning(
                f"the drafter {type(self.inner).__name__} {fault}; drafting is disabled until the "
                f"row's next request; decoding continues and the output distribution is unchanged"
            )
            warning.__cause__ = cause
            warnings.warn(warning, stacklevel=2)


def shaped(
    draft: Draft, batch: Batch, draft_len: int, vocab_size: int, *, trees: bool = False
) -> None:
    """Raises DrafterError for what is no draft of this batch.

    Checks all that can be checked without waiting for the device.
    """
    if not isinstance(draft, Draft):
        raise DrafterError(f"returned a {type(draft).__name__}, not a Draft")
    if draft.parents is not None and not trees:
        raise DrafterError(
            "drafted a tree (Draft.parents) without announcing it; set `trees = True` on the "
            "drafter, or draft a chain"
        )
    rows = len(batch.length)
    home = batch.ids.device
    tensors = {
        "tokens": draft.tokens,
        "probabilities": draft.probs,
        "a size": draft.size,
        "columns": draft.columns,
        "parents": draft.parents,
    }
    for name, part in tensors.items():
        if part is not None and part.layout is not torch.strided:
            raise DrafterError(f"gave {name} of layout {part.layout}, not dense")
        if part is not None and part.device != home:
            raise DrafterError(f"gave {name} on {part.device}; the batch is on {home}")
    if draft.tokens.dim() != 2 or len(draft.tokens) != rows or draft.tokens.shape[1] > draft_len:
        raise DrafterError(
            f"gave tokens of shape {list(draft.tokens.shape)}; "
            f"expected [{rows}, at most {draft_len}]"
        )
    if draft.tokens.dtype != torch.long:
        raise DrafterError(f"gave tokens of type {draft.tokens.dtype}, not torch.int64")
    shape = (*draft.tokens.shape, _width(draft, vocab_size))
    if draft.probs is not None and (draft.probs.shape != shape or draft.probs.dtype not in FLOATS):
        raise DrafterError(
            f"gave probabilities of shape {list(draft.probs.shape)} and type {draft.probs.dtype}; "
            f"expected floats {list(shape)}"
        )
    if draft.parents is not None and (
        draft.parents.shape != draft.tokens.shape or draft.parents.dtype != torch.long
    ):
        raise DrafterError(
            f"gave parents of shape {list(draft.parents.shape)} and type {draft.parents.dtype}; "
            f"expected torch.int64 {list(draft.tokens.shape)}"
        )
    if draft.size is not None and (draft.size.shape != (rows,) or draft.size.dtype not in INTEGERS):
        raise DrafterError(
            f"gave a size of shape {list(draft.size.shape)} and type {draft.size.dtype}; "
            f"expected integers [{rows}]"
        )


def _width(draft: Draft, vocab_size: int) -> int:
    """How many columns its probabilities must have. Raises DrafterError for columns that are none.

    Whether they ascend is a fault: seeing that would wait for the device.
    """
    columns = draft.columns
    if columns is None:
        return vocab_size
    if draft.probs is None:
        raise DrafterError("gave columns without probabilities; a point mass has none")
    if columns.dim() != 1 or not 1 <= len(columns) <= vocab_size or columns.dtype != torch.long:
        raise DrafterError(
            f"gave columns of shape {list(columns.shape)} and type {columns.dtype}; "
            f"expected torch.int64 [1 to {vocab_size}]"
        )
    return len(columns)


def faults(draft: Draft, vocab_size: int, tolerance: float = TOLERANCE) -> Int[Tensor, "B K"]:
    """The fault of each counted position, as an index into FAULTS; 0 is none. No host sync."""
    K = draft.tokens.shape[1]
    fault = ((draft.tokens < 0) | (draft.tokens >= vocab_size)).long()
    if draft.probs is not None:
        # NaN and infinity meet no comparison
        valid = (draft.probs.sum(-1) - 1).abs() <= tolerance
        valid &= draft.probs.amin(-1) >= 0
        fault = torch.where(valid, fault, 2)
    if draft.columns is not None:
        outside = column_index(draft.tokens, draft.columns) == len(draft.columns)
        fault = torch.where((fault == 0) & outside, 4, fault)
        wrong = (draft.columns.diff() <= 0).any()
        wrong = wrong | (draft.columns[0] < 0) | (draft.columns[-1] >= vocab_size)
        fault = torch.where(wrong, 5, fault)
    if draft.parents is not None:
        node = torch.arange(K, device=fault.device)
        fault = torch.where((draft.parents < -1) | (draft.parents >= node), 6, fault)
    if draft.size is not None:
        fault = torch.where(torch.arange(K, device=fault.device) < draft.size[:, None], fault, 0)
        fault = torch.where(((draft.size < 0) | (draft.size > K))[:, None], 3, fault)
    return fault
