"""Training the equal-size autoregressive drafter: every position of a row foretells the next, in one causal pass.

Shapes: B rows, L tokens, n counted positions, C columns of the logits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.data.corpus import Corpus
from specdiff.nn.small_lm import SmallLM
from specdiff.training.recipe import Recipe
from specdiff.training.task import DrafterTask, TensorDict, mean
from specdiff.training.teacher import Teacher


class AutoregressiveTask(DrafterTask):
    """Next-token losses of every position; what is told of acceptance counts answers alone."""

    network: SmallLM

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        network: SmallLM,
        head: Tensor | None,
        teacher: Teacher | None,
        about: Mapping[str, Any],
    ) -> None:
        vocab = network.draft_vocab if network.draft_vocab_size is not None else None
        super().__init__(recipe, corpus, vocab, network.vocab_size, head, teacher, about)
        self.network = network

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> TensorDict:
        batch = self.rows(rows)
        if self.teacher is not None:
            batch["states"], batch["log_z"] = self.teacher(rows, batch["ids"])
        return batch

    def forward(self, batch: TensorDict, progress: float) -> tuple[Tensor, TensorDict]:
        ids, lengths = batch["ids"], batch["lengths"]
        at = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
        counted = at < lengths[:, None] - 1
        logits = self.network.logits(self.network.hidden(ids)[:, :-1][counted])
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(at)[counted]
        judged = self.judge(logits, batch, row, at[counted] + 1)
        answer = (at >= batch["prompts"][:, None] - 1)[counted]
        return mean(judged.loss), {"q1": mean(judged.q[answer])}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        written = SmallLM(self.network.config)
        written.load_state_dict(state)
        written.save_pretrained(
            folder,
            getattr(torch, self.recipe.save_dtype),
            draft_len=self.recipe.draft_len,
            **self.about,
        )
