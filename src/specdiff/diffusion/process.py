"""Forward processes of discrete diffusion (SEDD, section 3; the SEDD code's "graph").

Shapes: B rows, L positions, V states (tokens, and MASK last when absorbing). Scores are ratios p(y)/p(x), score[x] = 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Absorbing:
    """Tokens turn to MASK, the last state, and stay there."""

    tokens: int

    @property
    def states(self) -> int:
        return self.tokens + 1

    @property
    def mask_id(self) -> int:
        return self.tokens

    def corrupt(self, x0: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"], uniform: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """x_t given x_0: each token is MASK with probability 1 - e^-sigma."""
        return torch.where(uniform < -torch.expm1(-sigma), self.mask_id, x0)

    def transp_transition(self, x: Int[Tensor, "B L"], sigma: Float[Tensor, "B 1"]) -> Float[Tensor, "B L V"]:
        """Entry y: the chance that y has become x after noise sigma, e^-s [y = x] + (1 - e^-s) [x = MASK]."""
        stay = torch.exp(-sigma)[..., None]
        return stay * F.one_hot(x, self.states) + torch.where((x == self.mask_id)[..., None], 1 - stay, 0)

    def transp_rate(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Entry y: the rate at which y turns into x."""
        onto_mask = (x == self.mask_id)[..., None].float().expand(-1, -1, self.states)
        return onto_mask - F.one_hot(x, self.states)

    def staggered_score(self, score: Float[Tensor, "B L V"], dsigma: Float[Tensor, "B 1"]) -> Float[Tensor, "B L V"]:
        """The score dsigma earlier, e^{-d Q} applied: s'_y = e^d s_y, and s'_MASK gains (1 - e^d) sum_y s_y."""
        grown = dsigma.exp()[..., None]
        extra = (1 - grown[..., 0]) * score.sum(-1)
        score = score * grown
        return torch.cat([score[..., :-1], (score[..., -1] + extra)[..., None]], dim=-1)

    def reverse_rate(self, x: Int[Tensor, "B L"], score: Float[Tensor, "B L V"]) -> Float[Tensor, "B L V"]:
        """The reverse process's rates out of x: transp_rate * score off the diagonal, minus their sum on it."""
        rate = self.transp_rate(x) * score
        rate = rate.scatter(-1, x[..., None], 0)
        return rate.scatter(-1, x[..., None], -rate.sum(-1, keepdim=True))

    def score_entropy(
        self, log_score: Float[Tensor, "B L V"], sigma: Float[Tensor, "B 1"], x: Int[Tensor, "B L"], x0: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        """Denoising score entropy (SEDD, eq. 4) per position: sum_{y != MASK} s_y - r log s_{x0} + r (log r - 1), r = 1/(e^sigma - 1).

        Only masked positions count; the others are 0.
        """
        r = 1 / torch.expm1(sigma.expand_as(x))
        positive = log_score[..., :-1].exp().sum(-1)
        negative = r * log_score.gather(-1, x0[..., None])[..., 0]
        return torch.where(x == self.mask_id, positive - negative + r * (r.log() - 1), 0)
