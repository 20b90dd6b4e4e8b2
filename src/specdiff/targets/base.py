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

    Invariant: between rounds a row's cache holds exactly `length - 1` entries; each round's input starts at the anchor. A row
    that is done is scored like any other, and so written from `length - 1` on; what lies before stays.
    """

    info: TargetInfo

    @abstractmethod
    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Cache:
        """A cache for `rows` rows of `slots` positions; `taps` are the layers whose hidden states come back as features."""

    @abstractmethod
    def admit(
        self,
        cache: Cache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        kept: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        """Fill `rows` with prompt[:-1]; returns its features, right-padded, where there are taps.

        kept: of each prompt, how many of the first tokens the row held at the same positions when it was released, and so need
            not be read again. 0: none; at most len(prompt) - 1; always 0 where there are taps. To ignore it is lawful.
        """

    @abstractmethod
    def score(self, cache: Cache, batch: Batch, draft: Draft) -> TargetOutput:
        """One pass over [anchor, draft tokens]."""

    @abstractmethod
    def keep(self, cache: Cache, batch: Batch, verification: Verification) -> None:
        """Keep the accepted path's entries. Rollback is not advancing `length`: the rest is overwritten next round."""

    @abstractmethod
    def release(self, cache: Cache, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left. What the first `length - 1` entries hold may be asked for again, by `kept`."""
