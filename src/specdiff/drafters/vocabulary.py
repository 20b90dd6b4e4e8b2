"""Vocabularies that differ in padding only: ids present in both mean the same tokens.

Logits beyond the target's vocabulary are cut; an id that the drafter lacks has probability 0, which
is a valid distribution like any other.

Shapes: B rows, K positions, C columns of the network, V target vocabulary.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.errors import DrafterError
from specdiff.types import TargetInfo

# of a vocabulary's size: does the target's tokenizer give these ids the same meaning?
Agreement = Callable[[int], bool]


def never(vocab_size: int) -> bool:
    """The tokenizers are unknown."""
    return False


def demand_vocabulary(size: int, target: TargetInfo, *, padded: bool) -> None:
    """Raises DrafterError unless the sizes are equal, or `padded`: they differ in padding only."""
    if size != target.vocab_size and not padded:
        raise DrafterError(
            f"this drafter writes a vocabulary of {size} tokens, but the target {target.name!r} "
            f"has {target.vocab_size}; use a drafter trained for this target, or one whose folder "
            f"holds a tokenizer with the same ids"
        )


def fitted(logits: Float[Tensor, "B K C"], vocab_size: int) -> Float[Tensor, "B K V"]:
    """Over the target's vocabulary; the same object where the sizes are equal."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return F.pad(logits, (0, missing), value=-float("inf"))
    return logits[..., :vocab_size] if missing else logits


def known_ids(ids: Int[Tensor, "B K"], size: int, vocab_size: int) -> Int[Tensor, "B K"]:
    """The input of a network of `size` tokens: id 0 replaces those it lacks.

    This costs acceptance only.
    """
    return ids if size >= vocab_size else ids.masked_fill(ids >= size, 0)
