"""The drafter's role: propose tokens, and say from which law each was drawn."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from jaxtyping import Int
from torch import Tensor

from specdiff.noise import Noise
from specdiff.types import Context, Draft

State = TypeVar("State")


class Drafter(ABC, Generic[State]):
    """Implement the abstract methods in one file; run it as `--drafter ./mine.py:Mine`. Wrap, never override.

    `taps`: target layers whose hidden states it reads (they come in `Context.features`).
    `draft_len`: the K it works best at, used where the user names none.
    All that changes while decoding lives in the state `open` hands out, never on self: two streams never meet.
    """

    taps: tuple[int, ...] = ()
    draft_len: int = 8

    @abstractmethod
    def open(self, rows: int, slots: int) -> State:
        """State for `rows` rows of at most `slots` positions."""

    @abstractmethod
    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        """New requests sit in `rows` (their prompts are in `context.batch`): forget what the rows held before."""

    @abstractmethod
    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        """`draft_len` tokens a row. `Draft.probs` must be the law they were really drawn from, under the request's
        sampling parameters or not; all randomness comes from `noise` with `Purpose.DRAFT`, one index per draw."""

    @abstractmethod
    def release(self, state: State, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left."""


class NoDrafter(Drafter[None]):
    """Plain decoding: every round drafts nothing."""

    draft_len = 0

    def open(self, rows: int, slots: int) -> None:
        return None

    def admit(self, state: None, context: Context, rows: Int[Tensor, "R"]) -> None:
        return None

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return Draft.empty(context.batch)

    def release(self, state: None, rows: Int[Tensor, "R"]) -> None:
        return None
