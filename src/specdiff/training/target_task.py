"""Finetuning the target itself on a data set, as the paper does before it measures: cross-entropy of the next token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdiff.data.corpus import Corpus
from specdiff.training import objectives
from specdiff.training.recipe import Recipe
from specdiff.training.task import Task, TensorDict, mean


class TargetTask(Task):
    """Trains every parameter of the model; its folder is a plain transformers folder, tokenizer included."""

    network: PreTrainedModel

    def __init__(
        self, recipe: Recipe, corpus: Corpus, network: PreTrainedModel, tokenizer: Any
    ) -> None:
        super().__init__(recipe, corpus)
        self.network, self.tokenizer = network, tokenizer

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> TensorDict:
        return self.rows(rows)

    def forward(self, batch: TensorDict, progress: float) -> tuple[Tensor, TensorDict]:
        ids, lengths = batch["ids"], batch["lengths"]
        counted = torch.arange(ids.shape[1] - 1, device=ids.device) < lengths[:, None] - 1
        logits = self.network(ids, use_cache=False).logits[:, :-1][counted].float()
        return mean(objectives.denoise(logits, ids[:, 1:][counted])), {}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        dtype = getattr(torch, self.recipe.save_dtype)
        kept = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        self.network.save_pretrained(folder, state_dict=kept)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
