"""The cascade: prompt lookup where the text repeats itself, else another drafter.

Which of the two drafts for a row depends on its committed tokens alone, so every draft is exact.
Lookup's tokens are point masses; the other rows have the inner drafter's probabilities. A round in
which all rows are looked up costs no pass of the inner drafter, which sees the round's tokens and
features when it drafts next.

Shapes: B rows, R rows looked up, K drafted positions, C columns of a draft's probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.drafters.hot_start import certain
from specdiff.drafters.lookup import Match
from specdiff.drafters.ngram import NGramDrafter, NGramState, point_masses
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.types import PADDING, Batch, Context, Draft, DraftPlan, TargetInfo, column_index

LOOKUP_LEN = 8


@dataclass(slots=True)
class CascadeState:
    """The states of both drafters, and what the last round took of them.

    `skipped`: the inner one was not needed. `looked_up`: the rows that were looked up.
    """

    lookup: NGramState
    inner: Any
    skipped: bool = False
    columns: "_Columns | None" = None
    looked_up: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Columns:
    """A draft vocabulary, also on the host."""

    ids: Int[Tensor, "C"]
    members: frozenset[int]


class CascadeDrafter(Drafter[CascadeState]):
    """Drafts by lookup in rows whose last `shortest` tokens or more occurred before.

    A match of n tokens gives a draft of 2n - 2: the longer the repetition, the longer it goes on.
    Lookup drafts at most `lookup_len` tokens, `inner` at most its own `draft_len`, and neither more
    than the round's plan says. `longest` and `memory` are those of NGramDrafter.

    Raises UsageError.
    """

    def __init__(
        self,
        target: TargetInfo,
        inner: Drafter[Any],
        *,
        lookup_len: int = LOOKUP_LEN,
        longest: int = 6,
        shortest: int = 3,
        memory: int = 0,
    ) -> None:
        if lookup_len < 1:
            raise UsageError(f"lookup_len must be at least 1, not {lookup_len}")
        self.lookup = NGramDrafter(target, longest=longest, shortest=shortest, memory=memory)
        self.inner = inner
        self.lookup_len = lookup_len
        self.taps = inner.taps
        self.draft_len = max(lookup_len, inner.draft_len)
        self.branches = (inner.draft_len, lookup_len)
        self.temperatures = inner.temperatures
        self.keeps_features = inner.keeps_features
        self.reproducible = inner.reproducible and self.lookup.reproducible
        self.trees = inner.trees

    def open(self, rows: int, slots: int) -> CascadeState:
        return CascadeState(self.lookup.open(rows, slots), self.inner.open(rows, slots))

    def admit(self, state: CascadeState, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.lookup.admit(state.lookup, context, rows)
        self.inner.admit(state.inner, context, rows)

    def release(self, state: CascadeState, rows: Int[Tensor, "R"]) -> None:
        self.lookup.release(state.lookup, rows)
        self.inner.release(state.inner, rows)

    def resume(
        self,
        state: CascadeState,
        earlier: CascadeState,
        rows: Int[Tensor, "R"],
        sources: Int[Tensor, "R"],
    ) -> None:
        moves = zip(sources.tolist(), rows.tolist(), strict=True)
        state.looked_up = [row for source, row in moves if source in earlier.looked_up]
        self.inner.resume(state.inner, earlier.inner, rows, sources)

    def consumed(self, state: CascadeState) -> bool:
        return not state.skipped and self.inner.consumed(state.inner)

    def propose(self, context: Context, state: CascadeState, noise: Noise, draft_len: int) -> Draft:
        batch = context.batch
        matches = self.lookup.matches(batch, state.lookup)
        plan = context.plan or DraftPlan((draft_len,))
        texts = [self._text(match, plan.length(1)) for match in matches]
        inner_len = min(plan.length(0), self.inner.draft_len)
        missing = [live and not text for live, text in zip(state.lookup.live, texts, strict=True)]
        context = _own_rounds(context, state.looked_up)
        state.looked_up = [row for row, text in enumerate(texts) if text]
        state.skipped = not inner_len or not any(missing)
        if state.skipped:
            return _labeled(point_masses(texts, batch), texts)
        draft = self.inner.propose(context, state.inner, noise, inner_len)
        return _labeled(_joined(draft, texts, batch, state), texts) if any(texts) else draft

    def _text(self, match: Match | None, draft_len: int) -> list[int]:
        if match is None or not draft_len:
            return []
        return match.following(min(draft_len, self.lookup_len, max(2 * match.size - 2, 1)))


def _own_rounds(context: Context, looked_up: Sequence[int]) -> Context:
    """The inner drafter's context: in these rows the last round verified no draft of its own."""
    last = context.previous
    if last is None or not looked_up:
        return context
    rows = torch.tensor(looked_up).to(last.emitted.device)
    draft = replace(last.draft, size=last.draft.sizes.index_fill(0, rows, 0))
    return replace(context, previous=replace(last, draft=draft))


def _labeled(draft: Draft, texts: Sequence[Sequence[int]]) -> Draft:
    """The draft, with the branch of each row."""
    return replace(draft, branches=tuple(int(len(text) > 0) for text in texts))


def _joined(
    draft: Draft, texts: Sequence[Sequence[int]], batch: Batch, state: CascadeState
) -> Draft:
    """`draft` with the rows that have a text replaced by it; they are point masses."""
    own = point_masses(texts, batch)
    rows = torch.tensor([row for row, text in enumerate(texts) if text]).to(batch.ids.device)
    K = max(draft.tokens.shape[1], own.tokens.shape[1])
    new = _padded(own.tokens, K)[rows]
    tokens = _padded(draft.tokens, K)
    if draft.columns is not None:
        # a token outside its own columns is a fault, and must not become one of the added columns
        inside = column_index(tokens, draft.columns) < len(draft.columns)
        tokens = torch.where(inside, tokens, PADDING)
    tokens = tokens.index_copy(0, rows, new)
    size = draft.sizes.long().index_copy(0, rows, own.sizes[rows])
    mixture = replace(draft, tokens=tokens, size=size)
    if draft.parents is not None:
        chain = torch.arange(-1, K - 1, device=tokens.device).expand(len(tokens), -1)
        parents = torch.cat([draft.parents, chain[:, draft.parents.shape[1] :]], dim=1)
        mixture = replace(mixture, parents=parents.index_copy(0, rows, chain[: len(rows)]))
    if draft.probs is None:
        return mixture
    mixture = replace(mixture, probs=F.pad(draft.probs, (0, 0, 0, K - draft.probs.shape[1])))
    mixture = _with_columns(mixture, {token for text in texts for token in text}, state)
    assert mixture.probs is not None
    masses = certain(new, mixture.columns, mixture.probs)
    return replace(mixture, probs=mixture.probs.index_copy(0, rows, masses))


def _with_columns(draft: Draft, ids: set[int], state: CascadeState) -> Draft:
    """The same draft with columns for all of `ids`; the new ones have probability 0."""
    columns = draft.columns
    if columns is None or draft.probs is None:
        return draft
    if state.columns is None or state.columns.ids is not columns:
        state.columns = _Columns(columns, frozenset(columns.tolist()))
    missing = sorted(ids - state.columns.members)
    if not missing:
        return draft
    wider = torch.cat([columns, torch.tensor(missing).to(columns)]).sort()
    probs = F.pad(draft.probs, (0, len(missing))).index_select(-1, wider.indices)
    return replace(draft, probs=probs, columns=wider.values)


def _padded(tokens: Int[Tensor, "B N"], width: int) -> Int[Tensor, "B K"]:
    return F.pad(tokens, (0, width - tokens.shape[1]))
