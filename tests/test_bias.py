"""The bias study: drafters' chances are those of their code, and what is unlawful shows."""

import json
import sys
from pathlib import Path

import pytest
import torch

from specdiff import cli
from specdiff.check import bias, builtin_drafts, constructions
from specdiff.types import Draft

LOOKED_UP = ("ngram", "cascade, where the text repeats")


@pytest.mark.parametrize("name", [n for n, (_, whole) in builtin_drafts.DRAFTERS.items() if whole])
def test_every_draft_of_a_drafter_is_enumerated(name: str) -> None:
    drafter = builtin_drafts.DRAFTERS[name][0](3)
    drafts = builtin_drafts.enumerated(drafter)
    assert float(drafts.chance.sum()) == pytest.approx(1, abs=1e-12)
    tokens = drafts.draft.tokens.tolist()
    assert len({tuple(t) for t in tokens}) == len(tokens)
    assert (len(tokens) == 1) if name in LOOKED_UP else (len(tokens) > 20)
    count = 20_000
    samples = builtin_drafts.propose(drafter, count).tokens
    for draft, chance in zip(drafts.draft.tokens, drafts.chance.tolist(), strict=True):
        share = float((samples == draft).all(1).double().mean())
        assert abs(share - chance) < 5 * (chance * (1 - chance) / count) ** 0.5 + 1e-9


def test_wrong_probabilities_are_detected() -> None:
    """The chances are not taken from the drafter's own probabilities."""
    build, _ = builtin_drafts.DRAFTERS["sedd, 2 passes left to right"]
    drafts = builtin_drafts.enumerated(build(0))
    assert drafts.draft.probs is not None
    case = constructions.Case(0)
    assert constructions.distance(lambda _: drafts, "token", case) < 1e-6
    flat = torch.full_like(drafts.draft.probs, 1 / builtin_drafts.V)
    lie = constructions.Drafts(Draft(drafts.draft.tokens, flat), drafts.chance)
    assert constructions.distance(lambda _: lie, "token", case) > 0.01
    assert constructions.distance(lambda _: lie, "match", case) < 1e-6


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bias, "CASES", 1)
    monkeypatch.setattr(bias, "SAMPLE", 2000)
    few = {n: builtin_drafts.DRAFTERS[n] for n in list(builtin_drafts.DRAFTERS)[2:5]}
    monkeypatch.setattr(builtin_drafts, "DRAFTERS", few)
    monkeypatch.setattr(sys, "argv", ["specdiff", "check", "--recipes", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert not end.value.code, out
    record = json.loads((tmp_path / "bias.json").read_text())
    rows = {row["draft"]: row for row in record["rows"]}
    naive = rows["several passes in any order, probabilities as they were when drawn"]
    assert naive["biased"] and naive["distance"]["token"][1] > 0.05
    assert naive["distance"]["match"][1] < 1e-12
    assert not any(row["biased"] for row in rows.values() if row["group"] == "drafter")
    assert rows["sedd, 2 passes in any order (point masses)"]["error"] > 0
    unlawful = sum(not lawful for _, lawful in constructions.RECIPES.values())
    assert out.count("| **") == unlawful and out.count("\n") == len(rows) + 2
    page = (tmp_path / "bias.html").read_text()
    assert page.count("<strong>biased</strong>") == unlawful
    assert (
        page.count("<tr>") == len(rows) + 2 and "±" in page and "{" not in page.split("<body>")[1]
    )


def test_out_belongs_to_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["specdiff", "check", "ngram", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "--out is for --recipes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
