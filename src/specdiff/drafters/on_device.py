"""A drafter on another device than its target: what it sees is moved there, and what it proposes is moved back."""

from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.devices import moved
from specdiff.drafters.base import Drafter
from specdiff.noise import Noise
from specdiff.types import Context, Draft

State = TypeVar("State")


class OnDevice(Drafter[State]):
    """`drafter`, which lives on `device`, for a target on `home`. The draft's tokens and its law cross over unchanged."""

    def __init__(self, drafter: Drafter[State], device: torch.device, home: torch.device) -> None:
        self.drafter, self.device, self.home = drafter, device, home
        self.taps, self.draft_len = drafter.taps, drafter.draft_len

    def open(self, rows: int, slots: int) -> State:
        return self.drafter.open(rows, slots)

    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.drafter.admit(state, moved(context, self.device), rows.to(self.device))

    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        draft = self.drafter.propose(
            moved(context, self.device), state, moved(noise, self.device), draft_len
        )
        there: Draft = moved(draft, self.home)
        return there

    def release(self, state: State, rows: Int[Tensor, "R"]) -> None:
        self.drafter.release(state, rows.to(self.device))


def across(drafter: Drafter[State], device: torch.device, home: torch.device) -> Drafter[State]:
    """`drafter` itself where both are one device, so that it costs nothing there; else with everything moved."""
    return drafter if device == home else OnDevice(drafter, device, home)
