"""RunComparison of two runs: which is faster, by how much, and when there is no verdict."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic

from specdiff import cli
from specdiff.bench.compare import DraftSetting, compare
from specdiff.bench.results import BenchResults

Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def run(*cells: dict[str, Any], **changes: Any) -> BenchResults:
    return synthetic.results(synthetic.part(cells=list(cells)), **changes)


def test_the_second_over_the_first() -> None:
    before = run(
        synthetic.cell("sedd", speed=20.0),
        synthetic.cell("ngram", speed=20.0),
        synthetic.cell("hf"),
    )
    after = run(
        synthetic.cell("sedd", speed=30.0, alpha=0.9, tau=4.8),
        synthetic.cell("ngram", speed=21.0),
        synthetic.cell("hf", 1.0),
    )
    comparison = compare(before, after)
    sedd, ngram = comparison.cells
    speed = sedd.tokens_per_second
    assert speed is not None and (speed.first, speed.second, speed.ratio) == (20, 30, 1.5)
    assert sedd.alpha is not None and sedd.alpha.ratio == 2
    assert sedd.tau is not None and sedd.tau.ratio == 2
    assert speed.min == pytest.approx(26.4 / 22.4) and speed.max == pytest.approx(33.6 / 17.6)
    assert sedd.verdict == "faster"
    assert ngram.verdict is None, "spreads that overlap say nothing"
    assert [c.temperature for c in comparison.only_first] == [0.0]
    assert [c.temperature for c in comparison.only_second] == [1.0]
    back = compare(after, before).cells[0]
    assert back.verdict == "slower" and back.tokens_per_second is not None
    assert back.tokens_per_second.ratio == pytest.approx(2 / 3)
    assert sedd.speedup_vs_vanilla is not None
    assert sedd.speedup_vs_vanilla.ratio == pytest.approx(1.5)


def test_tau_is_judged_by_its_tasks() -> None:
    def tau(middle: float, *tasks: float) -> dict[str, Any]:
        cell = synthetic.cell("sedd", tau=middle)
        chat = cell["tasks"]["chat"]
        return cell | {"tasks": {f"t{i}": chat | {"tau": t} for i, t in enumerate(tasks)}}

    def verdict(a: dict[str, Any], b: dict[str, Any]) -> str | None:
        return compare(run(a), run(b)).cells[0].tau_verdict

    assert verdict(tau(2.0, 1.8, 2.2), tau(3.0, 2.5, 3.5)) == "longer"
    assert verdict(tau(3.0, 2.5, 3.5), tau(2.0, 1.8, 2.2)) == "shorter"
    assert verdict(tau(2.0, 1.8, 2.6), tau(3.0, 2.5, 3.5)) is None
    assert verdict(tau(2.0, 1.8), tau(3.0, 2.5)) is None, "one task spreads nothing"


def test_a_baseline_is_itself_whatever_tuning_chose() -> None:
    def sedd(length: int | str, stage: str) -> dict[str, Any]:
        return synthetic.cell("sedd", stage=stage, draft_len=length, steps=1)

    comparison = compare(
        run(sedd(4, "main"), sedd("auto", "main"), sedd(4, "sweep")),
        run(sedd(8, "main"), sedd(8, "sweep")),
    )
    (row,) = comparison.cells
    assert (row.stage, row.draft_len, row.before) == ("main", 8, DraftSetting(4, 1))
    only_first = [(c.stage, c.draft_len) for c in comparison.only_first]
    assert only_first == [("main", "auto"), ("sweep", 4)]
    assert [(c.stage, c.draft_len) for c in comparison.only_second] == [("sweep", 8)]


def test_nulls_and_failures() -> None:
    broken = synthetic.cell(
        "sedd",
        status="failed",
        why="it raised",
        tokens_per_second=None,
        tau=None,
        alpha=None,
        speedup_vs_vanilla=None,
    )
    row = compare(run(broken), run(synthetic.cell("sedd"))).cells[0]
    assert row.tokens_per_second is None and row.alpha is None
    assert row.verdict is None and row.failed == ["first"]


def test_differences_come_first() -> None:
    before = run(synthetic.cell("sedd"))
    part = synthetic.part(cells=[synthetic.cell("sedd")], dtype="bfloat16")
    environment = synthetic.environment(cores=16, date="later")
    after = synthetic.results(part, environment=environment, status="partial")
    after.settings["draft_len"] = 4
    differences = {d.what: (d.first, d.second) for d in compare(before, after).differences}
    assert differences == {
        "status": ("complete", "partial"),
        "environment: cores": (2, 16),
        "settings: draft_len": (None, 4),
        "embedded: dtype": ("float32", "bfloat16"),
    }


def test_as_a_user_meets_it(here: Here, tmp_path: Path) -> None:
    for name, speed, cores in (("a", 20.0, 2), ("b", 40.0, 16)):
        cells = [synthetic.cell("sedd", speed=speed), synthetic.cell(f"only-{name}")]
        environment = synthetic.environment(cores=cores)
        record = synthetic.whole(synthetic.part(cells=cells), environment=environment)
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(record))
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    code, out, _ = here("compare", first, second)
    assert code == 0 and out.index("environment: cores: 2 → 16") < out.index("20.0") < out.index(
        "faster"
    )
    assert "2.00 (1.57-2.55)" in out and "only-a" in out and "only-b" in out
    code, out, _ = here("compare", second, first, "--json")
    assert code == 0 and json.loads(out)["cells"][0]["verdict"] == "slower"
    (tmp_path / "b" / "results.json").write_text("{")
    code, out, err = here("compare", first, second)
    assert code == 2 and out == "" and err.count("\n") == 1 and "is damaged" in err
    code, _, err = here("--quick", "compare", first, second)
    assert code == 2 and "--quick is for measuring" in err
    code, out, _ = here("report", first)
    assert code == 0 and "specdiff bench" in Path(out.strip()).read_text()
