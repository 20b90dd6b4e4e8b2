"""The law of one round, enumerated in float64.

Every draft, every number of accepted tokens, every following token.

Shapes: C cases, D drafts, T texts, K drafted tokens, V vocabulary, I columns; N prefixes
(in Cases) or K + 1 (in rows). A prefix of k tokens is one index below V**k, first token most
significant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.types import Draft

COLUMNS = ("columns", "columns disjoint", "columns zeros")  # probabilities of some ids only
SHAPES = (
    *("factorised", "left-to-right", "two groups", "equal", "disjoint", "zeros", "point"),
    *COLUMNS,
)


@dataclass(frozen=True)
class Cases:
    """`p[k]` and `q[k]` [C, V**k, V] are conditional on each prefix.

    `chance` [C, V**K] is that of each whole draft.
    `q` None: the drafts carry no probabilities, whatever `chance` is. `size` None: all K count.
    `columns`: the drafts carry the probabilities of these ids; `q` is 0 at all others.
    """

    p: list[Float[Tensor, "C N V"]]
    q: list[Float[Tensor, "C N V"]] | None
    chance: Float[Tensor, "C D"]
    size: Int[Tensor, "C"] | None
    columns: Int[Tensor, "I"] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """V and K."""
        return self.p[0].shape[-1], len(self.p) - 1

    @classmethod
    def random(
        cls, shape: str, V: int, K: int, count: int, *, ragged: bool = False, seed: int = 0
    ) -> "Cases":
        generator = torch.Generator().manual_seed(seed)
        p = [_rows(count, V**k, V, generator) for k in range(K + 1)]
        q = [_rows(count, V**k, V, generator) for k in range(K)]
        if shape == "factorised":
            q = [_rows(count, 1, V, generator).expand(-1, V**k, -1) for k in range(K)]
        elif (
            shape == "two groups"
        ):  # the first half independent, the second conditional on the first
            q = [
                q[K // 2 if k >= K // 2 else 0].repeat_interleave(
                    V ** (k - (K // 2 if k >= K // 2 else 0)), dim=1
                )
                for k in range(K)
            ]
        elif shape == "equal":
            q = p[:K]
        elif shape == "disjoint":
            even = torch.arange(V) % 2 == 0
            p = [_normalize(row * even) for row in p]
            q = [_normalize(row * ~even) for row in q]
        elif shape == "zeros":
            p = [_thinned(row, generator) for row in p]
            q = [_thinned(row, generator) for row in q]
        columns = None
        if shape in COLUMNS:
            # half of the ids, not the first one: an index is never its own id
            columns = torch.arange(V)[1::2] if shape == "columns disjoint" else torch.arange(1, V)
            inside = torch.zeros(V).index_fill(0, columns, 1)
            q = [_normalize(row * inside) for row in q]
            if shape == "columns disjoint":
                p = [_normalize(row * (1 - inside)) for row in p]
            elif shape == "columns zeros":
                p = [_thinned(row, generator) for row in p]
                q = [_thinned(row, generator, inside) for row in q]
        size = torch.randint(0, K + 1, (count,), generator=generator) if ragged else None
        if shape == "point":
            return cls(p, None, _rows(count, 1, V**K, generator)[:, 0], size)
        return cls(p, q, _chained(q, count, V), size, columns)

    def rows(self) -> tuple[Draft, Float[Tensor, "R N V"]]:
        """Every draft of every case as one batch row.

        Rows from `size` on keep their tokens and probabilities: nothing may read them.
        """
        V, K = self.sizes
        count = len(self.chance)
        index = torch.arange(V**K)
        tokens = (
            torch.stack([index // V ** (K - 1 - k) % V for k in range(K)], dim=-1)
            if K
            else index.new_zeros(1, 0)
        )
        p = torch.stack([self.p[k][:, index // V ** (K - k)] for k in range(K + 1)], dim=2)
        probs = None
        if self.q is not None:
            probs = (
                torch.stack([self.q[k][:, index // V ** (K - k)] for k in range(K)], dim=2)
                if K
                else p[:, :, :0]
            )
            probs = probs.flatten(0, 1)
            probs = probs if self.columns is None else probs[..., self.columns]
        size = None if self.size is None else self.size.repeat_interleave(V**K)
        return Draft(tokens.repeat(count, 1), probs, size, columns=self.columns), p.flatten(0, 1)

    def target_law(self) -> Float[Tensor, "C T"]:
        """The chance of each K+1 tokens under p."""
        return _chained(self.p, len(self.chance), self.sizes[0])


def emitted_law(
    cases: Cases, plan: Any, *, longest: bool
) -> tuple[Float[Tensor, "C T"], Float[Tensor, "C"]]:
    """The chance of each K+1 tokens: n+1 from the round and the rest from p; and the expected n.

    longest: the draw rule is "the longest passing prefix" (block), else "up to the first failure"
    (token, match).
    """
    V, K = cases.sizes
    count = len(cases.chance)
    accepted = (longest_passing if longest else first_failure)(plan.thresholds)
    law = torch.zeros(count, 1, dtype=torch.float64)
    mean = torch.zeros(count, dtype=torch.float64)
    for n in range(K + 1):
        mass = cases.chance * accepted[:, n].view(count, V**K)
        mass = torch.where(
            cases.chance * mass > 0, mass, 0
        )  # drafts that cannot occur may hold anything, NaN too
        following = plan.residual(torch.full((count * V**K,), n)).view(count, V**K, V)
        emitted = torch.where(mass[..., None] > 0, mass[..., None] * following, 0)
        emitted = emitted.view(count, V**n, V ** (K - n), V).sum(2).flatten(1)
        mean = mean + n * mass.sum(1)
        law = emitted + ((law[..., None] * cases.p[n]).flatten(1) if n else 0)
    return law, mean


def first_failure(thresholds: Float[Tensor, "R K"]) -> Float[Tensor, "R N"]:
    """The chance of each count when tokens are met one by one until one fails."""
    passes = torch.nn.functional.pad(thresholds.clamp(0, 1), (0, 1))
    return torch.nn.functional.pad(passes[:, :-1].cumprod(1), (1, 0), value=1) * (1 - passes)


def longest_passing(thresholds: Float[Tensor, "R K"]) -> Float[Tensor, "R N"]:
    """The chance of each count when prefixes are met from the longest down until one passes."""
    passes = torch.nn.functional.pad(thresholds.clamp(0, 1), (1, 0), value=1)
    fails = torch.nn.functional.pad(
        (1 - passes).flip(1)[:, :-1].cumprod(1).flip(1), (0, 1), value=1
    )
    return passes * fails


def worst(law: Float[Tensor, "C T"], cases: Cases) -> float:
    """The largest error of any probability in any case."""
    return float((law - cases.target_law()).abs().max())


PlanFunction = Callable[[Draft, Float[Tensor, "R N V"]], Any]


def error(plan: PlanFunction, cases: Cases, *, longest: bool) -> float:
    return worst(emitted_law(cases, plan(*cases.rows()), longest=longest)[0], cases)


def _rows(count: int, prefixes: int, V: int, generator: torch.Generator) -> Float[Tensor, "C N V"]:
    """Random laws, from nearly one-hot to nearly flat."""
    sharpness = 4 * torch.rand(count, prefixes, 1, dtype=torch.float64, generator=generator)
    return torch.softmax(
        sharpness * torch.randn(count, prefixes, V, dtype=torch.float64, generator=generator),
        dim=-1,
    )


def _thinned(
    rows: Float[Tensor, "C N V"],
    generator: torch.Generator,
    inside: Float[Tensor, "V"] | None = None,
) -> Float[Tensor, "C N V"]:
    """About half of the tokens, at least one, keep their chance; in some rows only that one."""
    draws = torch.rand(rows.shape, generator=generator)
    if inside is not None:
        draws = torch.where(inside > 0, draws, 2)
    return _normalize(rows * ((draws < 0.5) | (draws == draws.amin(-1, keepdim=True))))


def _normalize(rows: Float[Tensor, "C N V"]) -> Float[Tensor, "C N V"]:
    return rows / rows.sum(-1, keepdim=True)


def _chained(rows: list[Float[Tensor, "C N V"]], count: int, V: int) -> Float[Tensor, "C T"]:
    law = torch.ones(count, 1, dtype=torch.float64)
    for conditional in rows:
        law = (law[..., None] * conditional).flatten(1)
    return law
