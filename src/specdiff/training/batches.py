"""Training batches: one frozen dataclass per kind, moved to a device as a whole.

Shapes: B rows, L tokens, N canvases or blocks a row, H width of the target, T layers.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TrainingBatch(Protocol):
    """What the trainer needs of a batch; the task that prepared it knows its fields."""

    @property
    def lengths(self) -> Int[Tensor, "B"]: ...

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True, slots=True)
class TensorData:
    """A dataclass of tensors, of other such dataclasses, and of plain values."""

    def to(self, device: torch.device) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{
                name: value.to(device)
                for name, value in values.items()
                if isinstance(value, Tensor | TensorData)
            },
        )


@dataclass(frozen=True, slots=True)
class RowBatch(TensorData):
    """Corpus rows, padded with 0; with a teacher, the target's final states and log normalizers."""

    ids: Int[Tensor, "B L"]
    lengths: Int[Tensor, "B"]
    prompts: Int[Tensor, "B"]  # lengths of the prompts
    greedy: Bool[Tensor, "B"]  # written at temperature 0
    states: Float[Tensor, "B L H"] | None = None
    log_z: Float[Tensor, "B L"] | None = None


@dataclass(frozen=True, slots=True)
class CanvasBatch(TensorData):
    """Rows, and where their canvases of `draft_len` tokens are."""

    rows: RowBatch
    anchors: Int[Tensor, "B N"]  # the last clean token each canvas sees
    revealed: Int[Tensor, "B N"]  # how many of its leading tokens are revealed
    draft_len: int
    features: Float[Tensor, "B L T*H"] | None = None  # for a network with taps

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        return self.rows.lengths


@dataclass(frozen=True, slots=True)
class BlockBatch(TensorData):
    """Rows with states of the target's layers, and the anchors of their blocks of `draft_len`."""

    rows: RowBatch
    features: Float[Tensor, "B L T*H"]
    anchors: Int[Tensor, "B N"]  # the last token each block knows; its context ends before it
    draft_len: int

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        return self.rows.lengths


@dataclass(frozen=True, slots=True)
class Corrupted(TensorData):
    """Cropped rows, partly hidden at noise level t: the input of a bidirectional network."""

    x0: Int[Tensor, "B L"]
    x: Int[Tensor, "B L"]
    t: Float[Tensor, "B"]
    real: Bool[Tensor, "B L"]  # not padding
    start: Int[Tensor, "B"]  # where the crop begins in its row


@dataclass(frozen=True, slots=True)
class HiddenEnd(TensorData):
    """The canvas at the end of each cropped row: 0, 1, ... along it, -1 elsewhere."""

    index: Int[Tensor, "B L"]
    draft_len: int


@dataclass(frozen=True, slots=True)
class CorruptedBatch(TensorData):
    """Rows and their corruption: a hidden end as in drafting, or uniform t (`end` is None)."""

    rows: RowBatch
    corrupted: Corrupted
    end: HiddenEnd | None

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        return self.rows.lengths
