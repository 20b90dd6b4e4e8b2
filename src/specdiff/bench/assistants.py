"""transformers' side of the comparison: the stock target, and the standard drafter as an assistant transformers can run."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdiff import catalog
from specdiff.errors import UnsupportedModelError
from specdiff.models.loading import load_model
from specdiff.nn.small_lm import SmallLM
from specdiff.types import TargetInfo


class SpreadHead(nn.Module):
    """Read-out over a draft vocabulary as logits of the whole one: what it lacks cannot be drawn, as in our own drafter."""

    def __init__(self, head: nn.Module, draft_vocab: Int[Tensor, "C"], vocab_size: int) -> None:
        super().__init__()
        self.head, self.vocab_size = head, vocab_size
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    def forward(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B V"]:
        logits: Tensor = self.head(hidden)
        full = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.get_buffer("draft_vocab"), logits)


def stock(model: str, info: TargetInfo) -> PreTrainedModel:
    """The target as transformers' users have it: weights of its own, and nothing of ours in them."""
    return load_model(catalog.model_folder(model), info.dtype, info.device)


def assistant(spec: str, info: TargetInfo) -> PreTrainedModel:
    """The causal LM behind an autoregressive drafter spec. Raises UnsupportedModelError where it is not one, or what loading raises."""
    folder: Path | None = catalog.trained_folder(spec, info)
    if folder is None:
        raise UnsupportedModelError(
            f"the drafter {spec!r} is no causal LM that transformers could run as an assistant"
        )
    small = SmallLM.from_pretrained(folder, dtype=info.dtype)
    if small.vocab_size != info.vocab_size:
        raise UnsupportedModelError(
            f"the drafter writes {small.vocab_size} words, but the target {info.vocab_size}"
        )
    net: Any = small.net
    if small.borrows:
        assert (
            info.embedding is not None and info.head is not None
        )  # else our own drafter would have been refused
        small.borrow(info.embedding, info.head)
    if small.draft_vocab_size is not None:
        net.set_output_embeddings(
            SpreadHead(net.get_output_embeddings(), small.draft_vocab, small.vocab_size)
        )
    made: PreTrainedModel = net.to(info.device).eval()
    return made
