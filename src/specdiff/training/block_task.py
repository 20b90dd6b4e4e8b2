"""Training a block drafter: many anchors a row in one pass, the Markov head teacher-forced.

Shapes: B rows, L tokens, N anchors a row, G slots an anchor, Q = N G, n counted slots, H width,
C columns of the logits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from specdiff.nn.block import BlockNetwork
from specdiff.nn.linear import linear
from specdiff.training import canvases, objectives
from specdiff.training.batches import BlockBatch
from specdiff.training.task import DrafterTask, Metrics, mean, weighted_mean


class BlockTask(DrafterTask[BlockBatch]):
    """Losses of every slot: slot j of an anchor at a predicts the token at a + j + 1.

    A slot sees the context before its anchor, never the anchor's own state, and its block. The
    token before it, which the Markov head reads, is that of the corpus.
    """

    network: BlockNetwork

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> BlockBatch:
        recipe = self.recipe
        batch = self.row_batch(rows)
        assert self.teacher is not None
        states = self.teacher(rows, batch.ids)
        assert states.layers is not None
        if recipe.objective == "distill":
            batch = replace(batch, states=states.final, log_z=states.log_z)
        draft_len = canvases.pick_draft_len(recipe.draft_lens, generator)
        count = max(1, recipe.canvas_tokens // draft_len)
        anchors = canvases.pick_anchors(batch.lengths, batch.prompts, count, generator)
        last = (batch.lengths - 1).clamp(min=0)[:, None]
        anchors = torch.minimum(anchors.clamp(min=1), last)  # the first token has no context
        return BlockBatch(batch, states.layers, anchors, draft_len)

    def forward(self, batch: BlockBatch, progress: float) -> tuple[Tensor, Metrics]:
        ids = batch.rows.ids
        at = batch.anchors[..., None] + torch.arange(batch.draft_len, device=ids.device)
        inside = (at + 1 < batch.lengths[:, None, None]) & (batch.anchors > 0)[..., None]
        row = torch.arange(len(ids), device=ids.device)[:, None, None].expand_as(at)[inside]
        position = at[inside]
        states = self.states(batch)[inside]
        logits = self.logits(states, ids[row, position])
        losses = self.token_losses(logits, batch.rows, row, position + 1)
        q = torch.zeros_like(inside, dtype=torch.float32).masked_scatter(inside, losses.q.float())
        weight = objectives.WEIGHTS[self.recipe.weights](q, self.recipe.weight_scale)
        loss = weighted_mean(losses.loss, weight[inside])
        whole = inside[..., -1]
        metrics = {
            "q1": mean(q[..., 0][whole]),
            "expected_tau": 1 + mean(objectives.expected_accepted(q)[whole]),
        }
        if not self.training:
            metrics |= self._evaluation(batch, q, whole)
            greedy = batch.rows.greedy[:, None] & whole
            if bool(greedy.any()):
                best = logits.argmax(-1) == self.columns[ids[row, position + 1]]
                match = torch.zeros_like(q).masked_scatter(inside, best.float())
                metrics["greedy_tau"] = 1 + mean(objectives.expected_accepted(match)[greedy])
        return loss, metrics

    def _evaluation(
        self, batch: BlockBatch, q: Float[Tensor, "B N G"], whole: Bool[Tensor, "B N"]
    ) -> Metrics:
        """Acceptance of each later slot."""
        return {f"q{j + 1}": mean(q[..., j][whole]) for j in range(1, batch.draft_len)}

    def states(self, batch: BlockBatch) -> Float[Tensor, "B N G H"]:
        """The network's states at all slots of all anchors."""
        ids = batch.rows.ids
        anchors = batch.anchors
        B, L = ids.shape
        G = batch.draft_len
        network = self.network
        context = network.context(batch.features.to(network.fc.weight.dtype))
        row = torch.arange(B, device=ids.device)[:, None]
        last = context[row, (anchors - 1).clamp(min=0)].to(network.fc.weight.dtype)
        slots = network.slots(ids.gather(1, anchors), last, G).flatten(1, 2)
        at = (anchors[..., None] + torch.arange(G, device=ids.device)).flatten(1)
        key = torch.arange(L, device=ids.device)
        anchor = anchors.repeat_interleave(G, 1)[..., None]
        window = network.config.window or L
        past = (key < anchor) & (key >= anchor - window)
        block = torch.arange(anchors.shape[1], device=ids.device).repeat_interleave(G)
        own = (block[:, None] == block).expand(B, -1, -1)
        mask = torch.cat([past, own], -1)[:, None]
        positions = torch.cat([key.expand(B, -1), at], 1)
        states: Tensor = network(slots, context, positions, mask)
        return states.view(*anchors.shape, G, -1)

    def logits(
        self, states: Float[Tensor, "n H"], previous: Int[Tensor, "n"]
    ) -> Float[Tensor, "n C"]:
        """Read-out and Markov head in one product, without the float32 copies of decoding."""
        head = self.network.head
        bias = self.network.markov(previous)
        if bias is None:
            return linear(states.to(head.dtype), head)
        logits: Tensor = torch.addmm(bias.to(head.dtype), states.to(head.dtype), head.T)
        return logits


def widen_norms(network: nn.Module) -> None:
    """Compute norms in float32 under autocast on a CPU too, as autocast on CUDA does."""
    for module in network.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
