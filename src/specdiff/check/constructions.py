"""Ways to come by a draft, lawful and not, each enumerated whole: how far the text then is from the target's law.

The unlawful ones are what a reader of the literature would try first. They live here, as examples to be caught, and nowhere else.

Shapes: D drafts a recipe can come up with, K drafted tokens, N = K + 1, V vocabulary. A text of n tokens is one index below V**n,
first token most significant.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.types import Draft
from specdiff.verify import PLANS, Plan

V, K = 3, 3
CASES = 8  # random targets and networks each recipe is tried on


class Case:
    """A random target, and a random network that a recipe may ask about its canvas of K positions.

    `p[k]` [V**k, V] is the target after each k tokens; `alone[k]` what the network says of position k on an empty canvas, `after[k][x]`
    once its left neighbour is x, `beside[k][x]` once the middle one is x. `tokens` [D, K] are all drafts.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def laws(*shape: int) -> Tensor:
            return torch.softmax(
                1.5 * torch.randn(*shape, V, dtype=torch.float64, generator=generator), dim=-1
            )

        self.p = [laws(V**k) for k in range(K + 1)]
        self.alone, self.after, self.beside = laws(K), laws(K, V), laws(K, V)
        self.tokens = torch.cartesian_prod(*[torch.arange(V)] * K)

    def target_rows(self, tokens: Int[Tensor, "D K"]) -> Float[Tensor, "D N V"]:
        return torch.stack([self.p[k][_index(tokens[:, :k])] for k in range(K + 1)], dim=1)

    def target_law(self) -> Float[Tensor, "T"]:
        law = torch.ones(1, dtype=torch.float64)
        for rows in self.p:
            law = (law[:, None] * rows).flatten()
        return law


@dataclass(frozen=True, slots=True)
class Drafts:
    """Every draft a recipe can come up with, as the verifier is told of it, and the chance of each."""

    draft: Draft
    chance: Float[Tensor, "D"]


def one_pass(case: Case) -> Drafts:
    return _drawn(case.tokens, case.alone.expand(len(case.tokens), -1, -1))


def left_to_right(case: Case) -> Drafts:
    x = case.tokens
    return _drawn(
        x,
        torch.stack(
            [case.alone[0].expand(len(x), -1), *(case.after[k][x[:, k - 1]] for k in range(1, K))],
            dim=1,
        ),
    )


def any_order(case: Case) -> Drafts:
    """The middle position first, the others in a second pass; each keeps the probabilities of the moment it was drawn."""
    x, middle = case.tokens, case.tokens[:, 1]
    return _drawn(
        x,
        torch.stack(
            [case.beside[0][middle], case.alone[1].expand(len(x), -1), case.beside[2][middle]],
            dim=1,
        ),
    )


def any_order_points(case: Case) -> Drafts:
    """What was revealed before the last pass is told as a point mass."""
    found = any_order(case)
    assert found.draft.probs is not None
    told = found.draft.probs.clone()
    told[:, 1] = torch.nn.functional.one_hot(case.tokens[:, 1], V).double()
    return Drafts(Draft(case.tokens, told), found.chance)


def any_order_marginalised(case: Case) -> Drafts:
    """Each token's true law given the ones to its left alone: summed over the joint law, which a real network cannot do."""
    chance = any_order(case).chance
    joint = [chance.view(V**k, V, -1).sum(-1) for k in range(K)]
    told = torch.stack(
        [(j / j.sum(-1, keepdim=True))[_index(case.tokens[:, :k])] for k, j in enumerate(joint)],
        dim=1,
    )
    return Drafts(Draft(case.tokens, told), chance)


def not_nested(case: Case) -> Drafts:
    """Lawful rows mixed: the first knows of the second token, while the second's pretends that nobody looked."""
    stored, lawful = any_order(case).draft.probs, any_order_marginalised(case)
    assert stored is not None and lawful.draft.probs is not None
    return Drafts(
        Draft(case.tokens, torch.cat([stored[:, :1], lawful.draft.probs[:, 1:]], dim=1)),
        lawful.chance,
    )


def best_by_draft(case: Case) -> Drafts:
    return _best_of_two(case, one_pass(case).chance)


def best_by_target(case: Case) -> Drafts:
    rows = case.target_rows(case.tokens)
    return _best_of_two(case, rows[:, :-1].gather(-1, case.tokens[..., None])[..., 0].log().sum(1))


def cut_and_dropped(case: Case) -> Drafts:
    return _cut(case, _unsure_token, kept=0)


def cut_and_kept(case: Case) -> Drafts:
    return _cut(case, _unsure_token, kept=1)


def cut_beforehand(case: Case) -> Drafts:
    return _cut(case, lambda q, x: q.amax(-1) < 0.6, kept=0)


def greedy_told_soft(case: Case) -> Drafts:
    best = _index(case.alone.argmax(-1)[None])[0]
    drawn = torch.zeros(len(case.tokens), dtype=torch.float64).index_fill(0, best, 1)
    return Drafts(one_pass(case).draft, drawn)


def sharpened_told_raw(case: Case) -> Drafts:
    sharp = case.alone**2 / (case.alone**2).sum(-1, keepdim=True)
    return Drafts(
        one_pass(case).draft, _drawn(case.tokens, sharp.expand(len(case.tokens), -1, -1)).chance
    )


