"""Borrowed tables: drafters that read and write through their target's own embedding and head.

Shapes: V target vocabulary, H width, C output columns (V, or the draft vocabulary).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdiff.errors import ConfigError
from specdiff.nn.linear import linear


class _Borrowed(nn.Module):
    """A table of the target, neither trained nor stored. NaN until it is borrowed."""

    weight: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        unset = torch.full((1, 1), torch.nan).expand(rows, width)
        self.register_buffer("weight", unset, persistent=False)


class BorrowedLookup(_Borrowed):
    """ids -> rows of the target's embedding, in the precision of the network's body."""

    dtype = torch.float32

    def forward(self, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B H"]:
        return F.embedding(ids, self.weight).to(self.dtype)


class BorrowedEmbedding(_Borrowed):
    """The target's table, plus a trained vector for MASK (the id just past it)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.mask_embedding = nn.Parameter(torch.zeros(width))

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
        masked = ids == len(self.weight)
        words = F.embedding(ids.masked_fill(masked, 0), self.weight).float()
        return torch.where(masked[..., None], self.mask_embedding, words)


class BorrowedHead(_Borrowed):
    """Hidden states -> logits over rows of the target's head."""

    def forward(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B C"]:
        return linear(hidden, self.weight)


def check_tables(embedding: Tensor, head: Tensor, words: int, width: int) -> None:
    """Raises ConfigError if the target's tables are not of the size a network was trained for."""
    for part, table in (("embedding", embedding), ("head", head)):
        if tuple(table.shape) != (words, width):
            raise ConfigError(
                f"this drafter borrows an {part} of {words} words x {width}, but the target's is "
                f"{table.shape[0]} x {table.shape[1]}; use a drafter trained for this target"
            )


def head_rows(
    head: Float[Tensor, "V H"], draft_vocab: Int[Tensor, "C"] | None
) -> Float[Tensor, "C H"]:
    """The rows of the target's head for a draft vocabulary (None: all of them)."""
    rows = head.detach()
    return rows if draft_vocab is None else rows[draft_vocab.to(rows.device)]


def scatter(
    logits: Float[Tensor, "*B C"], draft_vocab: Int[Tensor, "C"], vocab_size: int
) -> Float[Tensor, "*B V"]:
    """Draft-vocabulary logits over the whole vocabulary: -inf for every other word."""
    full = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    return full.index_copy_(-1, draft_vocab, logits)
