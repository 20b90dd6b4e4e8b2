"""A target without a distribution after tokens that it never writes.

Drafts that go there neither change the law nor end a row.
"""

import pytest
import torch

from specdiff.check.doubles import TableDrafter
from specdiff.check.goodness_of_fit import compare, law, texts
from specdiff.targets.table import TableTarget
from specdiff.types import SamplingParams
from specdiff.verify import VERIFIERS

V, NEVER = 4, 2


def partial_target() -> TableTarget:
    """It never writes one token, and has only NaN to say once that token stands."""
    table = TableTarget.random(V, seed=6).table.clone()
    table[:, :, NEVER] = -torch.inf
    table[NEVER] = torch.nan
    table[:, NEVER] = torch.nan
    return TableTarget(table)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=0.7, top_p=0.9)],
)
@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_the_law_holds_where_drafts_go_where_the_target_has_none(
    verifier: str, point: bool, params: SamplingParams
) -> None:
    target = partial_target()
    sample = texts(
        target, TableDrafter(V, point=point), VERIFIERS[verifier], params, count=40_000, draft_len=4
    )
    assert (sample >= 0).all(), "a row ended early"
    assert compare(sample, law(target, params)) > 1e-5
