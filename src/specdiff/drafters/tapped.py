"""SEDD over its target's hidden states: their context is cached, and the anchor opens the canvas.

A committed token's keys and values are those of its embedding plus its feature. The anchor's own
feature does not exist yet when its draft is made: it is read as the first token of the canvas, and
once more as context in the next round. The canvas also has the feature before the anchor in every
position (the direct path).

Shapes: B rows, K drafted positions, N context positions of this pass, S cache slots, D width of the
features, H width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.models.cache import RaggedCache
from specdiff.models.masks import causal
from specdiff.nn.ddit import SEDD
from specdiff.types import Context

CHUNK = 512  # most context tokens read in one pass, so that a long prompt's attention stays small


@dataclass(slots=True)
class TappedContext:
    """Keys and values of the context, how many positions of it were read, and its last state."""

    cache: RaggedCache
    read: Int[Tensor, "B"]
    last: Float[Tensor, "B H"]

    @classmethod
    def open(cls, rows: int, slots: int, width: int, device: torch.device) -> "TappedContext":
        # one place more, for the padding of rows that have less to read
        return cls(
            RaggedCache(rows, slots + 1),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, width, device=device),
        )

    def admit(self, context: Context, rows: Int[Tensor, "R"]) -> None:
        """A prompt's features begin after the prefix that the row holds already."""
        read = context.batch.length[rows] - 1 - context.feature_size[rows]
        self.read = self.read.index_copy(0, rows, read)
        self.last = self.last.index_fill(0, rows, 0)

    def hidden(
        self, model: SEDD, context: Context, canvas: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B L H"]:
        """Read what is new of the context, then the anchor and the canvas; states end with its."""
        batch = context.batch
        end = batch.length - 1
        # a row whose prompt is still being read has no features to read yet
        self.read = torch.maximum(self.read, end - context.feature_size)
        lag, longest = torch.stack([(end - self.read).max(), end.max()]).tolist()
        while lag > CHUNK:
            fresh = self._fresh(model, context, lag, CHUNK, padding=longest)
            self._pass(model, fresh, longest + 1)
            lag -= CHUNK
        reach = min(longest + 2 + canvas.shape[1], self.cache.slots)
        if lag == 0:  # a later pass of the round
            return self._pass(model, self._opened(model, context, canvas), reach)
        fresh = self._fresh(model, context, lag, lag, padding=reach - 1)
        newest = fresh.states[:, -1]
        self.last = torch.where((end > self.read)[:, None], newest, self.last.to(newest.dtype))
        self.read = end
        opened = self._opened(model, context, canvas)
        return self._pass(model, fresh.with_canvas(opened), reach)

    def _fresh(self, model: SEDD, context: Context, lag: int, count: int, padding: int) -> "_Pass":
        """The first `count` of the last `lag` context positions; in rows that have read them they
        go to the slot `padding`."""
        batch = context.batch
        index = torch.arange(count, device=batch.length.device) - lag
        at = (batch.length[:, None] - 1 + index).clamp(min=0)
        new = at >= self.read[:, None]
        new &= (index + batch.length[:, None] - 1) >= 0
        assert context.features is not None  # the drafter has taps
        place = (context.feature_size[:, None] + index).clamp(min=0)[..., None]
        features = context.features.gather(1, place.expand(-1, -1, context.features.shape[2]))
        return _Pass(
            batch.ids.gather(1, at),
            model.context(features),
            at,
            torch.where(new, at, padding),
            causal(at, self.cache.slots, model.config.context_window),
        )

    def _opened(self, model: SEDD, context: Context, canvas: Int[Tensor, "B K"]) -> "_Pass":
        """The anchor and the canvas: they see the context, and each other."""
        end = context.batch.length[:, None] - 1
        ids = torch.cat([context.batch.anchor[:, None], canvas], dim=1)
        at = (end + torch.arange(ids.shape[1], device=end.device)).clamp(max=self.cache.slots - 2)
        slot = torch.arange(self.cache.slots, device=end.device)
        first = end - (model.config.context_window or self.cache.slots)
        mask = (slot >= first) & (slot < end + ids.shape[1])
        mask = mask[:, None, None].expand(-1, 1, ids.shape[1], -1)
        states = model.direct(self.last.to(model.direct.weight.dtype))
        states = states[:, None].expand(-1, ids.shape[1], -1)
        return _Pass(ids, states, at, at, mask)

    def _pass(self, model: SEDD, tokens: "_Pass", length: int) -> Float[Tensor, "B L H"]:
        self.cache.place(tokens.slots, length=length)
        return model.hidden(
            tokens.ids,
            torch.zeros(len(tokens.ids), device=tokens.ids.device),
            mask=tokens.mask[..., : self.cache.bound],
            positions=tokens.positions,
            cache=self.cache,
            extra=tokens.states,
        )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Tokens of one pass, what is added to their embeddings, and where they are stored."""

    ids: Int[Tensor, "B N"]
    states: Float[Tensor, "B N H"]
    positions: Int[Tensor, "B N"]
    slots: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B 1 N S"]

    def with_canvas(self, canvas: "_Pass") -> "_Pass":
        return _Pass(
            torch.cat([self.ids, canvas.ids], dim=1),
            torch.cat([self.states, canvas.states], dim=1),
            torch.cat([self.positions, canvas.positions], dim=1),
            torch.cat([self.slots, canvas.slots], dim=1),
            torch.cat([self.mask, canvas.mask], dim=2),
        )
