"""The exactness study: drafters' chances are those of their code, and what is unlawful shows."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from specdiff import cli
from specdiff.bench import law
from specdiff.check import builtin_drafts, constructions
from specdiff.types import Draft


@pytest.mark.parametrize("name", [n for n, (_, whole) in builtin_drafts.DRAFTERS.items() if whole])
def test_every_draft_of_a_drafter_is_found(name: str) -> None:
    drafter = builtin_drafts.DRAFTERS[name][0](3)
    found = builtin_drafts.enumerated(drafter)
    assert float(found.chance.sum()) == pytest.approx(1, abs=1e-12)
    tokens = found.draft.tokens.tolist()
    assert len({tuple(t) for t in tokens}) == len(tokens) and (len(tokens) > 20 or name == "ngram")
    count = 20_000
    seen = builtin_drafts.propose(drafter, count).tokens
    for draft, chance in zip(found.draft.tokens, found.chance.tolist(), strict=True):
        share = float((seen == draft).all(1).double().mean())
        assert abs(share - chance) < 5 * (chance * (1 - chance) / count) ** 0.5 + 1e-9


def test_a_drafter_that_lies_is_found_out() -> None:
    """The chances are not taken from what a drafter says of itself."""
    build, _ = builtin_drafts.DRAFTERS["sedd, 2 passes left to right"]
    found = builtin_drafts.enumerated(build(0))
    assert found.draft.probs is not None
    case = constructions.Case(0)
    assert constructions.distance(lambda _: found, "token", case) < 1e-6
    flat = torch.full_like(found.draft.probs, 1 / builtin_drafts.V)
    lie = constructions.Drafts(Draft(found.draft.tokens, flat), found.chance)
    assert constructions.distance(lambda _: lie, "token", case) > 0.01
    assert constructions.distance(lambda _: lie, "match", case) < 1e-6


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(law, "CASES", 1)
    monkeypatch.setattr(law, "SAMPLE", 2000)
    monkeypatch.setattr(
        builtin_drafts,
        "DRAFTERS",
        {n: builtin_drafts.DRAFTERS[n] for n in list(builtin_drafts.DRAFTERS)[2:5]},
    )
    monkeypatch.setattr(sys, "argv", ["specdiff", "bench", "law", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert not end.value.code, out
    told = json.loads((tmp_path / "law.json").read_text())
    rows = {row["draft"]: row for row in told["rows"]}
    naive = rows["several passes in any order, probabilities as they were when drawn"]
    assert (
        naive["biased"]
        and naive["distance"]["token"][1] > 0.05
        and naive["distance"]["match"][1] < 1e-12
    )
    assert not any(row["biased"] for row in rows.values() if row["group"] == "drafter")
    assert rows["sedd, 2 passes in any order (point masses)"]["error"] > 0
    assert out.count("biased") == sum(not lawful for _, lawful in constructions.RECIPES.values())
    page = (tmp_path / "law.html").read_text()
    figure = ElementTree.fromstring(
        page[page.index("<svg") : page.index("</svg>") + 6].replace("xlink:", "")
    )
    assert (
        "several passes in any order, probabilities as they were when drawn"
        in figure.attrib["aria-label"]
    )
    assert (
        page.count("<strong>biased</strong>") == out.count("biased")
        and "±" in page
        and "{{" not in page
    )
