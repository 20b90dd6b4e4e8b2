"""L1: drafts over a draft vocabulary keep the target's law, and mistakes with its ids break it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import COLUMNS, Cases, PlanFunction, error
from torch import Tensor

from specdiff import verify
from specdiff.types import Draft, column_index
from specdiff.verify import Plan

SIZES = [(3, 1), (3, 2), (4, 3)]  # V, K
COUNT = 60


def cases_of(shape: str, V: int, K: int) -> Cases:
    return Cases.random(shape, V, K, COUNT, ragged=True, seed=11)


@pytest.mark.parametrize("shape", COLUMNS)
@pytest.mark.parametrize("name", ["token", "block", "match"])
def test_a_plan_is_that_of_the_full_probabilities(name: str, shape: str) -> None:
    for V, K in SIZES:
        draft, p = cases_of(shape, V, K).rows()
        full = replace(draft, probs=draft.full_probs(V), columns=None)
        one = verify.PLANS[name](draft, p)
        two = verify.PLANS[name](full, p)
        assert torch.allclose(one.thresholds, two.thresholds, rtol=1e-12, atol=1e-14)
        for n in range(K + 1):
            rows = torch.full((len(p),), n)
            assert torch.equal(one.residual(rows), two.residual(rows))


def index_as_id(plan: PlanFunction) -> PlanFunction:
    """A drafter that hands on the place of a token among its columns."""

    def broken(draft: Draft, p: Tensor) -> Any:
        assert draft.columns is not None
        places = column_index(draft.tokens, draft.columns)
        tokens = torch.where(places < len(draft.columns), places, draft.tokens)
        return plan(replace(draft, tokens=tokens), p)

    return broken


def id_as_index(plan: PlanFunction) -> PlanFunction:
    """A verifier that takes the columns for the first ids."""

    def broken(draft: Draft, p: Tensor) -> Any:
        assert draft.columns is not None
        return plan(replace(draft, columns=torch.arange(len(draft.columns))), p)

    return broken


def no_mass_outside(plan: PlanFunction) -> PlanFunction:
    """A residual that is drawn from the columns only."""

    def broken(draft: Draft, p: Tensor) -> Any:
        whole = plan(draft, p)
        assert draft.columns is not None
        inside = torch.zeros(p.shape[-1], dtype=p.dtype).index_fill(0, draft.columns, 1)
        size = draft.sizes[:, None, None]
        rows = torch.arange(p.shape[1])[:, None]
        return Plan(whole.thresholds, whole.weight, draft, torch.where(rows < size, p * inside, p))

    return broken


@pytest.mark.parametrize("bug", [index_as_id, id_as_index, no_mass_outside])
@pytest.mark.parametrize("name", ["token", "block"])
def test_a_planted_bug_breaks_the_law(
    name: str, bug: Callable[[PlanFunction], PlanFunction]
) -> None:
    for V, K in SIZES:
        cases = cases_of("columns", V, K)
        assert error(verify.PLANS[name], cases, longest=name == "block") <= 1e-12
        assert error(bug(verify.PLANS[name]), cases, longest=name == "block") > 1e-3


def test_block_without_the_mass_outside_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """S_k counts w_k p_k at every id, also where q_k has no column."""
    excess = verify._excess

    def inside(draft: Draft, p: Tensor, weight: Tensor) -> Tensor:
        assert draft.columns is not None
        zero = torch.zeros_like(p).index_copy(-1, draft.columns, p[..., draft.columns])
        return excess(draft, zero, weight)

    cases = cases_of("columns", 4, 3)
    assert error(verify.block_plan, cases, longest=True) <= 1e-12
    monkeypatch.setattr(verify, "_excess", inside)
    assert error(verify.block_plan, cases, longest=True) > 1e-3
