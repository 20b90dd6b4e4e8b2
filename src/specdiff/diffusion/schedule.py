"""Noise schedules: total noise sigma(t) and its rate for t in [0, 1] (SEDD, section 5.1)."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Schedule(Protocol):
    """sigma(t) and d sigma / dt."""

    def total(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]: ...

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]: ...

    def time_of_masked_share(self, share: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Loglinear:
    """sigma(t) = -log(1 - (1 - eps) t): an absorbing token is MASK with probability (1 - eps) t."""

    eps: float = 1e-3

    def total(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def time_of_masked_share(self, share: float) -> float:
        """The t at which that share of a canvas is MASK on average, at most 1."""
        return min(1.0, share / (1 - self.eps))


@dataclass(frozen=True, slots=True)
class Geometric:
    """sigma(t) = sigma_min^(1 - t) sigma_max^t."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def total(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.total(t) * math.log(self.sigma_max / self.sigma_min)

    def time_of_masked_share(self, share: float) -> float:
        """The t with 1 - e^-sigma(t) = share, clamped to [0, 1]."""
        if not 0 < share < 1:  # nothing is noise in a canvas that keeps all of an earlier draft
            return float(share > 0)
        ratio = math.log(self.sigma_max / self.sigma_min)
        t = math.log(-math.log1p(-share) / self.sigma_min) / ratio
        return min(1.0, max(0.0, t))
