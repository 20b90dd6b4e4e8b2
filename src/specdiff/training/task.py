"""What a recipe trains: the network, how a batch is made of corpus rows, and its loss. One file per kind."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdiff.data.corpus import Corpus, pad
from specdiff.training import objectives
from specdiff.training.recipe import Recipe
from specdiff.training.teacher import Teacher

TensorDict = dict[str, Tensor]


class Task(nn.Module, ABC):
    """`forward(batch, progress)` is the loss, so that DDP and FSDP wrap the whole of it. `network` holds all that is trained."""

    network: nn.Module

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        super().__init__()
        self.recipe, self.corpus = recipe, corpus

    @abstractmethod
    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> TensorDict:
        """A batch of corpus rows, every random choice from `generator`. Runs on the host, ahead of the step."""

    @abstractmethod
    def forward(self, batch: TensorDict, progress: float) -> tuple[Tensor, TensorDict]:
        """The loss in nats per token, and detached scalars worth logging. `progress` goes from 0 to 1 over the run."""

    @abstractmethod
    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the network, with these tensors, as a folder that `--drafter` (or `--model`) runs."""

    def sizes(self) -> dict[str, int]:
        """Parameters trained, and those borrowed or frozen beside them."""
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return {
            "trained": trained,
            "stored": sum(t.numel() for t in self.network.state_dict().values()),
        }

    def rows(self, rows: Sequence[int]) -> TensorDict:
        """ids [B, L] padded with 0, lengths [B] and prompt lengths [B]."""
        found = [self.corpus[i] for i in rows]
        return {
            "ids": pad([r.tokens for r in found]),
            "lengths": torch.tensor([len(r.tokens) for r in found]),
            "prompts": torch.tensor([r.prompt_length for r in found]),
        }


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses and acceptance probabilities of the counted positions."""

    loss: Float[Tensor, "n"]
    q: Float[Tensor, "n"]


class DrafterTask(Task):
    """What drafters of both kinds learn from: the truth, or the target's law read through `head` [C, H], its rows of the draft
    vocabulary. `about` goes into the exported config."""

    columns: Tensor
    head: Tensor

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        draft_vocab: Int[Tensor, "C"] | None,
        vocab_size: int,
        head: Float[Tensor, "V H"] | None,
        teacher: Teacher | None,
        about: Mapping[str, Any],
    ) -> None:
        super().__init__(recipe, corpus)
        self.teacher, self.about = teacher, dict(about)
        self.register_buffer("columns", columns_of(draft_vocab, vocab_size), persistent=False)
        if head is not None:
            self.register_buffer(
                "head",
                head if draft_vocab is None else head[draft_vocab.to(head.device)],
                persistent=False,
            )

    def judge(
        self,
        logits: Float[Tensor, "n C"],
        batch: TensorDict,
        row: Int[Tensor, "n"],
        at: Int[Tensor, "n"],
    ) -> TokenLosses:
        """Losses at absolute positions `at` of rows `row`; the target's state one position earlier foretells them."""
        truth = self.columns[batch["ids"][row, at]]
        if self.teacher is None:
            loss = objectives.denoise(logits, truth)
            return TokenLosses(loss, torch.exp(-loss.detach()) * (truth >= 0))
        states, log_z = batch["states"][row, at - 1], batch["log_z"][row, at - 1]
        teacher = (states.to(self.head.dtype) @ self.head.T).float() - log_z[:, None].float()
        loss = objectives.distill(logits, teacher, self.recipe.divergence)
        if self.recipe.truth_share:
            loss = torch.lerp(loss, objectives.denoise(logits, truth), self.recipe.truth_share)
        return TokenLosses(loss, objectives.overlap(logits.detach(), teacher))


def columns_of(draft_vocab: Int[Tensor, "C"] | None, vocab_size: int) -> Int[Tensor, "V"]:
    """Token id -> column of the network's logits, -1 outside the draft vocabulary."""
    if draft_vocab is None:
        return torch.arange(vocab_size)
    columns = torch.full((vocab_size,), -1)
    columns[draft_vocab] = torch.arange(len(draft_vocab))
    return columns


def most_frequent(
    corpus: Corpus, rows: Sequence[int], vocab_size: int, size: int | None
) -> Int[Tensor, "C"] | None:
    """The `size` tokens a corpus uses most, ascending: a draft vocabulary. None for the whole vocabulary."""
    if size is None or size >= vocab_size:
        return None
    return corpus.counts(rows, vocab_size).topk(size).indices.sort().values


def mean(values: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """sum(v) / n; 0 where nothing counts (rows of one token, or no word of the draft vocabulary)."""
    return values.sum() / max(1, values.numel())


def weighted_mean(loss: Float[Tensor, "*N"], weight: Float[Tensor, "*N"]) -> Float[Tensor, ""]:
    """sum(w l) / sum(w); 0 where nothing counts."""
    return (loss * weight).sum() / weight.sum().clamp(min=1e-9)
