"""A toy target with an exact law, for tests and examples: p(next | last two tokens) is a table.

Its cache holds token ids the way a real one holds keys and values (written at slots, overwritten
after a rejection), and scoring reads nothing else: a stale slot shows at once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.targets.base import Target
from specdiff.tree import parent_rows
from specdiff.types import Batch, Draft, TargetInfo, TargetOutput, Verification


@dataclass(slots=True)
class TableCache:
    """Token ids, slot by slot, where a model's cache would hold their keys and values."""

    slots: Int[Tensor, "B S"]
    taps: int
    tree: bool = False  # the last scored draft was one


class TableTarget(Target[TableCache]):
    """logits(next) = table[before last, last], of shape [V, V, V]; in float64 its law is exact."""

    trees = True

    def __init__(self, table: Float[Tensor, "V V V"]) -> None:
        self.table = table
        size = table.shape[-1]
        self.info = TargetInfo("table", size, size, 1, 1 << 30, table.dtype, table.device)

    @classmethod
    def random(cls, vocab_size: int, seed: int = 0, sharpness: float = 1.5) -> Self:
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab_size, vocab_size, vocab_size)
        return cls(sharpness * torch.randn(shape, dtype=torch.float64, generator=generator))

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> TableCache:
        ids = torch.zeros(rows, slots, dtype=torch.long, device=self.table.device)
        return TableCache(ids, len(taps))

    def admit(
        self,
        cache: TableCache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        parts = []
        for row, prompt, k in zip(rows, prompts, prefix_lengths.tolist(), strict=True):
            cache.slots[row, k : len(prompt) - 1] = prompt[k:-1]
            parts.append(prompt[k:-1])
        return self._features(cache, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))

    def score(self, cache: TableCache, batch: Batch, draft: Draft) -> TargetOutput:
        index = torch.arange(draft.tokens.shape[1] + 1, device=batch.ids.device)
        first = batch.length[:, None] - 1
        at = (first + index).clamp(max=cache.slots.shape[1] - 1)
        ids = torch.cat([batch.anchor[:, None], draft.tokens], dim=1)
        cache.slots.scatter_(1, at, ids)
        cache.tree = draft.parents is not None
        last = cache.slots.gather(1, at)
        parent = first + F.pad(parent_rows(draft), (1, 0), value=-1)
        earlier = parent.clamp(0, cache.slots.shape[1] - 1)
        before = torch.where(parent >= 0, cache.slots.gather(1, earlier), 0)
        return TargetOutput(self.table[before, last], self._features(cache, ids))

    def keep(self, cache: TableCache, batch: Batch, verification: Verification) -> None:
        if cache.tree:
            path = verification.path
            first = batch.length[:, None] - 1
            index = torch.arange(path.shape[1], device=path.device)
            slots = torch.stack([first + path, first + index]).clamp(max=cache.slots.shape[1] - 1)
            cache.slots.scatter_(1, slots[1], cache.slots.gather(1, slots[0]))

    def _features(
        self, cache: TableCache, ids: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N D"] | None:
        """One-hot tokens stand for hidden states, once per tap."""
        if not cache.taps:
            return None
        hidden = F.one_hot(ids, self.info.vocab_size).double()
        return hidden.repeat(1, 1, cache.taps)

    def law(self, prompt: Sequence[int], length: int) -> dict[tuple[int, ...], float]:
        """Every continuation of `length` tokens with its exact probability at temperature 1."""
        p = torch.softmax(self.table, dim=-1)
        result = {}
        for tail in itertools.product(range(self.info.vocab_size), repeat=length):
            row = [0, *prompt, *tail]
            mass = 1.0
            for i in range(len(prompt) + 1, len(row)):
                mass *= float(p[row[i - 2], row[i - 1], row[i]])
            result[tail] = mass
        return result
