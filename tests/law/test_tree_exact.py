"""L1 for trees: the law of one round, enumerated, for every way of drawing a tree; planted bugs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trees import (
    FORMS,
    Drawn,
    by_plan,
    depth_of,
    drawn,
    error,
    factorised,
    independent,
    lattice,
    matched,
    point_masses,
    random_law,
    top_plus_one,
    traversal,
)

from specdiff import verify_tree
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.types import Batch, Draft, SamplingParams
from specdiff.verify import VERIFIERS
from specdiff.verify_tree import TreePlan, tree_plan

V = 3
EXACT = 1e-12
CAUGHT = 1e-3
CASES = 24  # of each way and form, thin laws and full ones in turn
TELLING = 10  # a case in which every bug shows

WAYS: dict[str, Callable[..., Drawn]] = {
    "independent": lambda q, form: drawn(independent(q, form, replacement=False), form),
    "with replacement": lambda q, form: drawn(independent(q, form, replacement=True), form),
    "lattice": lambda q, form: drawn(lattice(factorised(q), form, replacement=False), form),
    "lattice with replacement": lambda q, form: drawn(
        lattice(factorised(q), form, replacement=True), form
    ),
    "top plus one": lambda q, form: drawn(top_plus_one(q, form), form),
}


def case(way: str, form: tuple[int, ...], seed: int) -> tuple[Drawn, dict[tuple[int, ...], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    longest = max(depth_of(form)) + 2
    thin = seed % 2 == 1
    p = random_law(V, longest, generator, thin=thin)
    q = random_law(V, longest, generator, thin=thin)
    if way == "points":
        return drawn(point_masses(V, form, generator, 6), form), p
    return WAYS[way](q, form), p


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", [*WAYS, "points"])
def test_rejection_has_the_targets_law(way: str, form: str) -> None:
    parents = FORMS[form]
    for seed in range(CASES):
        every, p = case(way, parents, seed)
        assert error(every, p, by_plan(tree_plan), max(depth_of(parents)) + 2) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_tree_has_the_targets_law(form: str) -> None:
    parents = FORMS[form]
    for size in range(len(parents)):
        every, p = case("lattice", parents, size)
        cut = replace(every.draft, size=torch.full_like(every.draft.tokens[:, 0], size))
        every = replace(every, draft=cut)
        assert error(every, p, by_plan(tree_plan), max(depth_of(parents)) + 2) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_matching_has_the_targets_law(form: str) -> None:
    parents = FORMS[form]
    every, p = case("points", parents, 2)
    few = Drawn(
        replace(every.draft, tokens=every.draft.tokens[:2], parents=every.draft.parents[:2]),
        every.chance[:2] / every.chance[:2].sum(),
        every.texts[:2],
    )
    assert error(few, p, matched, max(depth_of(parents)) + 2) < EXACT


def test_traversal_is_exact_for_independent_subtrees_and_biased_on_a_lattice() -> None:
    form = FORMS["branches"]
    every, p = case("independent", form, TELLING)
    assert error(every, p, traversal, 3) < EXACT
    every, p = case("lattice", form, TELLING)
    assert error(every, p, traversal, 3) > CAUGHT


def test_block_refuses_trees() -> None:
    draft = Draft(torch.zeros(1, 2, dtype=torch.long), parents=torch.tensor([[-1, -1]]))
    noise = Noise.of(Batch.of([[1]], [SamplingParams()], [0]))
    with pytest.raises(UsageError, match="'block' takes no trees"):
        VERIFIERS["block"](draft, torch.full((1, 3, V), 1 / V), noise)


# ---- planted bugs ----


def merged(draft: Draft, p: Tensor) -> TreePlan:
    """BUG: a sibling with the token of an earlier one is left out, and its update with it."""
    assert draft.parents is not None and draft.probs is not None
    planned = tree_plan(draft, p)
    thresholds = planned.thresholds.clone()
    residual = planned.residual.clone()
    for d in range(len(p)):
        tokens = draft.tokens[d].tolist()
        parents = draft.parents[d].tolist()
        twins = [
            k
            for k in range(len(tokens))
            if (parents[k], tokens[k]) in list(zip(parents, tokens, strict=True))[:k]
        ]
        keep = [k for k in range(len(tokens)) if k not in twins]
        only = Draft(
            draft.tokens[d : d + 1, keep],
            draft.probs[d : d + 1, keep],
            parents=torch.tensor([[-1 if parents[k] < 0 else keep.index(parents[k]) for k in keep]])
            if all(parents[k] in (-1, *keep) for k in keep)
            else draft.parents[d : d + 1, keep],
        )
        if not twins or any(parents[k] not in (-1, *keep) for k in keep):
            continue
        rows = [0, *(k + 1 for k in keep)]
        own = tree_plan(only, p[d : d + 1, rows])
        thresholds[d, keep] = own.thresholds[0]
        thresholds[d, twins] = 0
        residual[d, rows] = own.residual[0]
    return TreePlan(thresholds, residual)


def unreduced(draft: Draft, p: Tensor) -> TreePlan:
    """BUG: a later sibling meets the target's law, not what the earlier ones left of it."""
    planned = tree_plan(draft, p)
    assert draft.probs is not None and draft.parents is not None
    x = draft.tokens[..., None]
    rows = (draft.parents + 1)[..., None].expand(-1, -1, p.shape[2])
    target = p.gather(1, rows).gather(2, x)[..., 0]
    ratio = torch.where(target > 0, target / draft.probs.gather(2, x)[..., 0], 0)
    return TreePlan(ratio, planned.residual)


def undrawn(draft: Draft, p: Tensor) -> TreePlan:
    """BUG: every sibling is judged with the first one's law, as if drawn with replacement."""
    assert draft.probs is not None and draft.parents is not None
    probs = draft.probs.clone()
    parents = draft.parents[0].tolist()
    for k, parent in enumerate(parents):
        probs[:, k] = draft.probs[:, parents.index(parent)]
    return tree_plan(replace(draft, probs=probs), p)


@pytest.mark.parametrize(
    ("bug", "way"),
    [(merged, "with replacement"), (unreduced, "independent"), (undrawn, "independent")],
)
def test_a_planted_bug_is_caught(bug: Callable[[Draft, Tensor], TreePlan], way: str) -> None:
    every, p = case(way, FORMS["siblings"], TELLING)
    assert error(every, p, by_plan(tree_plan), 2) < EXACT
    assert error(every, p, by_plan(bug), 2) > CAUGHT


def test_a_walk_that_takes_the_last_passing_sibling_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = verify_tree.walk
    every, p = case("independent", FORMS["siblings"], TELLING)

    def backwards(draft: Draft, passed: Tensor) -> tuple[Tensor, Tensor]:
        last = passed & ~(passed.flip(1).long().cumsum(1).flip(1) > 1)
        return walk(draft, last)

    monkeypatch.setattr(verify_tree, "walk", backwards)
    assert error(every, p, by_plan(tree_plan), 2) > CAUGHT
