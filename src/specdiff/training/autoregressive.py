"""Training the equal-size autoregressive drafter: every position of a row foretells the next, in one causal pass.

Shapes: B rows, L tokens, n counted positions, C columns of the logits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.nn.causal import SmallCausalLM
from specdiff.training import objectives
from specdiff.training.corpus import Corpus
from specdiff.training.recipe import Recipe
from specdiff.training.task import Task, TensorDict, columns_of
from specdiff.training.teacher import Teacher


class AutoregressiveTask(Task):
    """`head` [C, H] are the target's output rows of the draft vocabulary; the teacher's law is read through them."""

    network: SmallCausalLM
    columns: Tensor
    head: Tensor

    def __init__(
        self, recipe: Recipe, corpus: Corpus, network: SmallCausalLM, head: Tensor | None, teacher: Teacher | None, about: Mapping[str, Any]
    ) -> None:
        super().__init__(recipe, corpus)
        self.network, self.teacher, self.about = network, teacher, dict(about)
        vocab = network.draft_vocab if network.draft_vocab_size is not None else None
        size = network.vocab_size
        self.register_buffer("columns", columns_of(vocab, size), persistent=False)
        if head is not None:
            self.register_buffer("head", head if vocab is None else head[vocab.to(head.device)], persistent=False)

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> TensorDict:
        batch = self.rows(rows)
        if self.teacher is not None:
            batch["states"], batch["log_z"] = self.teacher(rows, batch["ids"])
        return batch

    def forward(self, batch: TensorDict, progress: float) -> tuple[Tensor, TensorDict]:
        ids, lengths = batch["ids"], batch["lengths"]
        at = torch.arange(ids.shape[1] - 1, device=ids.device)
        counted = at < lengths[:, None] - 1
        logits = self.network.logits(self.network.hidden(ids)[:, :-1][counted])
        truth = self.columns[ids[:, 1:][counted]]
        if self.teacher is None:
            loss = objectives.denoise(logits, truth)
            q = torch.exp(-loss.detach()) * (truth >= 0)
        else:
            states, log_z = batch["states"][:, :-1][counted], batch["log_z"][:, :-1][counted]
            teacher = (states.to(self.head.dtype) @ self.head.T).float() - log_z[:, None].float()
            loss = objectives.distill(logits, teacher, self.recipe.divergence)
            if self.recipe.truth_share:
                loss = torch.lerp(loss, objectives.denoise(logits, truth), self.recipe.truth_share)
            q = objectives.overlap(logits.detach(), teacher)
        answer = (at >= batch["prompts"][:, None] - 1).expand_as(counted)[counted]
        return loss.mean(), {"q1": q[answer].mean()}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        written = SmallCausalLM(self.network.config)
        written.load_state_dict(state)
        written.save_pretrained(folder, getattr(torch, self.recipe.save_dtype), draft_len=self.recipe.draft_len, **self.about)
