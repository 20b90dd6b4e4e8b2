"""Training causal LMs on the next token: the autoregressive drafter, and the target itself.

Shapes: B rows, L tokens, n counted positions, C columns of the logits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdiff.data.corpus import Corpus
from specdiff.nn.small_lm import SmallLM
from specdiff.training import objectives
from specdiff.training.batches import RowBatch
from specdiff.training.recipe import Recipe
from specdiff.training.task import DrafterTask, Metrics, Task, mean


class AutoregressiveTask(DrafterTask[RowBatch]):
    """Next-token losses of every position in one causal pass; `q1` counts answers only."""

    network: SmallLM

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> RowBatch:
        return self.row_batch_with_states(rows)

    def forward(self, batch: RowBatch, progress: float) -> tuple[Tensor, Metrics]:
        ids = batch.ids
        at = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
        counted = at < batch.lengths[:, None] - 1
        logits = self.network.logits(self.network.hidden(ids)[:, :-1][counted])
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(at)[counted]
        losses = self.token_losses(logits, batch, row, at[counted] + 1)
        answer = (at >= batch.prompts[:, None] - 1)[counted]
        return mean(losses.loss), {"q1": mean(losses.q[answer])}


class TargetTask(Task[RowBatch]):
    """Finetunes the target itself on a data set, as the paper does before it measures.

    Every parameter is trained. The exported folder is a plain transformers folder, with the
    tokenizer.
    """

    network: PreTrainedModel

    def __init__(
        self, recipe: Recipe, corpus: Corpus, network: PreTrainedModel, tokenizer: Any
    ) -> None:
        super().__init__(recipe, corpus)
        self.network = network
        self.tokenizer = tokenizer

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> RowBatch:
        return self.row_batch(rows)

    def forward(self, batch: RowBatch, progress: float) -> tuple[Tensor, Metrics]:
        ids = batch.ids
        at = torch.arange(ids.shape[1] - 1, device=ids.device)
        counted = at < batch.lengths[:, None] - 1
        logits = self.network(ids, use_cache=False).logits[:, :-1][counted].float()
        return mean(objectives.cross_entropy(logits, ids[:, 1:][counted])), {}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        dtype = getattr(torch, self.recipe.save_dtype)
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        self.network.save_pretrained(folder, state_dict=tensors)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
