"""Prompts that are being read: in pieces, with the features that their drafter is still to be
given, or together with others.

Shapes: R rows, N positions of a piece, W features, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.request import Slot


@dataclass(slots=True)
class Reading:
    """A request whose first `start` prompt tokens are in the target's cache.

    features: of those, the ones that the row's drafter has not read, in pieces; empty without taps.
    """

    slot: Slot
    start: int
    features: list[Float[Tensor, "N D"]] = field(default_factory=list)

    def again(self) -> "Reading":
        """The same request in a new row, which holds nothing."""
        return Reading(replace(self.slot, reused=0), 0)


def held(readings: Sequence[Reading]) -> tuple[Float[Tensor, "R W D"], Int[Tensor, "R"]] | None:
    """The features of each reading, right-padded, and their numbers; None if there are none."""
    pieces = [piece for reading in readings for piece in reading.features]
    if not pieces:
        return None
    empty = pieces[0][:0]
    rows = [torch.cat([empty, *reading.features]) for reading in readings]
    sizes = torch.tensor([len(row) for row in rows], device=empty.device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), sizes


def alike(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Groups of indices, shortest first, each of at most `tokens` tokens once it is padded.

    One long prompt among many would have all of them padded to its length. All of them are one
    group if they fit; a longer one is a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[index] > tokens:
            yield sorted(group)
            group = []
        group.append(index)
    if group:
        yield sorted(group)
