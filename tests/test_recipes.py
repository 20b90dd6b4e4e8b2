"""The table of lawful and unlawful recipes: its claims hold, and the guide shows it."""

import statistics

import pytest

from documents import GUIDE
from specdiff import cli
from specdiff.check import constructions


@pytest.mark.parametrize("name", constructions.RECIPES)
def test_lawful_ways_are_exact_and_the_others_are_not(name: str) -> None:
    recipe, lawful = constructions.RECIPES[name]
    cases = [constructions.Case(seed) for seed in range(100, 120)]  # others than the table's
    for verifier in ("token", "block", "match"):
        values = [constructions.distance(recipe, verifier, case) for case in cases]
        if lawful or verifier == "match":
            assert max(values) < 1e-12
        else:
            assert statistics.median(values) > 0.005 and max(values) > 0.03


@pytest.mark.parametrize("name", constructions.RECIPES)
def test_every_draft_is_accounted_for(name: str) -> None:
    recipe, _ = constructions.RECIPES[name]
    case = constructions.Case(7)
    values = recipe(case)
    assert float(values.chance.sum()) == pytest.approx(1, abs=1e-12)
    assert float(case.target_law().sum()) == pytest.approx(1, abs=1e-12)


def test_the_guide_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["specdiff", "check", "--recipes"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(constructions.RECIPES) + 2
    assert printed in (GUIDE / "exactness.md").read_text()
