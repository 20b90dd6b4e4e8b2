"""The drafter interface: propose tokens, and report the distribution each one was drawn from."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar, cast

from jaxtyping import Int
from torch import Tensor

from specdiff.noise import Noise
from specdiff.types import Context, Draft

State = TypeVar("State")
TEMPERATURES = (1.0, 0.7, 0.3, 0.0)  # draft temperatures to choose from


class Drafter(ABC, Generic[State]):
    """Implement `propose` in one file and run it as `--drafter ./mine.py:Mine`.

    A drafter that remembers nothing between rounds is a `Drafter[None]` and needs no other method.
    One that does keeps it in the state that `open` returns, never on self, so that two streams
    never share anything. To change another drafter, wrap it (`DrafterWrapper`).

    `taps`: target layers whose hidden states it reads (they arrive in `Context.features`).
    `draft_len`: the K it works best at, used where the user names none.
    `keeps_features`: what its state holds of the features before a position depends on the tokens
    before that position alone, and stays valid when the row's next request shares them: it is then
    given the features of the rest only. Else the target reads such prompts whole.
    `branches`: the longest draft of each of two ways to draft, between which it decides row by row
    (empty: one, of `draft_len`); it says which in `Draft.branches`, and keeps to the lengths of
    `Context.plan`.
    `temperatures`: draft temperatures that a rule may choose from, the first one to begin with.
    They reach it as a factor of the request's own temperature.
    `reproducible`: drafts depend on nothing but the row's text and noise. Otherwise a seed gives
    the same text only where no draft can change it (`match`, temperature 0).
    `trees`: its drafts may be trees (`Draft.parents`), of at most `draft_len` nodes.
    """

    taps: tuple[int, ...] = ()
    draft_len: int = 8
    keeps_features: bool = False
    branches: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)
    reproducible: bool = True
    trees: bool = False

    def open(self, rows: int, slots: int) -> State:
        """State for `rows` rows of at most `slots` positions. By default None."""
        return cast(State, None)

    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        """New requests sit in `rows` (their prompts are in `context.batch`): forget what the rows
        held before. By default nothing is done."""

    @abstractmethod
    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        """`draft_len` tokens a row. `Draft.probs` must be the distributions they were really drawn
        from, whether the request's sampling parameters were applied or not; all randomness comes
        from `noise` with `Purpose.DRAFT`, one index per draw."""

    def consumed(self, state: State) -> bool:
        """Whether the last `propose` read its features (the default). Otherwise they come again
        with the next context, those of the round after them."""
        return True

    def release(self, state: State, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left. By default nothing is done."""

    def resume(
        self, state: State, earlier: State, rows: Int[Tensor, "R"], sources: Int[Tensor, "R"]
    ) -> None:
        """The requests in the rows `sources` of an `earlier` state, which is closed, go on in
        `rows` of `state`, which may have more rows or fewer. They were admitted with their texts so
        far. Take over what drafts depend on other than the text. By default nothing is done."""


class DrafterWrapper(Drafter[State]):
    """A drafter around `inner` that forwards everything; a subclass overrides what it changes."""

    def __init__(self, inner: Drafter[State]) -> None:
        self.inner = inner
        self.taps = inner.taps
        self.draft_len = inner.draft_len
        self.keeps_features = inner.keeps_features
        self.branches = inner.branches
        self.temperatures = inner.temperatures
        self.reproducible = inner.reproducible
        self.trees = inner.trees

    def open(self, rows: int, slots: int) -> State:
        return self.inner.open(rows, slots)

    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.inner.admit(state, context, rows)

    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        return self.inner.propose(context, state, noise, draft_len)

    def consumed(self, state: State) -> bool:
        return self.inner.consumed(state)

    def release(self, state: State, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(state, rows)

    def resume(
        self, state: State, earlier: State, rows: Int[Tensor, "R"], sources: Int[Tensor, "R"]
    ) -> None:
        self.inner.resume(state, earlier, rows, sources)


def temperatures(draft_temperature: float) -> tuple[float, ...]:
    """What a rule may multiply a drafter's own temperature by: by nothing but 1 if that was set."""
    return TEMPERATURES if draft_temperature == 1 else (1.0,)


class NoDrafter(Drafter[None]):
    """Plain decoding: every round drafts nothing."""

    draft_len = 0

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return Draft.empty(context.batch)
