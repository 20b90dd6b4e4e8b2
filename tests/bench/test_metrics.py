"""The arithmetic, on hand-made turns: nothing here runs a model."""

from typing import Any

import pytest

from specdiff.bench import metrics, results

BEGIN = {
    "kind": "begin",
    "key": "begin",
    "suite": "jsonl:x",
    "command": "specdiff bench",
    "settings": {"smoke": False},
}
PART = {
    "kind": "part", "key": "t/part", "part": "t", "model": "m", "dataset": None, "max_tokens": 8, "notes": [], "missing": None,
    "prompts": [], "baselines": [], "dtype": "float32", "environment": {"device": "cpu"},
}  # fmt: skip


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
    kept: list[int],
    plain: int = 0,
) -> dict[str, Any]:
    told = {
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "reached": reached,
        "kept": kept,
    }
    return told | {"plain_rounds": plain, "seconds": {"draft": 0.25, "score": 0.5, "host": 0.25}}


def turn(
    *runs: dict[str, Any], task: str = "chat", divergences: tuple[dict[str, Any], ...] = ()
) -> dict[str, Any]:
    told = {
        "kind": "turn",
        "part": "t",
        "key": "k",
        "stage": "main",
        "prompt": "p",
        "task": task,
        "repetition": 0,
    }
    return told | {"runs": list(runs), "divergences": list(divergences)}


