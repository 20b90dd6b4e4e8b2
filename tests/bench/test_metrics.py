"""The arithmetic, on hand-made turns: nothing here runs a model."""

from typing import Any

import pytest

from specdiff.bench import metrics, results, table
from specdiff.bench.journal import parse
from specdiff.bench.metrics import CellResult
from specdiff.bench.timing import RunRecord

BEGIN = {
    "kind": "begin",
    "key": "begin",
    "suite": "jsonl:x",
    "command": "specdiff bench",
    "settings": {"smoke": False},
}
PART = {
    "kind": "part",
    "key": "t/part",
    "part": "t",
    "model": "m",
    "dataset": None,
    "max_tokens": 8,
    "notes": [],
    "missing": None,
    "prompts": [],
    "baselines": [],
    "dtype": "float32",
    "environment": {"device": "cpu"},
}


def cell(baseline: str, draft_len: int | None = None, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "main",
        "baseline": baseline,
        "draft_len": draft_len,
        "steps": None,
        "verifier": "token",
        "temperature": 0.0,
        "batch": 1,
    }
    return base | changes


def run(of: dict[str, Any], size: int, seconds: float, **changes: Any) -> dict[str, Any]:
    base = {
        "cell": of,
        "size": size,
        "seconds": seconds,
        "first_seconds": seconds / 4,
        "first_tokens": 1,
        "counts": None,
    }
    return (
        base
        | {"fresh_tokens": 0, "fresh_rounds": 0, "medians": None, "memory": None, "joules": None}
        | changes
    )


def counts(
    tokens: int,
    rounds: int,
    drafted: int,
    accepted: int,
    reached: list[int],
    passed: list[int],
    plain: int = 0,
) -> dict[str, Any]:
    record = {
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "reached": reached,
        "passed": passed,
    }
    return record | {"plain_rounds": plain, "seconds": {"draft": 0.25, "score": 0.5, "host": 0.25}}


def turn(
    *runs: dict[str, Any], task: str = "chat", divergences: tuple[dict[str, Any], ...] = ()
) -> dict[str, Any]:
    record = {
        "kind": "turn",
        "part": "t",
        "key": "k",
        "stage": "main",
        "prompt": "p",
        "task": task,
        "repetition": 0,
    }
    return record | {"runs": list(runs), "divergences": list(divergences)}


def fold(*turns: dict[str, Any]) -> dict[str, CellResult]:
    (part,) = results.fold([BEGIN, PART, *turns], finished=True).parts
    return {c.baseline: c for c in part.cells}


def test_a_speedup_is_the_ratio_of_medians_over_common_turns() -> None:
    hf, own = cell("hf", verifier=None), cell("ours-vanilla")
    cells = fold(
        turn(run(hf, 10, 1.0), run(own, 10, 0.5)),
        turn(run(hf, 10, 2.0), run(own, 10, 0.5), task="math"),
        turn(run(hf, 10, 5.0), run(own, 10, 10.0), task="math"),
        turn({"cell": hf, "why": "out of memory"}, run(own, 10, 0.01)),
    )
    vanilla = cells["ours-vanilla"]
    assert vanilla.speedup_vs_hf == metrics.Speedup(20 / 5, 0.5, 4.0, turns=3, faster=2)
    assert vanilla.tokens_per_second == metrics.Spread(20.0, 1.0, 1000.0)
    math = metrics.Speedup(10.5 / 3.5, 0.5, 4.0, turns=2, faster=1)
    assert vanilla.tasks["math"].speedup_vs_hf == math
    failed = cells["hf"]
    assert (failed.status, failed.why, failed.turns) == ("failed", "out of memory", 3)
    assert failed.speedup_vs_vanilla is not None and failed.speedup_vs_vanilla.turns == 3


def test_decode_speed_leaves_the_first_emission_out() -> None:
    one = run(cell("x"), 13, 2.0, first_seconds=0.5, first_tokens=4)
    record = parse(RunRecord, one)
    assert metrics.rate(record) == 6.5 and metrics.decode_rate(record) == 6.0
    short = parse(RunRecord, run(cell("x"), 4, 1.0, first_tokens=4))
    assert metrics.decode_rate(short) is None
    result = fold(turn(one))["x"]
    assert result.ttft is not None and result.ttft.median == 0.5
    assert result.tpot is not None and result.tpot.median == pytest.approx(1 / 6)
    rows = fold(turn(run(cell("x", batch=3), 13, 2.0, first_seconds=0.5, first_tokens=4)))["x"]
    # three rows wait for each step together
    assert rows.tpot is not None and rows.tpot.median == pytest.approx(3 / 6)


def test_acceptance_is_summed_over_turns() -> None:
    own = cell("sedd", 3)
    a = run(
        own,
        6,
        1.0,
        counts=counts(6, 3, 6, 3, [2, 2, 1], [2, 1, 0], plain=1),
        fresh_tokens=6,
        fresh_rounds=3,
    )
    b = run(
        own, 4, 1.0, counts=counts(4, 1, 3, 3, [1, 1, 1], [1, 1, 1]), fresh_tokens=1, fresh_rounds=1
    )
    result = fold(turn(a), turn(b))["sedd"]
    assert (result.tau, result.tau_before_loop, result.alpha) == (10 / 4, 7 / 4, 6 / 9)
    assert result.accepted_per_draft == 6 / 3  # the plain round drafted nothing
    assert result.reached == [3, 3, 2] and result.per_position == [1.0, 2 / 3, 0.5]
    assert result.seconds == {"draft": 0.5, "score": 1.0, "host": 0.5, "total": 2.0}