# what a recipe is called in print, and whether the ratio tests (token, block) may trust what it tells; match may trust any
RECIPES: dict[str, tuple[Callable[[Case], Drafts], bool]] = {
    "one pass, positions drawn independently": (one_pass, True),
    "several passes, left to right between passes": (left_to_right, True),
    "several passes in any order, probabilities as they were when drawn": (any_order, False),
    "the same, tokens revealed before the last pass as point masses": (any_order_points, True),
    "the same, each token's law given those to its left, summed from the joint": (
        any_order_marginalised,
        True,
    ),
    "the same, the first token's law with what was seen, the others' without": (not_nested, False),
    "the better of two drafts by their own probability": (best_by_draft, False),
    "the better of two drafts by the target's probability": (best_by_target, False),
    "cut at the first unsure token, which is dropped": (cut_and_dropped, False),
    "cut behind the first unsure token, which is kept": (cut_and_kept, True),
    "cut where no token is likely, known before drawing": (cut_beforehand, True),
    "the likeliest tokens, told as if drawn": (greedy_told_soft, False),
    "drawn from sharpened probabilities, told the raw ones": (sharpened_told_raw, False),
}


def distance(recipe: Callable[[Case], Drafts], verifier: str, case: Case) -> float:
    """Total variation between the target's law of K+1 tokens and that of a round's tokens with the target's own behind them.

    Runs the real plan of `verifier` ("token", "block", "match") on every draft the recipe can come up with; no sampling.
    """
    found = recipe(case)
    plan = PLANS[verifier](found.draft, case.target_rows(found.draft.tokens))
    law = emitted_law(found, plan, case.p, longest=verifier == "block")
    return float((law - case.target_law()).abs().sum() / 2)


def emitted_law(
    found: Drafts, plan: Plan, p: list[Float[Tensor, "_ V"]], *, longest: bool
) -> Float[Tensor, "T"]:
    """The chance of each K+1 tokens when a round emits n+1 of them and the target the rest.

    longest: the longest passing prefix stands (block), else tokens stand up to the first failure (token, match).
    """
    accepted = (longest_passing if longest else first_failure)(plan.thresholds) * found.chance[
        :, None
    ]
    tokens, law = found.draft.tokens, torch.zeros(1, dtype=torch.float64)
    for n, rows in enumerate(p):
        emitted = accepted[:, n, None] * plan.residual(torch.full((len(tokens),), n))
        law = (
            (law[:, None] * rows if n else torch.zeros_like(rows))
            .index_add(0, _index(tokens[:, :n]), emitted)
            .flatten()
        )
    return law


def first_failure(thresholds: Float[Tensor, "D K"]) -> Float[Tensor, "D N"]:
    """The chance of each count when tokens are met one by one until one fails."""
    passes = torch.nn.functional.pad(thresholds.clamp(0, 1), (0, 1))
    return torch.nn.functional.pad(passes[:, :-1].cumprod(1), (1, 0), value=1) * (1 - passes)


def longest_passing(thresholds: Float[Tensor, "D K"]) -> Float[Tensor, "D N"]:
    """The chance of each count when prefixes are met from the longest down until one passes."""
    passes = torch.nn.functional.pad(thresholds.clamp(0, 1), (1, 0), value=1)
    fails = torch.nn.functional.pad(
        (1 - passes).flip(1)[:, :-1].cumprod(1).flip(1), (0, 1), value=1
    )
    return passes * fails


def table(cases: int = CASES) -> Iterator[tuple[str, bool, dict[str, tuple[float, float]]]]:
    """Every recipe's name, whether it is lawful, and the least and largest distance over random cases under each verifier."""
    for name, (recipe, lawful) in RECIPES.items():
        found = {
            v: [distance(recipe, v, Case(seed)) for seed in range(cases)]
            for v in ("token", "block", "match")
        }
        yield name, lawful, {v: (min(values), max(values)) for v, values in found.items()}


def _index(tokens: Int[Tensor, "D n"]) -> Int[Tensor, "D"]:
    return (tokens * V ** torch.arange(tokens.shape[1]).flip(0)).sum(1)


def _drawn(tokens: Int[Tensor, "D K"], probs: Float[Tensor, "D K V"]) -> Drafts:
    """Each token drawn from its row, and told so."""
    return Drafts(Draft(tokens, probs), probs.gather(-1, tokens[..., None])[..., 0].prod(1))


def _best_of_two(case: Case, score: Float[Tensor, "D"]) -> Drafts:
    own = one_pass(case)
    both = own.chance[:, None] * own.chance
    first = score[:, None] >= score
    return Drafts(own.draft, (both * first).sum(1) + (both * ~first).sum(0))


def _unsure_token(q: Float[Tensor, "D K V"], tokens: Int[Tensor, "D K"]) -> Tensor:
    return q.gather(-1, tokens[..., None])[..., 0] < 0.4


def _cut(case: Case, unsure: Callable[[Tensor, Tensor], Tensor], kept: int) -> Drafts:
    """Left-to-right drafts, cut at (kept: behind) the first position that is unsure."""
    whole = left_to_right(case)
    assert whole.draft.probs is not None
    sure = (~unsure(whole.draft.probs, case.tokens)).long().cumprod(1).sum(1)
    return Drafts(Draft(case.tokens, whole.draft.probs, (sure + kept).clamp(max=K)), whole.chance)
