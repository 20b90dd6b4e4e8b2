"""The target's role: score a draft in one pass, and keep what was accepted."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from specdiff.types import Batch, Draft, TargetInfo, TargetOutput, Verification

Cache = TypeVar("Cache")


class Target(ABC, Generic[Cache]):
    """A model whose law is preserved. Big mutable buffers live in the cache it hands out, never on self.

    Invariant: between rounds a row's cache holds exactly `length - 1` entries; each round's input starts at the anchor.
    """

    info: TargetInfo

    @abstractmethod
    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Cache:
        """A cache for `rows` rows of `slots` positions; `taps` are the layers whose hidden states come back as features."""

    @abstractmethod
    def admit(self, cache: Cache, rows: Int[Tensor, "R"], prompts: Sequence[Int[Tensor, "L"]]) -> Float[Tensor, "R N D"] | None:
        """Fill `rows` with prompt[:-1]; returns its features, right-padded, where there are taps."""

    @abstractmethod
    def score(self, cache: Cache, batch: Batch, draft: Draft) -> TargetOutput:
        """One pass over [anchor, draft tokens]."""

    @abstractmethod
    def keep(self, cache: Cache, batch: Batch, verification: Verification) -> None:
        """Keep the accepted path's entries. Rollback is not advancing `length`: the rest is overwritten next round."""

    @abstractmethod
    def release(self, cache: Cache, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left."""
