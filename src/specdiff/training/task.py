"""Training tasks: the network that is trained, how its batches are prepared, and its loss.

Shapes: B rows, L tokens, n counted positions, V target vocabulary, C draft vocabulary, H width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdiff.data.corpus import Corpus, pad
from specdiff.nn.block import BlockNetwork
from specdiff.nn.ddit import SEDD
from specdiff.nn.small_lm import SmallLM
from specdiff.training import objectives
from specdiff.training.batches import RowBatch, TrainingBatch
from specdiff.training.recipe import Recipe
from specdiff.training.teacher import Teacher

BatchT = TypeVar("BatchT", bound=TrainingBatch)
Metrics = dict[str, Tensor]
DrafterNetwork = SEDD | SmallLM | BlockNetwork


class Task(nn.Module, ABC, Generic[BatchT]):
    """A network, all of it in `network`, and the loss of a batch.

    The loss is `forward(batch, progress)`, so that DDP and FSDP wrap the whole computation.
    """

    network: nn.Module

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        super().__init__()
        self.recipe = recipe
        self.corpus = corpus

    @abstractmethod
    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> BatchT:
        """A batch of corpus rows, with all randomness from `generator`.

        Runs on the host, ahead of the step.
        """

    @abstractmethod
    def forward(self, batch: BatchT, progress: float) -> tuple[Tensor, Metrics]:
        """The loss in nats per token, and detached scalars to log; `progress` runs from 0 to 1."""

    @abstractmethod
    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the network with these tensors as a folder for `--drafter` (or `--model`)."""

    def sizes(self) -> dict[str, int]:
        """Parameters trained, and all that are stored, frozen ones included."""
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        stored = sum(t.numel() for t in self.network.state_dict().values())
        return {"trained": trained, "stored": stored}

    def row_batch(self, rows: Sequence[int]) -> RowBatch:
        """These corpus rows, without a teacher's states."""
        records = [self.corpus[i] for i in rows]
        return RowBatch(
            ids=pad([record.tokens for record in records]),
            lengths=torch.tensor([len(record.tokens) for record in records]),
            prompts=torch.tensor([record.prompt_length for record in records]),
            greedy=torch.tensor([record.temperature == 0 for record in records]),
        )


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses and acceptance probabilities of the counted positions."""

    loss: Float[Tensor, "n"]
    q: Float[Tensor, "n"]


class DrafterTask(Task[BatchT]):
    """A drafter that learns from the corpus's tokens or from the target's distribution.

    `head` [V, H] is the target's output matrix, of which the rows of the draft vocabulary are
    used. `about` goes into the exported config.
    """

    network: DrafterNetwork
    columns: Tensor
    head: Tensor

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        network: DrafterNetwork,
        head: Float[Tensor, "V H"] | None,
        teacher: Teacher | None,
        about: Mapping[str, Any],
    ) -> None:
        super().__init__(recipe, corpus)
        self.network = network
        self.teacher = teacher
        self.about = dict(about)
        draft_vocab, vocab_size = vocabulary(network)
        self.register_buffer("columns", columns_of(draft_vocab, vocab_size), persistent=False)
        if head is not None:
            if draft_vocab is not None:
                head = head[draft_vocab.to(head.device)]
            self.register_buffer("head", head, persistent=False)

    def row_batch_with_states(self, rows: Sequence[int]) -> RowBatch:
        """These corpus rows, with the states of the teacher if there is one."""
        batch = self.row_batch(rows)
        if self.teacher is None:
            return batch
        states = self.teacher(rows, batch.ids)
        return replace(batch, states=states.final, log_z=states.log_z)

    def token_losses(
        self,
        logits: Float[Tensor, "n C"],
        batch: RowBatch,
        row: Int[Tensor, "n"],
        at: Int[Tensor, "n"],
    ) -> TokenLosses:
        """Losses at positions `at` of rows `row`, from the target's states one position earlier."""
        truth = self.columns[batch.ids[row, at]]
        if batch.states is None or batch.log_z is None:
            loss = objectives.cross_entropy(logits.float(), truth)
            return TokenLosses(loss, torch.exp(-loss.detach()) * (truth >= 0))
        states = batch.states[row, at - 1]
        log_z = batch.log_z[row, at - 1]
        teacher = states.to(self.head.dtype) @ self.head.T
        recipe = self.recipe
        if recipe.divergence == "log_hybrid":
            loss, q = objectives.log_hybrid(logits, teacher, log_z, recipe.eta)
        else:
            logits = logits.float()
            teacher = teacher.float() - log_z[:, None].float()
            loss = objectives.distill(logits, teacher, recipe.divergence, recipe.eta)
            q = objectives.overlap(logits.detach(), teacher)
        if recipe.truth_share:
            loss = torch.lerp(
                loss, objectives.cross_entropy(logits.float(), truth), recipe.truth_share
            )
        return TokenLosses(loss, q)

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        network = untrained(self.network)
        network.load_state_dict(state)
        network.save_pretrained(
            folder,
            getattr(torch, self.recipe.save_dtype),
            draft_len=self.recipe.draft_len,
            **self.about,
        )


def vocabulary(network: DrafterNetwork) -> tuple[Int[Tensor, "C"] | None, int]:
    """A network's draft vocabulary (None: the whole vocabulary), and the size of the target's."""
    if isinstance(network, SEDD):
        size = network.config.draft_vocab_size
        return None if size is None else network.draft_vocab, network.config.tokens
    if isinstance(network, BlockNetwork):
        return network.draft_ids, network.config.tokens
    size = network.draft_vocab_size
    return None if size is None else network.draft_vocab, network.vocab_size


def untrained(network: DrafterNetwork) -> DrafterNetwork:
    """A new network with the same config, without dropout."""
    if isinstance(network, SEDD):
        return SEDD(replace(network.config, dropout=0.0))
    if isinstance(network, BlockNetwork):
        return BlockNetwork(network.config)
    return SmallLM(network.config)


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
    """A draft vocabulary: the corpus's `size` most frequent tokens, ascending. None: all tokens."""
    if size is None or size >= vocab_size:
        return None
    return corpus.counts(rows, vocab_size).topk(size).indices.sort().values


def mean(values: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """sum(v) / n; 0 where nothing counts: rows of one token, no token of the draft vocabulary."""
    return values.sum() / max(1, values.numel())


def weighted_mean(loss: Float[Tensor, "*N"], weight: Float[Tensor, "*N"]) -> Float[Tensor, ""]:
    """sum(w l) / sum(w); 0 where nothing counts."""
    return (loss * weight).sum() / weight.sum().clamp(min=1e-9)
