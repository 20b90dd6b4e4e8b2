"""Counter-based randomness: every draw is a hash of what it is for.

It needs no state and no order of evaluation. A draw's key is (row seed, round number, purpose,
draw index, absolute position). The round number keeps the draws of a position apart when it is
drafted again; the draw index separates diffusion steps and candidates. The target's own draws
(`TARGET`) leave round and index out: under `match` the text is a function of target, prompt and
seed alone.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.arguments import int64
from specdiff.devices import exact
from specdiff.types import Batch

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
MASK64 = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw decides. Different purposes are independent streams."""

    DRAFT = 1
    RATIO = 2
    RESIDUAL = 3
    TARGET = 4


def _shift(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """The logical right shift; torch's >> is the arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """splitmix64's output function (Steele, Lea, Flood 2014), on wrapping int64."""
    x = x + int64(GOLDEN)
    x = (x ^ _shift(x, 30)) * int64(MIX1)
    x = (x ^ _shift(x, 27)) * int64(MIX2)
    return x ^ _shift(x, 31)


def row_seed(seed: int, row: int) -> int:
    """The 64-bit seed of row `row` of a request: row 0 of a list is the single prompt."""
    x = (seed * MIX1 + (row + 1) * GOLDEN) & MASK64
    x = ((x ^ (x >> 30)) * MIX1) & MASK64
    x = ((x ^ (x >> 27)) * MIX2) & MASK64
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class Noise:
    """The uniforms of one round. Position 0 of a draw is the row's first undecided position."""

    seed: Int[Tensor, "B"]
    round: Int[Tensor, "B"]
    position: Int[Tensor, "B"]

    @classmethod
    def of(cls, batch: Batch) -> Self:
        return cls(batch.seed, batch.round, batch.length)

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Float[Tensor, "B n"]:
        """n draws a row in [0, 1); entry k is for absolute position `length + k`.

        They are float64 with 53 random bits, if the device has float64.
        """
        return _to_unit(self._hash(purpose, n, index))

    def shared(self, n: int, vocab_size: int) -> Float[Tensor, "B n V"]:
        """Standard Gumbel noise keyed by (seed, position, token) alone.

        Target and drafter may share it under `match-gumbel`.
        """
        token = torch.arange(vocab_size, device=self.seed.device)
        u = _to_unit(_mix(self._hash(Purpose.TARGET, n, 0)[..., None] ^ _mix(token)))
        return -(-(u.clamp(min=2.0**-54)).log()).log()

    def _hash(self, purpose: Purpose, n: int, index: int) -> Int[Tensor, "B n"]:
        own = purpose is not Purpose.TARGET
        key = _mix(_mix(self.seed) + (int(purpose) << 32) + (index if own else 0))
        key = _mix(key + self.round) if own else key
        return _mix(key[:, None] + self.position[:, None] + torch.arange(n, device=key.device))


def _to_unit(x: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    dtype = exact(x.device)
    bits = 53 if dtype == torch.float64 else 24  # the precision of the dtype
    return _shift(x, 64 - bits).to(dtype) * 2.0**-bits
