"""A drafter whose vocabulary is its target's with other padding: the ids that both hold mean the same tokens.

Its logits beyond the target's vocabulary are cut; an id that it lacks has probability 0, which is a valid law like any other.

Shapes: B rows, K positions, C columns of the network, V target vocabulary.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.errors import DrafterError
from specdiff.types import TargetInfo

Agreement = Callable[
    [int], bool
]  # of a vocabulary's size: does the target's tokenizer give these ids the same meaning?


def never(vocab_size: int) -> bool:
    """Nothing is known of the tokenizers."""
    return False


def demand_vocabulary(size: int, target: TargetInfo, *, padded: bool) -> None:
    """Raises DrafterError where the drafter's vocabulary is of another size, and not the target's with other padding."""
    if size != target.vocab_size and not padded:
        raise DrafterError(
            f"this drafter writes a vocabulary of {size} tokens, but the target {target.name!r} has {target.vocab_size}; "
            f"use a drafter trained for this target, or one whose folder holds a tokenizer with the same ids"
        )


def fitted(logits: Float[Tensor, "B K C"], vocab_size: int) -> Float[Tensor, "B K V"]:
    """Over the target's vocabulary; the same object where the sizes are equal."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return F.pad(logits, (0, missing), value=-float("inf"))
    return logits[..., :vocab_size] if missing else logits


def known_ids(ids: Int[Tensor, "B K"], size: int, vocab_size: int) -> Int[Tensor, "B K"]:
    """What a network of `size` words reads: another token in place of one that it lacks. This costs acceptance only."""
    return ids if size >= vocab_size else ids.masked_fill(ids >= size, 0)
