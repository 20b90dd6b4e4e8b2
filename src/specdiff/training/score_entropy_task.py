"""Training a bidirectional SEDD drafter on whole corrupted rows, as the SEDD paper does.

Shapes: B rows, L tokens of a crop, G drafted tokens.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear, Schedule
from specdiff.nn.ddit import SEDD
from specdiff.training import canvases, objectives
from specdiff.training.batches import CorruptedBatch
from specdiff.training.task import DrafterTask, Metrics, weighted_mean


class ScoreEntropyTask(DrafterTask[CorruptedBatch]):
    """Score entropy of every position, or cross-entropy and distillation of the hidden ones."""

    network: SEDD

    @cached_property
    def process(self) -> Absorbing | Uniform:
        config = self.network.config
        return Absorbing(config.tokens) if config.process == "absorb" else Uniform(config.tokens)

    @cached_property
    def schedule(self) -> Schedule:
        config = self.network.config
        if config.schedule == "loglinear":
            return Loglinear()
        return Geometric(config.sigma_min, config.sigma_max)

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> CorruptedBatch:
        recipe = self.recipe
        batch = self.row_batch_with_states(rows)
        draft_len = canvases.pick_draft_len(recipe.draft_lens, generator)
        length = self.network.config.length
        if torch.rand((), generator=generator) >= recipe.drafting_share:
            corrupted = canvases.at_uniform_time(
                batch.ids, batch.lengths, length, self.process, self.schedule, generator
            )
            return CorruptedBatch(batch, corrupted, None)
        assert isinstance(self.process, Absorbing)
        anchors = canvases.pick_anchors(batch.lengths, batch.prompts, 1, generator)[:, 0]
        corrupted, end = canvases.as_drafted(
            batch.ids,
            batch.lengths,
            anchors,
            draft_len,
            min(recipe.context_window or length, length - draft_len),
            self.process.mask_id,
            self.schedule,
        )
        return CorruptedBatch(batch, corrupted, end)

    def forward(self, batch: CorruptedBatch, progress: float) -> tuple[Tensor, Metrics]:
        if self.recipe.objective == "score_entropy":
            return self._score_entropy(batch), {}
        return self._on_masks(batch)

    def _score_entropy(self, batch: CorruptedBatch) -> Tensor:
        """The authors' loss, per token. Of a hidden end: times t and per MASK, in nats."""
        corrupted = batch.corrupted
        t = corrupted.t
        real = corrupted.real
        log_score = self.network(corrupted.x, self.schedule.total(t), mask=real[:, None, None])
        loss = objectives.score_entropy(
            self.process, self.schedule, log_score, t, corrupted.x, corrupted.x0
        )
        if batch.end is None:
            return weighted_mean(loss, real.float())
        return weighted_mean(loss * t[:, None], (batch.end.index >= 0).float())

    def _on_masks(self, batch: CorruptedBatch) -> tuple[Tensor, Metrics]:
        corrupted = batch.corrupted
        x = corrupted.x
        t = corrupted.t
        real = corrupted.real
        at = corrupted.start[:, None] + torch.arange(x.shape[1], device=x.device)
        inside = (at > 0) & (at < batch.lengths[:, None])  # nothing predicts position 0
        counted = (x == self.network.config.mask_id) & real & inside
        states = self.network.hidden(x, self.schedule.total(t), mask=real[:, None, None])
        logits = self.network.logits(states[counted])[..., : self._words]
        row = torch.arange(len(x), device=x.device)[:, None].expand_as(x)[counted]
        losses = self.token_losses(logits, batch.rows, row, at[counted])
        if batch.end is None:
            return (losses.loss / t[row]).sum() / real.sum(), {}
        slot = batch.end.index[counted]
        q = losses.q.new_zeros(len(x), batch.end.draft_len).index_put((row, slot), losses.q)
        weight = objectives.WEIGHTS[self.recipe.weights](q, self.recipe.weight_scale)
        metrics = {
            "q1": q[:, 0].mean(),
            "expected_tau": 1 + objectives.expected_accepted(q).mean(),
        }
        return weighted_mean(losses.loss, weight[row, slot]), metrics

    @property
    def _words(self) -> int:
        """The number of the network's columns without MASK."""
        return self.network.config.draft_vocab_size or self.network.config.tokens
