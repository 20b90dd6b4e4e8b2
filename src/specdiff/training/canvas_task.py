"""Training a SEDD drafter with a causal context: many canvases per row in one pass.

A network with taps reads the anchor as the first token of its canvas, since the anchor's feature
does not exist when it drafts; G counts it.

Shapes: B rows, L tokens, N canvases a row, G tokens a canvas, T = L + N G, H width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from specdiff.nn.ddit import SEDD
from specdiff.training import canvases, objectives
from specdiff.training.batches import CanvasBatch, RowBatch
from specdiff.training.canvases import Canvases
from specdiff.training.task import DrafterTask, Metrics, mean, weighted_mean


class CanvasTask(DrafterTask[CanvasBatch]):
    """Losses of the hidden canvas positions; the clean ones add a next-token loss that fades."""

    network: SEDD

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> CanvasBatch:
        recipe = self.recipe
        batch, features = self._rows(rows)
        draft_len = canvases.pick_draft_len(recipe.draft_lens, generator)
        count = max(1, recipe.canvas_tokens // draft_len)
        anchors = canvases.pick_anchors(batch.lengths, batch.prompts, count, generator)
        revealed = canvases.pick_revealed(anchors.shape, draft_len, recipe.revealed, generator)
        return CanvasBatch(batch, anchors, revealed, draft_len, features)

    def _rows(self, rows: Sequence[int]) -> tuple[RowBatch, Float[Tensor, "B L F"] | None]:
        """Corpus rows with the states of the teacher, and features for a network with taps."""
        if not self.network.config.taps:
            return self.row_batch_with_states(rows), None
        assert self.teacher is not None
        batch = self.row_batch(rows)
        states = self.teacher(rows, batch.ids)
        if self.recipe.objective == "distill":
            batch = replace(batch, states=states.final, log_z=states.log_z)
        return batch, states.layers

    def forward(self, batch: CanvasBatch, progress: float) -> tuple[Tensor, Metrics]:
        layout, states = self.states(batch)
        B, L = batch.rows.ids.shape
        counted = layout.hidden & layout.inside
        row = torch.arange(B, device=counted.device)[:, None, None].expand_as(counted)[counted]
        logits = self.network.logits(states[:, L:].view(*layout.slot.shape, -1)[counted])
        losses = self.token_losses(logits, batch.rows, row, layout.slot[counted])
        # revealed positions count as accepted
        q = torch.where(layout.inside, 1.0, 0.0).masked_scatter(counted, losses.q)
        first = layout.slot.shape[-1] - batch.draft_len  # after the anchor, if it is there
        q = q[..., first:]
        weight = objectives.WEIGHTS[self.recipe.weights](q, self.recipe.weight_scale)
        loss = weighted_mean(losses.loss, weight[counted[..., first:]])
        whole = layout.hidden[..., first] & layout.inside[..., -1]  # nothing revealed, no padding
        metrics = {
            "q1": mean(q[..., 0][whole]),
            "expected_tau": 1 + mean(objectives.expected_accepted(q)[whole]),
        }
        auxiliary = self.recipe.auxiliary * (1 - progress)
        if auxiliary > 0:
            loss = loss + auxiliary * self._next_token(states[:, :L], batch.rows)
        return loss, metrics

    def states(self, batch: CanvasBatch) -> tuple[Canvases, Float[Tensor, "B T H"]]:
        """The layout of a pass, and the network's states at all of its positions."""
        rows = batch.rows
        config = self.network.config
        own = int(bool(config.taps))  # the anchor
        layout = canvases.lay_out(
            rows.ids,
            rows.lengths,
            batch.anchors - own,
            batch.revealed + own,
            batch.draft_len + own,
            config.context_window,
            config.tokens,
        )
        sigma = torch.zeros(len(rows.ids), device=rows.ids.device)
        states = self.network.hidden(
            layout.ids,
            sigma,
            mask=layout.mask,
            positions=layout.positions,
            extra=self._features(batch),
        )
        return layout, states

    def _features(self, batch: CanvasBatch) -> Float[Tensor, "B T H"] | None:
        """What the target's features add: to the rows, and by the direct path to each canvas."""
        if batch.features is None:
            return None
        context = self.network.context(batch.features)
        before = batch.anchors[..., None] - 1
        last = context.gather(1, before.clamp(min=0).expand(-1, -1, context.shape[2]))
        last = torch.where(before < 0, 0, last)  # the first token has no context
        canvas = self.network.direct(last).repeat_interleave(batch.draft_len + 1, 1)
        return torch.cat([context, canvas.to(context.dtype)], dim=1)

    def _next_token(self, states: Float[Tensor, "B L H"], batch: RowBatch) -> Float[Tensor, ""]:
        """Clean positions predict their successor, which builds the features that canvases read."""
        ids = batch.ids
        following = torch.full_like(ids, -1)
        following[:, :-1] = self.columns[ids[:, 1:]]
        inside = torch.arange(ids.shape[1], device=ids.device) < batch.lengths[:, None] - 1
        counted = inside & (following >= 0)
        return mean(
            objectives.cross_entropy(self.network.logits(states[counted]), following[counted])
        )