def test_break_even_and_the_limit_of_free_drafting() -> None:
    plain = {"draft_round": None, "draft_score": None, "plain_round": 0.125, "plain_score": 0.1}
    drafting = {"draft_round": 0.25, "draft_score": 0.2, "plain_round": None, "plain_score": None}
    vanilla = run(cell("ours-vanilla"), 9, 1.25, first_seconds=0.25, medians=plain)
    fast = run(
        cell("sedd", 3),
        9,
        0.65,
        first_seconds=0.25,
        medians=drafting,
        counts=counts(9, 3, 9, 6, [3], [3]),
    )
    result = fold(turn(vanilla, fast))["sedd"]
    assert result.break_even_tau == 2.0
    assert result.free_limit == pytest.approx(3 * 0.1 / 0.2)
    assert result.free_fraction == pytest.approx((1.0 / 0.4) / 1.5)


def test_rounds_without_a_draft_count_in_what_a_round_costs() -> None:
    """One round in four drafts, at twice the price, and gives three tokens: 6/4 a round for 5/4
    of a plain one."""
    plain = {"draft_round": None, "draft_score": None, "plain_round": 0.1, "plain_score": 0.08}
    mixed = {"draft_round": 0.2, "draft_score": 0.16, "plain_round": 0.1, "plain_score": 0.08}
    fast = run(
        cell("ngram", 3), 6, 0.5, medians=mixed, counts=counts(6, 4, 3, 2, [1], [1], plain=3)
    )
    result = fold(turn(run(cell("ours-vanilla"), 6, 0.6, medians=plain), fast))["ngram"]
    assert result.break_even_tau == pytest.approx(5 / 4)
    assert result.free_limit == pytest.approx(6 / 5)


def test_wrong_tokens_in_a_sweep_are_a_problem_and_a_draft_too_long_is_not() -> None:
    own = cell("sedd", 3, stage="sweep")
    wrong = {
        **own,
        "prompt": "p",
        "position": 4,
        "tokens": [1, 2],
        "top2_gap": 3.5,
        "top2": [1, 2],
        "near_tie": False,
    }
    long = {"cell": cell("sedd", 99, stage="sweep"), "why": "at most 64 tokens"}
    failed = results.fold(
        [BEGIN, PART, turn(run(own, 9, 1.0), long, divergences=(wrong,))], finished=True
    )
    (problem,) = results.problems(failed)
    assert problem.startswith("t: sweep, sedd, batch 1: not the target's own tokens")


def test_a_wrong_greedy_answer_fails_its_cell_and_a_near_tie_does_not() -> None:
    own = cell("sedd", 3)
    place = {"prompt": "p", "position": 4, "tokens": [1, 2], "top2": [1, 2]}
    close = {**own, **place, "near_tie": True, "top2_gap": 1e-5}
    wrong = {**own, **place, "near_tie": False, "top2_gap": 3.5}
    one = turn(run(own, 9, 1.0), divergences=(close,))
    assert fold(one, turn(run(own, 9, 1.0)))["sedd"].exact == 0.5
    assert fold(one)["sedd"].status == "ok"
    failed = results.fold(
        [BEGIN, PART, turn(run(own, 9, 1.0), divergences=(wrong,))], finished=True
    )
    assert results.problems(failed) == [
        "t: main, sedd, batch 1: not the target's own tokens: prompt p, position 4, "
        "where the two largest logits are 3.5 apart"
    ]


def test_the_break_even_batch_is_the_first_that_no_longer_pays() -> None:
    sizes = {1: (10.0, 20.0), 2: (18.0, 25.0), 4: (30.0, 29.0), 8: (50.0, 40.0)}
    turns = []
    for size, (plain, fast) in sizes.items():
        own = cell("sedd", 3, stage="batch", batch=size)
        vanilla = cell("ours-vanilla", stage="batch", batch=size)
        turns.append(turn(run(vanilla, 1000, 1000 / plain), run(own, 1000, 1000 / fast)))
    (part,) = results.fold([BEGIN, PART, *turns], finished=True).parts
    curves = {b.baseline: b for b in part.batches}
    assert curves["sedd"].break_even == 4 and curves["ours-vanilla"].break_even is None
    plain_speeds = [s.vanilla_tokens_per_second for s in curves["sedd"].sizes]
    assert plain_speeds == pytest.approx([10, 18, 30, 50])


def test_the_csv_has_a_line_a_cell() -> None:
    both = turn(run(cell("hf"), 10, 1.0), run(cell("sedd", 3), 10, 0.5))
    folded = results.fold([BEGIN, PART, both], finished=True)
    header, first, second = table.as_csv(folded).splitlines()
    assert {"speedup_vs_hf", "speedup_vs_hf_min", "tokens_per_second_max", "tau"} <= set(
        header.split(",")
    )
    row = dict(zip(header.split(","), second.split(","), strict=True))
    assert (
        first.startswith("t,main,hf") and row["speedup_vs_hf"] == "2.0" and row["draft_len"] == "3"
    )
