"""Repetition: where a text loops. Greedy loops flatter every drafter, so they are counted apart.

Shapes: L tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

GRAM = 8  # tokens; longer than what chance or set phrases repeat


def repeated(tokens: Int[Tensor, "L"]) -> int:
    """Number of tokens in an 8-gram that occurs more than once."""
    if len(tokens) <= GRAM:
        return 0
    # wrapping sums: a hash of each 8-gram
    weights = torch.tensor([pow(0x9E3779B1, k, 1 << 61) for k in range(GRAM)])
    grams = (tokens.long().unfold(0, GRAM, 1) * weights).sum(1)
    _, inverse, counts = torch.unique(grams, return_inverse=True, return_counts=True)
    starts = torch.nn.functional.pad((counts[inverse] > 1).float(), (GRAM - 1, GRAM - 1))
    return int((torch.nn.functional.max_pool1d(starts[None, None], GRAM, 1)[0, 0] > 0).sum())


def fresh(tokens: Sequence[int]) -> int:
    """Number of tokens before the one that completes the first repeated 8-gram (default: all)."""
    grams: set[tuple[int, ...]] = set()
    for end in range(GRAM, len(tokens) + 1):
        gram = tuple(tokens[end - GRAM : end])
        if gram in grams:
            return end - 1
        grams.add(gram)
    return len(tokens)
