"""Cascade specs: which drafter is inside, and where options go."""

from pathlib import Path
from typing import Any

import pytest

import tiny
from specdiff import SpeculativeLM, catalog
from specdiff.drafters.base import NoDrafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.errors import UnknownNameError, UsageError

INFO = tiny.target("llama").info


def built(spec: str, **options: Any) -> CascadeDrafter:
    drafter = catalog.drafter(spec, INFO, options)
    assert isinstance(drafter, CascadeDrafter)
    return drafter


def test_any_spec_may_follow(tmp_path: Path) -> None:
    tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path)
    drafter = built(f"cascade:{tmp_path}", lookup_len=5, memory=7, draft_temperature=0.3)
    assert isinstance(drafter.inner, DenoisingDrafter)
    assert drafter.inner.draft_temperature == 0.3 and drafter.lookup_len == 5
    assert not drafter.reproducible
    assert isinstance(built("cascade:none").inner, NoDrafter)
    assert catalog.target_of("cascade:none") is None
    assert catalog.target_of("cascade") == catalog.DEFAULT_MODEL


def test_without_a_bundled_drafter_there_is_no_default() -> None:
    with pytest.raises(UnknownNameError, match="no bundled drafter was trained for"):
        catalog.drafter("cascade", INFO)
    assert isinstance(catalog.drafter("auto", INFO), NoDrafter)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match="lookup_len must be at least 1, not 0"):
        built("cascade:none", lookup_len=0)
    with pytest.raises(UsageError, match="'none' takes no options, but got steps"):
        built("cascade:none", steps=2)


def test_a_seed_with_a_memory_is_refused_where_a_draft_could_change_the_text() -> None:
    options = {"memory": 100}
    lm = SpeculativeLM(tiny.target("llama"), "ngram", None, 60, drafter_options=options)
    with pytest.raises(UsageError, match="remembers earlier requests; use verifier 'match'"):
        lm.generate([1, 2, 3], seed=1, max_tokens=5)
    for free in ({"verifier": "match"}, {"temperature": 0}):
        texts = [lm.generate([1, 2, 3], seed=1, max_tokens=20, **free).token_ids for _ in "ab"]
        assert texts[0] == texts[1]
    lm.generate([1, 2, 3], max_tokens=5)
