"""Recipes for drafts, lawful and not, enumerated: the distance of the text from the target's law.

The unlawful ones are what a reader of the literature would try first. They exist only here, as
examples to be caught.

Shapes: D drafts a recipe can produce, K drafted tokens, N = K + 1, V vocabulary. A text of n tokens
is one index below V**n, first token most significant.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.types import Draft
from specdiff.verify import PLANS, Plan

V = 3
K = 3
CASES = 8  # random targets and networks each recipe is tried on


class Case:
    """A random target, and a random network over a canvas of K positions.

    `p[k]` [V**k, V] is the target after each k tokens; `alone[k]` the network's law of position k
    on an empty canvas, `after[k][x]` once its left neighbor is x, `middle[k][x]` once the middle
    one is x. `tokens` [D, K] are all drafts.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def laws(*shape: int) -> Tensor:
            logits = torch.randn(*shape, V, dtype=torch.float64, generator=generator)
            return torch.softmax(1.5 * logits, dim=-1)

        self.p = [laws(V**k) for k in range(K + 1)]
        self.alone = laws(K)
        self.after = laws(K, V)
        self.middle = laws(K, V)
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
    """Every draft a recipe can produce, as the verifier gets it, and the chance of each."""

    draft: Draft
    chance: Float[Tensor, "D"]


def one_pass(case: Case) -> Drafts:
    return _drawn(case.tokens, case.alone.expand(len(case.tokens), -1, -1))


def left_to_right(case: Case) -> Drafts:
    x = case.tokens
    rows = [case.alone[0].expand(len(x), -1)]
    rows += [case.after[k][x[:, k - 1]] for k in range(1, K)]
    return _drawn(x, torch.stack(rows, dim=1))


def any_order(case: Case) -> Drafts:
    """The middle position first, the others in a second pass.

    Each keeps the probabilities of the moment it was drawn.
    """
    x = case.tokens
    middle = x[:, 1]
    first = case.alone[1].expand(len(x), -1)
    rows = [case.middle[0][middle], first, case.middle[2][middle]]
    return _drawn(x, torch.stack(rows, dim=1))


def any_order_points(case: Case) -> Drafts:
    """Tokens revealed before the last pass become point masses."""
    drafts = any_order(case)
    assert drafts.draft.probs is not None
    probs = drafts.draft.probs.clone()
    probs[:, 1] = F.one_hot(case.tokens[:, 1], V).double()
    return Drafts(Draft(case.tokens, probs), drafts.chance)


def any_order_marginalized(case: Case) -> Drafts:
    """Each token's true law given only the ones to its left.

    It is summed over the joint law, which a real network cannot do.
    """
    chance = any_order(case).chance
    rows = []
    for k in range(K):
        joint = chance.view(V**k, V, -1).sum(-1)
        law = joint / joint.sum(-1, keepdim=True)
        rows.append(law[_index(case.tokens[:, :k])])
    return Drafts(Draft(case.tokens, torch.stack(rows, dim=1)), chance)


def not_nested(case: Case) -> Drafts:
    """Lawful rows mixed: the first depends on the second token, the second's assumes none does."""
    stored = any_order(case).draft.probs
    lawful = any_order_marginalized(case)
    assert stored is not None and lawful.draft.probs is not None
    probs = torch.cat([stored[:, :1], lawful.draft.probs[:, 1:]], dim=1)
    return Drafts(Draft(case.tokens, probs), lawful.chance)


def best_by_draft(case: Case) -> Drafts:
    return _best_of_two(case, one_pass(case).chance)


def best_by_target(case: Case) -> Drafts:
    rows = case.target_rows(case.tokens)[:, :-1]
    score = rows.gather(-1, case.tokens[..., None])[..., 0].log().sum(1)
    return _best_of_two(case, score)


def cut_before_unsure(case: Case) -> Drafts:
    return _cut(case, _unsure_token, extra=0)


def cut_after_unsure(case: Case) -> Drafts:
    return _cut(case, _unsure_token, extra=1)


def cut_beforehand(case: Case) -> Drafts:
    return _cut(case, lambda q, x: q.amax(-1) < 0.6, extra=0)


def greedy_reported_soft(case: Case) -> Drafts:
    best = _index(case.alone.argmax(-1)[None])[0]
    chance = torch.zeros(len(case.tokens), dtype=torch.float64).index_fill(0, best, 1)
    return Drafts(one_pass(case).draft, chance)


def sharpened_reported_raw(case: Case) -> Drafts:
    sharp = case.alone**2 / (case.alone**2).sum(-1, keepdim=True)
    drawn = _drawn(case.tokens, sharp.expand(len(case.tokens), -1, -1))
    return Drafts(one_pass(case).draft, drawn.chance)


