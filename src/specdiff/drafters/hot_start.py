"""Hot start: a draft begins with what the last round drafted and rejected.

The paper's future work (Christopher et al. 2024, section 6). Of a draft that was rejected at some
position, the later positions are drafted again. What the last draft holds for them is used in one
of two ways. `hot_start=w` mixes its predictions into the new logits, before tokens are drawn from
them. `hot_start="canvas"` keeps its confident tokens in the canvas, and the network fills in the
others. All of it was known before the round began, so both are exact: the mixed probabilities are
those that tokens are drawn from, and a kept token is a point mass (with probabilities of a network
it would bias the text).

Shapes: B rows, R of them, K drafted positions, M of the last draft, N drawn at once, C columns.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.errors import UsageError
from specdiff.types import Batch, Context, column_index

CANVAS = "canvas"
CONFIDENT = 0.5  # the least probability of a token that a canvas keeps
NO_ROUND = -2  # the round of no draft


@dataclass(frozen=True, slots=True)
class HotStart:
    """The option `hot_start`: the weight of the last draft's predictions, or "canvas".

    A weight of 0 is a cold start, and so is the default.
    """

    weight: float = 0.0
    canvas: bool = False

    @classmethod
    def of(cls, value: float | str) -> "HotStart":
        """Raises UsageError unless it is a number in [0, 1) or "canvas"."""
        if value == CANVAS:
            return cls(canvas=True)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= float(value) < 1:
            raise UsageError(
                f'hot_start must be a weight in [0, 1) (0: a cold start) or "{CANVAS}", '
                f"not {value!r}"
            )
        return cls(weight=float(value))

    def history(self, rows: int) -> "DraftHistory | None":
        """An empty history for a drafter's state; None for a cold start, which needs none."""
        return DraftHistory(self, rows) if self.canvas or self.weight else None


@dataclass(frozen=True, slots=True)
class LastDraft:
    """A draft, and what it was drawn from: the logits, or (canvas) the probability of each token.

    `start`: how many committed tokens each row had. `round`: the row's round.
    """

    tokens: Int[Tensor, "B M"]
    values: Float[Tensor, "B M C"]
    start: Int[Tensor, "B"]
    round: Int[Tensor, "B"]


@dataclass(slots=True)
class DraftHistory:
    """The last draft of `rows` rows, None before the first one: part of a drafter's state."""

    hot: HotStart
    rows: int
    last: LastDraft | None = None

    def forget(self, rows: Int[Tensor, "R"]) -> None:
        """New requests are in `rows`: they start cold."""
        if self.last is not None:
            self.last = replace(self.last, round=self.last.round.index_fill(0, rows, NO_ROUND))

    def resume(
        self, earlier: "DraftHistory", rows: Int[Tensor, "R"], sources: Int[Tensor, "R"]
    ) -> None:
        """`rows` go on from the rows `sources` of an earlier history."""
        last = earlier.last
        if last is None:
            return

        def placed(part: Tensor, fill: int = 0) -> Tensor:
            empty = part.new_full((self.rows, *part.shape[1:]), fill)
            return empty.index_copy(0, rows, part[sources])

        self.last = LastDraft(
            placed(last.tokens),
            placed(last.values),
            placed(last.start),
            placed(last.round, NO_ROUND),
        )

    def tail(self, context: Context, draft_len: int) -> "Tail | None":
        """What the last draft holds for the next `draft_len` positions.

        Only its verified positions count, in rows whose last round verified it: anything else would
        depend on the other rows of the batch.
        """
        last = self.last
        if last is None or context.previous is None:
            return None
        batch = context.batch
        size = context.previous.draft.sizes.clamp(max=last.tokens.shape[1])
        follows = last.round + 1 == batch.round
        ahead = (batch.length - last.start)[:, None]
        index = ahead + torch.arange(draft_len, device=ahead.device)
        valid = follows[:, None] & (index < size[:, None])
        index = torch.where(valid, index, 0)
        mask = torch.zeros_like(valid)
        if self.hot.canvas:
            mask = valid & (last.values[..., 0].gather(1, index) >= CONFIDENT)
        return Tail(self.hot, last, index, valid, mask)

    def store(
        self,
        batch: Batch,
        tokens: Int[Tensor, "B M"],
        logits: Float[Tensor, "B M C"],
        columns: Int[Tensor, "C"] | None,
        tail: "Tail | None",
    ) -> None:
        """Remember this round's draft, which began with `tail`."""
        values = logits
        if self.hot.canvas:
            index = tokens if columns is None else column_index(tokens, columns)
            values = logits.float().softmax(-1).gather(-1, index[..., None])
            if tail is not None:  # a network says nothing about a token it is shown
                values = torch.where(tail.mask[..., None], tail.values(), values)
        self.last = LastDraft(tokens, values, batch.length, batch.round)


@dataclass(frozen=True, slots=True)
class Tail:
    """The part of a last draft that is drafted again: its positions `index`, where `valid`.

    `mask`: the positions whose tokens stay in the canvas (none, if predictions are mixed).
    """

    hot: HotStart
    last: LastDraft
    index: Int[Tensor, "B K"]
    valid: Bool[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]

    @property
    def tokens(self) -> Int[Tensor, "B K"]:
        """The last draft's; without meaning where not `valid`."""
        return self.last.tokens.gather(1, self.index)

    def values(self, positions: slice | Int[Tensor, "N"] = slice(None)) -> Float[Tensor, "B N C"]:
        """The last draft's logits or probabilities; without meaning where not `valid`."""
        index = self.index[:, positions, None].expand(-1, -1, self.last.values.shape[-1])
        return self.last.values.gather(1, index)

    def mixed(
        self, logits: Float[Tensor, "B N C"], positions: slice | Int[Tensor, "N"]
    ) -> Float[Tensor, "B N C"]:
        """The logits at some positions: the weighted geometric mean of both predictions."""
        weight = self.hot.weight
        if not weight:
            return logits
        mean = (1 - weight) * logits + weight * self.values(positions)
        return torch.where(self.valid[:, positions, None], mean, logits)

    def keep(
        self,
        tokens: Int[Tensor, "B N"],
        q: Float[Tensor, "B N C"] | None,
        positions: Int[Tensor, "N"],
        columns: Int[Tensor, "C"] | None,
    ) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N C"] | None]:
        """Tokens drawn at some positions and their probabilities, with the kept ones in place."""
        if not self.hot.canvas:
            return tokens, q
        mask = self.mask[:, positions]
        tokens = torch.where(mask, self.tokens[:, positions], tokens)
        if q is not None:
            q = torch.where(mask[..., None], certain(tokens, columns, q), q)
        return tokens, q


def certain(
    tokens: Int[Tensor, "R K"], columns: Int[Tensor, "C"] | None, like: Float[Tensor, "B K C"]
) -> Float[Tensor, "R K C"]:
    """Probabilities 1 of the tokens; padding, which does not count, may be in no column."""
    index = tokens
    if columns is not None:
        index = column_index(tokens, columns).clamp(max=len(columns) - 1)
    masses = like.new_zeros(*tokens.shape, like.shape[-1])
    return masses.scatter_(-1, index[..., None], 1)
