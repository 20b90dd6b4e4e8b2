"""Forward processes of discrete diffusion (SEDD, section 3; the SEDD code's "graph").

Shapes: B rows, L positions, V states (tokens, and MASK last when absorbing).
Scores are ratios p(y)/p(x), score[x] = 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from specdiff.errors import UsageError


@dataclass(frozen=True, slots=True)
class Process(ABC):
    """A continuous-time Markov chain on one position's states, each position on its own."""

    tokens: int

    @property
    @abstractmethod
    def states(self) -> int: ...

    @abstractmethod
    def corrupt(
        self, x0: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"], uniform: Float64[Tensor, "B L"]
    ) -> Int[Tensor, "B L"]:
        """x_t given x_0, by one uniform in [0, 1) a position."""

    @abstractmethod
    def limit(self, uniform: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """The limit of x_t under endless noise, by one uniform in [0, 1) a position."""

    @abstractmethod
    def transp_transition(
        self, x: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B L V"]:
        """Entry y: the chance that y has become x after noise sigma."""

    @abstractmethod
    def transp_rate(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Entry y: the rate at which y turns into x."""

    @abstractmethod
    def staggered_score(
        self, score: Float[Tensor, "B L V"], dsigma: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B L V"]:
        """The score dsigma earlier, e^{-d Q} applied."""

    @abstractmethod
    def score_entropy(
        self,
        log_score: Float[Tensor, "B L V"],
        sigma: Float[Tensor, "B 1"],
        x: Int[Tensor, "B L"],
        x0: Int[Tensor, "B L"],
    ) -> Float[Tensor, "B L"]:
        """Denoising score entropy (SEDD, eq. 4) per position.

        It is 0 at the true ratio p(y|x0)/p(x|x0).
        """

    @final
    def reverse_rate(
        self, x: Int[Tensor, "B L"], score: Float[Tensor, "B L V"]
    ) -> Float[Tensor, "B L V"]:
        """The reverse process's rates out of x.

        transp_rate * score off the diagonal, minus their sum on it.
        """
        rate = self.transp_rate(x) * score
        rate = rate.scatter(-1, x[..., None], 0)
        return rate.scatter(-1, x[..., None], -rate.sum(-1, keepdim=True))


@dataclass(frozen=True, slots=True)
class Absorbing(Process):
    """Tokens turn to MASK, the last state, and stay there."""

    @property
    def states(self) -> int:
        return self.tokens + 1

    @property
    def mask_id(self) -> int:
        return self.tokens

    def corrupt(
        self, x0: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"], uniform: Float[Tensor, "B L"]
    ) -> Int[Tensor, "B L"]:
        """x_t given x_0: each token is MASK with probability 1 - e^-sigma."""
        return torch.where(uniform < -torch.expm1(-sigma), self.mask_id, x0)

    def limit(self, uniform: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """MASK everywhere."""
        return torch.full_like(uniform, self.mask_id, dtype=torch.long)

    def transp_transition(
        self, x: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B L V"]:
        """Entry y: the chance that y has become x after noise sigma.

        e^-s [y = x] + (1 - e^-s) [x = MASK].
        """
        stay = torch.exp(-sigma)[..., None]
        return stay * F.one_hot(x, self.states) + torch.where(
            (x == self.mask_id)[..., None], 1 - stay, 0
        )

    def transp_rate(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Entry y: the rate at which y turns into x."""
        onto_mask = (x == self.mask_id)[..., None].float().expand(-1, -1, self.states)
        return onto_mask - F.one_hot(x, self.states)

    def staggered_score(
        self, score: Float[Tensor, "B L V"], dsigma: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B L V"]:
        """The score dsigma earlier, e^{-d Q} applied.

        s'_y = e^d s_y, and s'_MASK gains (1 - e^d) sum_y s_y.
        """
        grown = dsigma.exp()[..., None]
        extra = (1 - grown[..., 0]) * score.sum(-1)
        score = score * grown
        return torch.cat([score[..., :-1], (score[..., -1] + extra)[..., None]], dim=-1)

    def score_entropy(
        self,
        log_score: Float[Tensor, "B L V"],
        sigma: Float[Tensor, "B 1"],
        x: Int[Tensor, "B L"],
        x0: Int[Tensor, "B L"],
    ) -> Float[Tensor, "B L"]:
        """Denoising score entropy (SEDD, eq. 4) per position.

        sum_{y != MASK} s_y - r log s_{x0} + r (log r - 1), with r = 1/(e^sigma - 1). Only masked
        positions count; the others are 0.
        """
        r = 1 / torch.expm1(sigma.expand_as(x))
        positive = log_score[..., :-1].exp().sum(-1)
        negative = r * log_score.gather(-1, x0[..., None])[..., 0]
        return torch.where(x == self.mask_id, positive - negative + r * (r.log() - 1), 0)


@dataclass(frozen=True, slots=True)
class Uniform(Process):
    """Tokens turn to any token at the same rate; there is no MASK."""

    @property
    def states(self) -> int:
        return self.tokens

    def corrupt(
        self, x0: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"], uniform: Float64[Tensor, "B L"]
    ) -> Int[Tensor, "B L"]:
        """x_t given x_0: with probability 1 - e^-sigma, a uniform token (possibly the same one).

        Below the threshold, uniform / threshold is uniform again and picks the token. That takes
        float64: the 24 bits of a float32 would leave most of 50k tokens unreachable at low noise.

        Raises:
            UsageError: `uniform` is not float64.
        """
        if uniform.dtype != torch.float64:
            raise UsageError(
                f"Uniform.corrupt needs float64 uniforms, got {uniform.dtype}: "
                "draw them with dtype=torch.float64"
            )
        replaced = -torch.expm1(-sigma.double())
        # below V: of doubles u < p, u/p rounds to 1 - 2^-53 at most
        token = (uniform / replaced * self.tokens).long()
        return torch.where(uniform < replaced, token, x0)

    def limit(self, uniform: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Any token, all equally likely."""
        return (uniform * self.tokens).long()

    def transp_transition(
        self, x: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B L V"]:
        """Entry y: the chance that y has become x after noise sigma.

        e^-s [y = x] + (1 - e^-s)/V.
        """
        onto = (-torch.expm1(-sigma) / self.states).expand_as(x)[..., None]
        stay = torch.exp(-sigma).expand_as(x)[..., None]
        return onto.expand(*x.shape, self.states).scatter(-1, x[..., None], stay + onto)

    def transp_rate(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Entry y: the rate at which y turns into x, 1/V - [y = x]."""
        rate = torch.full((*x.shape, self.states), 1 / self.states, device=x.device)
        return rate.scatter(-1, x[..., None], 1 / self.states - 1)

    def staggered_score(
        self, score: Float[Tensor, "B L V"], dsigma: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B L V"]:
        """The score dsigma earlier, e^{-d Q} applied: s'_y = e^d s_y + (1 - e^d)/V sum_z s_z."""
        mean = score.mean(-1, keepdim=True)
        return score * dsigma.exp()[..., None] - torch.expm1(dsigma)[..., None] * mean

    def score_entropy(
        self,
        log_score: Float[Tensor, "B L V"],
        sigma: Float[Tensor, "B 1"],
        x: Int[Tensor, "B L"],
        x0: Int[Tensor, "B L"],
    ) -> Float[Tensor, "B L"]:
        """Denoising score entropy (SEDD, eq. 4) per position.

        1/V sum_{y != x} s_y - r_y log s_y + r_y (log r_y - 1). With a = 1 + V/(e^sigma - 1), the
        true ratio r_y is 1/a when x = x0; otherwise it is a for y = x0 and 1 for all others.
        """
        V = self.states
        # a - 1; the authors' 1/a = 1 - V/(e^sigma - 1 + V) cancels in fp32
        excess = V / torch.expm1(sigma.expand_as(x))
        log_a = torch.log1p(excess)
        ratio = 1 / (1 + excess)
        # s_x = 1 is left out before summing: next to it, scores of about 1/a ~ 1e-10 would be lost
        positive = log_score.exp().scatter(-1, x[..., None], 0).sum(-1) / V
        at_x = log_score.gather(-1, x[..., None])[..., 0]
        at_x0 = log_score.gather(-1, x0[..., None])[..., 0]
        plain = (log_score.sum(-1) - at_x) / V
        same = -ratio * plain - (V - 1) / V * ratio * (log_a + 1)
        moved = -plain - at_x0 * excess / V + ((1 + excess) * (log_a - 1) - (V - 2)) / V
        return positive + torch.where(x == x0, same, moved)
