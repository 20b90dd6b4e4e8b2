"""A drafter on another device than its target: inputs are moved there, drafts are moved back."""

from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.devices import moved
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.noise import Noise
from specdiff.types import Context, Draft

State = TypeVar("State")


class OnDevice(DrafterWrapper[State]):
    """`inner`, which lives on `device`, for a target on `home`.

    The draft's tokens and probabilities are copied back unchanged.
    """

    def __init__(self, inner: Drafter[State], device: torch.device, home: torch.device) -> None:
        super().__init__(inner)
        self.device = device
        self.home = home

    def admit(self, state: State, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.inner.admit(state, moved(context, self.device), rows.to(self.device))

    def propose(self, context: Context, state: State, noise: Noise, draft_len: int) -> Draft:
        context = moved(context, self.device)
        noise = moved(noise, self.device)
        draft: Draft = moved(self.inner.propose(context, state, noise, draft_len), self.home)
        return draft

    def release(self, state: State, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(state, rows.to(self.device))

    def resume(
        self, state: State, earlier: State, rows: Int[Tensor, "R"], sources: Int[Tensor, "R"]
    ) -> None:
        self.inner.resume(state, earlier, rows.to(self.device), sources.to(self.device))


def across(drafter: Drafter[State], device: torch.device, home: torch.device) -> Drafter[State]:
    """`drafter` itself where both devices are the same, at no cost; else wrapped in `OnDevice`."""
    return drafter if device == home else OnDevice(drafter, device, home)
