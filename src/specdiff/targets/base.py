"""The target interface: score a draft in one pass, and keep the entries of accepted tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from specdiff.types import Batch, Draft, TargetInfo, TargetOutput, Verification

Cache = TypeVar("Cache")


class Target(ABC, Generic[Cache]):
    """A model whose distribution is preserved.

    Large mutable buffers live in the cache that `open` returns, never on self.

    Invariant: between rounds a row's cache holds exactly `length - 1` entries; each round's input
    starts at the anchor. A row that is done is scored like any other, and so written from
    `length - 1` on; the entries before that stay.

    `trees`: `score` follows `Draft.parents`, and `keep` moves the entries of the accepted path to
    consecutive positions. Otherwise drafters of trees are refused.
    """

    info: TargetInfo
    trees: bool = False

    @property
    def position_bytes(self) -> int:
        """Bytes of the cache for one position of a row (0: unknown)."""
        return 0

    @abstractmethod
    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Cache:
        """A cache for `rows` rows of `slots` positions.

        `taps` are the layers whose hidden states are returned as features.
        """

    @abstractmethod
    def admit(
        self,
        cache: Cache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        """Fill `rows` with prompt[:-1]. Where there are taps, returns the features of the tokens
        from prefix_lengths on, right-padded.

        prefix_lengths: how many of each prompt's first tokens the row held at the same positions
            when it was released, and so need not be read again. 0: none; at most len(prompt) - 1.
            It may be ignored, though features always begin there.
        """

    @abstractmethod
    def score(self, cache: Cache, batch: Batch, draft: Draft) -> TargetOutput:
        """One pass over [anchor, draft tokens].

        Each token follows the one before it; in a tree, the node that `draft.parents` names.
        """

    def keep(self, cache: Cache, batch: Batch, verification: Verification) -> None:
        """Keep the accepted path's entries.

        By default nothing is done: the accepted tokens of a chain are in place already, and
        rejected ones are overwritten in the next round because `length` has not passed them.
        """

    def release(self, cache: Cache, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left. By default nothing is done.

        The first `length - 1` entries may be used again, see `prefix_lengths`.
        """


class TargetWrapper(Target[Cache]):
    """A target around `inner` that forwards everything; a subclass overrides what it changes."""

    def __init__(self, inner: Target[Cache]) -> None:
        self.inner = inner
        self.info = inner.info
        self.trees = inner.trees

    @property
    def position_bytes(self) -> int:
        return self.inner.position_bytes

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Cache:
        return self.inner.open(rows, slots, taps)

    def admit(
        self,
        cache: Cache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        return self.inner.admit(cache, rows, prompts, prefix_lengths)

    def score(self, cache: Cache, batch: Batch, draft: Draft) -> TargetOutput:
        return self.inner.score(cache, batch, draft)

    def keep(self, cache: Cache, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache, batch, verification)

    def release(self, cache: Cache, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache, rows)