# a recipe's name in print, and whether the ratio tests (token, block) may trust the probabilities
# it reports; match may trust any
RECIPES: dict[str, tuple[Callable[[Case], Drafts], bool]] = {
    "one pass, positions drawn independently": (one_pass, True),
    "several passes, left to right between passes": (left_to_right, True),
    "several passes in any order, probabilities as they were when drawn": (any_order, False),
    "the same, tokens revealed before the last pass as point masses": (any_order_points, True),
    "the same, each token's law given those to its left, summed from the joint": (
        any_order_marginalized,
        True,
    ),
    "the same, the first token's law with what was seen, the others' without": (not_nested, False),
    "the better of two drafts by their own probability": (best_by_draft, False),
    "the better of two drafts by the target's probability": (best_by_target, False),
    "cut at the first unsure token, which is dropped": (cut_before_unsure, False),
    "cut after the first unsure token, which is kept": (cut_after_unsure, True),
    "cut where no token is likely, known before drawing": (cut_beforehand, True),
    "the most likely tokens, reported as if drawn": (greedy_reported_soft, False),
    "drawn from sharpened probabilities, reported with the raw ones": (
        sharpened_reported_raw,
        False,
    ),
}


def distance(recipe: Callable[[Case], Drafts], verifier: str, case: Case) -> float:
    """Total variation between the target's law of K+1 tokens and that of a round's tokens continued
    by the target.

    Runs the real plan of `verifier` ("token", "block", "match") on every draft the recipe can
    produce; no sampling.
    """
    drafts = recipe(case)
    plan = PLANS[verifier](drafts.draft, case.target_rows(drafts.draft.tokens))
    law = emitted_law(drafts, plan, case.p, longest=verifier == "block")
    return float((law - case.target_law()).abs().sum() / 2)


def emitted_law(
    drafts: Drafts, plan: Plan, p: list[Float[Tensor, "_ V"]], *, longest: bool
) -> Float[Tensor, "T"]:
    """The chance of each K+1 tokens when a round emits n+1 of them and the target the rest.

    longest: the longest passing prefix is accepted (block), else the tokens up to the first failure
        (token, match).
    """
    counts = longest_passing if longest else first_failure
    accepted = counts(plan.thresholds) * drafts.chance[:, None]
    tokens = drafts.draft.tokens
    law = torch.zeros(1, dtype=torch.float64)
    for n, rows in enumerate(p):
        emitted = accepted[:, n, None] * plan.residual(torch.full((len(tokens),), n))
        longer = law[:, None] * rows
        law = longer.index_add(0, _index(tokens[:, :n]), emitted).flatten()
    return law


def first_failure(thresholds: Float[Tensor, "D K"]) -> Float[Tensor, "D N"]:
    """The chance of each count when tokens are met one by one until one fails."""
    passes = F.pad(thresholds.clamp(0, 1), (0, 1))
    return F.pad(passes[:, :-1].cumprod(1), (1, 0), value=1) * (1 - passes)


def longest_passing(thresholds: Float[Tensor, "D K"]) -> Float[Tensor, "D N"]:
    """The chance of each count when prefixes are met from the longest down until one passes."""
    passes = F.pad(thresholds.clamp(0, 1), (1, 0), value=1)
    longer_fail = (1 - passes).flip(1)[:, :-1].cumprod(1).flip(1)
    return passes * F.pad(longer_fail, (0, 1), value=1)


def table(cases: int = CASES) -> Iterator[tuple[str, bool, dict[str, tuple[float, float]]]]:
    """Every recipe's name, whether it is lawful, and under each verifier the least and largest
    distance over random cases."""
    for name, (recipe, lawful) in RECIPES.items():
        ranges = {}
        for verifier in ("token", "block", "match"):
            distances = [distance(recipe, verifier, Case(seed)) for seed in range(cases)]
            ranges[verifier] = (min(distances), max(distances))
        yield name, lawful, ranges


def _index(tokens: Int[Tensor, "D n"]) -> Int[Tensor, "D"]:
    return (tokens * V ** torch.arange(tokens.shape[1]).flip(0)).sum(1)


def _drawn(tokens: Int[Tensor, "D K"], probs: Float[Tensor, "D K V"]) -> Drafts:
    """Each token drawn from its row, which is what is reported."""
    chance = probs.gather(-1, tokens[..., None])[..., 0].prod(1)
    return Drafts(Draft(tokens, probs), chance)


def _best_of_two(case: Case, score: Float[Tensor, "D"]) -> Drafts:
    own = one_pass(case)
    both = own.chance[:, None] * own.chance
    first = score[:, None] >= score
    return Drafts(own.draft, (both * first).sum(1) + (both * ~first).sum(0))


def _unsure_token(q: Float[Tensor, "D K V"], tokens: Int[Tensor, "D K"]) -> Tensor:
    return q.gather(-1, tokens[..., None])[..., 0] < 0.4


def _cut(case: Case, unsure: Callable[[Tensor, Tensor], Tensor], extra: int) -> Drafts:
    """Left-to-right drafts, cut `extra` tokens after the start of the first unsure position."""
    whole = left_to_right(case)
    assert whole.draft.probs is not None
    sure = (~unsure(whole.draft.probs, case.tokens)).long().cumprod(1).sum(1)
    size = (sure + extra).clamp(max=K)
    return Drafts(Draft(case.tokens, whole.draft.probs, size), whole.chance)