def fold(*turns: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (part,) = results.fold([BEGIN, PART, *turns], finished=True)["parts"]
    return {c["baseline"]: c for c in part["cells"]}


def test_a_speedup_is_the_ratio_of_medians_over_common_turns() -> None:
    hf, own = cell("hf", verifier=None), cell("ours-vanilla")
    found = fold(
        turn(run(hf, 10, 1.0), run(own, 10, 0.5)),
        turn(run(hf, 10, 2.0), run(own, 10, 0.5), task="math"),
        turn(run(hf, 10, 5.0), run(own, 10, 10.0), task="math"),
        turn({"cell": hf, "why": "out of memory"}, run(own, 10, 0.01)),
    )
    gained = found["ours-vanilla"]["speedup_vs_hf"]
    assert gained == {"ratio": 20 / 5, "min": 0.5, "max": 4.0, "turns": 3, "faster": 2}
    assert found["ours-vanilla"]["tokens_per_second"] == {"median": 20.0, "min": 1.0, "max": 1000.0}
    assert found["ours-vanilla"]["tasks"]["math"]["speedup_vs_hf"] == {
        "ratio": 10.5 / 3.5,
        "min": 0.5,
        "max": 4.0,
        "turns": 2,
        "faster": 1,
    }
    assert (
        found["hf"]["status"] == "failed"
        and found["hf"]["why"] == "out of memory"
        and found["hf"]["turns"] == 3
    )
    assert found["hf"]["speedup_vs_vanilla"]["turns"] == 3


def test_decode_speed_leaves_the_first_emission_out() -> None:
    one = run(cell("x"), 13, 2.0, first_seconds=0.5, first_tokens=4)
    assert metrics.rate(one) == 6.5 and metrics.decode_rate(one) == 6.0
    assert metrics.decode_rate(run(cell("x"), 4, 1.0, first_tokens=4)) is None
    told = fold(turn(one))["x"]
    assert told["ttft"]["median"] == 0.5 and told["tpot"]["median"] == pytest.approx(1 / 6)
    rows = fold(turn(run(cell("x", batch=3), 13, 2.0, first_seconds=0.5, first_tokens=4)))["x"]
    assert rows["tpot"]["median"] == pytest.approx(3 / 6)  # three rows wait for each step together


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
    told = fold(turn(a), turn(b))["sedd"]
    assert told["tau"] == 10 / 4 and told["tau_before_loop"] == 7 / 4 and told["alpha"] == 6 / 9
    assert told["accepted_per_draft"] == 6 / 3  # the plain round drafted nothing
    assert told["reached"] == [3, 3, 2] and told["per_position"] == [1.0, 2 / 3, 0.5]
    assert told["seconds"] == {"draft": 0.5, "score": 1.0, "host": 0.5, "total": 2.0}


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
    told = fold(turn(vanilla, fast))["sedd"]
    assert told["break_even_tau"] == 2.0
    assert told["free_limit"] == pytest.approx(3 * 0.1 / 0.2)
    assert told["free_fraction"] == pytest.approx((1.0 / 0.4) / 1.5)


def test_rounds_without_a_draft_count_in_what_a_round_costs() -> None:
    """One round in four drafts, at twice the price, and gives three tokens: 6/4 a round for 5/4 of a plain one."""
    plain = {"draft_round": None, "draft_score": None, "plain_round": 0.1, "plain_score": 0.08}
    mixed = {"draft_round": 0.2, "draft_score": 0.16, "plain_round": 0.1, "plain_score": 0.08}
    fast = run(
        cell("ngram", 3), 6, 0.5, medians=mixed, counts=counts(6, 4, 3, 2, [1], [1], plain=3)
    )
    told = fold(turn(run(cell("ours-vanilla"), 6, 0.6, medians=plain), fast))["ngram"]
    assert told["break_even_tau"] == pytest.approx(5 / 4) and told["free_limit"] == pytest.approx(
        6 / 5
    )


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
    told = results.fold(
        [BEGIN, PART, turn(run(own, 9, 1.0), long, divergences=(wrong,))], finished=True
    )
    (problem,) = results.problems(told)
    assert problem.startswith("t: sweep, sedd, batch 1: not the target's own tokens")


def test_a_wrong_greedy_answer_fails_its_cell_and_a_near_tie_does_not() -> None:
    own = cell("sedd", 3)
    told = {"prompt": "p", "position": 4, "tokens": [1, 2], "top2_gap": 1e-5, "top2": [1, 2]}
    close, wrong = (
        {**own, **told, "near_tie": True},
        {**own, **told, "near_tie": False, "top2_gap": 3.5},
    )
    assert (
        fold(turn(run(own, 9, 1.0), divergences=(close,)), turn(run(own, 9, 1.0)))["sedd"]["exact"]
        == 0.5
    )
    assert fold(turn(run(own, 9, 1.0), divergences=(close,)))["sedd"]["status"] == "ok"
    failed = results.fold(
        [BEGIN, PART, turn(run(own, 9, 1.0), divergences=(wrong,))], finished=True
    )
    assert results.problems(failed) == [
        "t: main, sedd, batch 1: not the target's own tokens: prompt p, position 4, where the two largest logits are 3.5 apart"
    ]


def test_the_break_even_batch_is_the_first_that_no_longer_pays() -> None:
    sizes = {1: (10.0, 20.0), 2: (18.0, 25.0), 4: (30.0, 29.0), 8: (50.0, 40.0)}
    turns = []
    for size, (plain, fast) in sizes.items():
        own, vanilla = (
            cell("sedd", 3, stage="batch", batch=size),
            cell("ours-vanilla", stage="batch", batch=size),
        )
        turns.append(turn(run(vanilla, 1000, 1000 / plain), run(own, 1000, 1000 / fast)))
    (part,) = results.fold([BEGIN, PART, *turns], finished=True)["parts"]
    found = {b["baseline"]: b for b in part["batches"]}
    assert found["sedd"]["break_even"] == 4 and found["ours-vanilla"]["break_even"] is None
    assert [s["vanilla_tokens_per_second"] for s in found["sedd"]["sizes"]] == pytest.approx(
        [10, 18, 30, 50]
    )


def test_the_csv_has_a_line_a_cell() -> None:
    told = results.fold(
        [BEGIN, PART, turn(run(cell("hf"), 10, 1.0), run(cell("sedd", 3), 10, 0.5))], finished=True
    )
    header, first, second = results.table(told).splitlines()
    assert {"speedup_vs_hf", "speedup_vs_hf_min", "tokens_per_second_max", "tau"} <= set(
        header.split(",")
    )
    row = dict(zip(header.split(","), second.split(","), strict=True))
    assert (
        first.startswith("t,main,hf") and row["speedup_vs_hf"] == "2.0" and row["draft_len"] == "3"
    )
