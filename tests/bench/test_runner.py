"""A whole benchmark of tiny models: what it measures, what an interrupt keeps, and how one bad cell leaves the others alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from specdiff.bench import costs, environment, equality, measure, order, results, runner, session
from specdiff.bench.baselines import Decoder, Ours
from specdiff.bench.journal import Journal
from specdiff.bench.plan import Cell, Entry, Part, Settings
from specdiff.bench.runs import Ask, Run
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.types import Batch, Draft, SamplingParams
from specdiff.verify import verifier

ABOUT = {"suite": "jsonl:x", "command": "specdiff bench"}
Make = Callable[..., Any]


def journal(folder: Path, settings: Settings, resume: bool = False) -> Journal:
    return Journal(
        folder,
        {"smoke": settings.smoke, "seed": settings.seed, "gammas": settings.gammas},
        ABOUT,
        resume=resume,
    )


def whole(settings: Settings, part: Part, folder: Path, resume: bool = False) -> dict[str, Any]:
    kept = journal(folder, settings, resume)
    for _ in runner.run(settings, [part], kept):
        pass
    return results.fold(kept.records, finished=True)


def names(told: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (c["stage"], c["baseline"], c["draft_len"] == "auto", c["temperature"], c["batch"])
        for c in told["parts"][0]["cells"]
    ]


def load(settings: Settings, part: Part) -> session.Session:
    return session.load(part, settings, runner.read(part, settings))


def test_everything_is_measured(
    settings: Make, part: Make, drafters: dict[str, str], tmp_path: Path
) -> None:
    small = drafters["small"]
    entries = (
        Entry("hf", "hf"), Entry("hf-assisted", "hf-assisted", small), Entry("hf-prompt-lookup", "hf-prompt-lookup"),
        Entry("ours-vanilla", "ours", "none"), Entry("autoregressive", "ours", small), Entry("sedd", "ours", drafters["sedd"]),
        Entry("ngram", "ours", "ngram"),
    )  # fmt: skip
    told = whole(settings(batch=(1, 2), sweeps=True), part(*entries), tmp_path)
    assert results.problems(told) == [] and told["schema"] == 1 and told["environment"]["torch"]
    (only,) = told["parts"]
    main = [c for c in only["cells"] if c["stage"] == "main"]
    assert [c["baseline"] for c in main if c["temperature"] == 0][:7] == [e.name for e in entries]
    assert {c["baseline"] for c in main if c["draft_len"] == "auto"} <= {
        "autoregressive",
        "sedd",
        "ngram",
    }
    assert all(c["turns"] >= 5 and c["speedup_vs_hf"]["turns"] == c["turns"] for c in main)
    assert all(c["exact"] == 1.0 for c in main if c["temperature"] == 0)
    assert {(t["baseline"], t["temperature"]) for t in only["tuning"]} == {
        (n, t) for n in ("hf-prompt-lookup", "autoregressive", "sedd", "ngram") for t in (0.0, 1.0)
    }
    swept = {
        (c["baseline"], c["draft_len"], c["steps"]) for c in only["cells"] if c["stage"] == "sweep"
    }
    assert {
        ("sedd", 2, 1),
        ("sedd", 4, 1),
        ("autoregressive", 2, None),
        ("hf", None, None),
    } <= swept
    assert {b["baseline"] for b in only["batches"]} == {
        "hf",
        "ours-vanilla",
        "autoregressive",
        "sedd",
        "ngram",
    }
    assert {p["n"] for p in only["costs"]["target"]} == {1, 3} and {
        p["baseline"] for p in only["costs"]["draft"]
    } >= {"sedd", "ngram"}
    assert all(0 <= p["overlap"] <= 1 + 1e-6 for c in only["conditional"] for p in c["positions"])
    assert {o["task"] for o in only["outputs"]} == {"odd", "even"}
    assert sum(c["seconds"]["total"] for c in main) > 0 and all(
        c["memory"] is None or c["memory"]["peak"] > 0 for c in main
    )


def test_an_interrupted_run_goes_on_where_it_was(
    settings: Make, part: Make, tmp_path: Path
) -> None:
    """Closed after a few units, the last line torn: the same units once each, and the same cells as a run that was left alone."""
    chosen, one = settings(), part()
    kept = journal(tmp_path / "a", chosen)
    events = runner.run(chosen, [one], kept)
    while len(kept.records) < 6:
        next(events)
    events.close()
    with (tmp_path / "a" / "journal.jsonl").open("a") as file:
        file.write('{"kind": "turn", "key": "tiny/main/0/')
    done = [r["key"] for r in kept.records]
    told = whole(chosen, one, tmp_path / "a", resume=True)
    alone = whole(chosen, one, tmp_path / "b")
    assert (
        names(told) == names(alone) and told["parts"][0]["prompts"] == alone["parts"][0]["prompts"]
    )
    again = journal(tmp_path / "a", chosen, resume=True)
    keys = [r["key"] for r in again.records]
    assert keys[: len(done)] == done
    measured = [k for k in keys if not k.endswith(("/part", "/end")) and k != "begin"]
    assert len(measured) == len(set(measured)) and set(measured) == {
        u.key for u in order.units(load(chosen, one))
    }
    assert told["parts"][0]["notes"] == []
    before = len(again.records)
    assert (
        list(runner.run(chosen, [one], again)) == [] and len(again.records) == before
    )  # nothing is left to do


def test_going_on_with_other_code_is_told(
    settings: Make, part: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, one = settings(temperatures=(0.0,)), part()
    for at, commit in enumerate(("old", "new", "new")):
        monkeypatch.setattr(environment, "commit", lambda folder, commit=commit: commit)
        kept = journal(tmp_path, chosen, resume=at > 0)
        events = runner.run(chosen, [one], kept)
        before = len(kept.records)
        while len(kept.records) < before + 3:
            next(events)
        events.close()
    assert results.fold(kept.records, finished=False)["parts"][0]["notes"] == [
        "gone on with another commit: old, then new"
    ]


def test_one_batch_size_is_measured_too(settings: Make, part: Make) -> None:
    keys = [u.key for u in order.units(load(settings(batch=(2,)), part()))]
    assert sum("/batch/" in key for key in keys) == order.ALTERNATIONS
    assert not any("/batch/" in u.key for u in order.units(load(settings(batch=(1,)), part())))


def test_the_fastest_is_known_even_where_nothing_is_to_be_tuned(
    settings: Make, part: Make, drafters: dict[str, str]
) -> None:
    entries = (
        Entry("ours-vanilla", "ours", "none"),
        Entry("small", "ours", drafters["small"]),
        Entry("ngram", "ours", "ngram"),
    )
    loaded = load(settings(draft_len=2, gammas=(2,)), part(*entries))
    for unit in order.units(loaded):
        if "/tune/" in unit.key:
            loaded.learn(unit.work())
    assert set(loaded.rates) == {(n, t) for n in ("small", "ngram") for t in (0.0, 1.0)}
    loaded.rates["small", 0.0], loaded.rates["ngram", 0.0] = 1.0, 2.0
    assert order.main_cells(loaded, 0.0)[-1].baseline == "ngram"


def test_a_ratio_has_five_turns_however_few_prompts(settings: Make, part: Make) -> None:
    def turns(**changes: Any) -> dict[str, int]:
        keys = [u.key.split("/") for u in order.units(load(settings(**changes), part()))]
        return {heat: sum(k[1:3] == ["main", heat] for k in keys) for heat in ("0", "1")}

    assert turns() == {"0": 6, "1": 6}  # two prompts, three times
    assert turns(times=4) == {"0": 8, "1": 8}


def test_the_best_of_a_large_grid_must_be_so_twice(
    settings: Make, part: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K=6 is lucky on the first prompts and slow on the others; K=2 breaks; K=5 is the best of all but not seen again."""
    loaded = load(settings(gammas=(2, 3, 4, 5, 6)), part())
    speeds = {3: (3.0, 3.0), 4: (4.0, 4.0), 5: (1.0, 9.0), 6: (6.0, 0.1)}
    asked: list[tuple[Any, int]] = []

    def attempt(cell: Cell, ask: Ask, *, remember: bool) -> Run | str:
        final = ask.prompts[0] == loaded.prompts[1].ids
        asked.append((cell.draft_len, int(final)))
        return (
            "too short"
            if cell.draft_len == 2
            else Run([[0] * 8], 8 / speeds[cell.draft_len][final], 0.1, 1)
        )  # type: ignore[index]

    monkeypatch.setattr(
        session.Session, "attempt", lambda self, *arguments, **more: attempt(*arguments, **more)
    )
    entry = next(e for e in loaded.entries() if e.name == "sedd")
    told = measure.tune(loaded, entry, 0.0, loaded.prompts[:1], loaded.prompts[1:], 8)
    assert told["best"]["draft_len"] == 4 and {k for k, final in asked if final} == {3, 4, 6}
    assert [p["why"] for p in told["grid"]] == ["too short", None, None, None, None]


def test_what_tuning_found_is_not_forgotten(settings: Make, part: Make, tmp_path: Path) -> None:
    """The resumed run measures at the draft lengths the first one found, not at ones of its own."""
    chosen = settings()
    kept = journal(tmp_path, chosen)
    for heat, best in (("0", 4), ("1", 2)):
        point = {"draft_len": best, "steps": 1, "tokens_per_second": 1e9, "why": None}
        told = {
            "kind": "tune",
            "part": "tiny",
            "baseline": "sedd",
            "temperature": float(heat),
            "grid": [point],
            "best": point,
            "why": None,
        }
        kept.add({"key": f"tiny/tune/{heat}/sedd", **told})
    cells = whole(chosen, part(), tmp_path, resume=True)["parts"][0]["cells"]
    assert {(c["temperature"], c["draft_len"]) for c in cells if c["baseline"] == "sedd"} == {
        (0, 4),
        (0, "auto"),
        (1, 2),
        (1, "auto"),
    }


def test_tuning_once_settles_every_temperature(settings: Make, part: Make, tmp_path: Path) -> None:
    chosen = settings(tune_each=False)
    told = whole(chosen, part(), tmp_path)["parts"][0]
    assert [t["temperature"] for t in told["tuning"]] == [0.0]
    cells = [
        (c["temperature"], c["draft_len"])
        for c in told["cells"]
        if c["baseline"] == "sedd" and c["draft_len"] != "auto"
    ]
    assert cells == [
        (0.0, told["tuning"][0]["best"]["draft_len"]),
        (1.0, told["tuning"][0]["best"]["draft_len"]),
    ]


def test_other_settings_do_not_go_on(settings: Make, tmp_path: Path) -> None:
    journal(tmp_path, settings()).add({"kind": "turn", "key": "x"})
    with pytest.raises(UsageError, match="holds a benchmark already; go on with it by --resume"):
        journal(tmp_path, settings())
    with pytest.raises(UsageError, match=r"was begun with gammas = \[2, 4\], not \[2\]"):
        journal(tmp_path, settings(gammas=(2,)), resume=True)
    assert len(journal(tmp_path, settings(), resume=True).records) == 2


def test_a_drafter_for_another_target_is_told_and_the_rest_runs(
    settings: Make, part: Make, drafters: dict[str, str], tmp_path: Path
) -> None:
    plain = Entry("ours-vanilla", "ours", "none")
    absent = Entry("sedd", "ours", "sedd", required=False)
    told = whole(
        settings(temperatures=(0.0,)),
        part(plain, absent, Entry("theirs", "ours", drafters["foreign"])),
        tmp_path,
    )
    (only,) = told["parts"]
    status = {b["name"]: (b["status"], b["why"]) for b in only["baselines"]}
    assert status["ours-vanilla"] == ("ok", None)
    assert status["sedd"][0] == "missing" and "no bundled sedd drafter" in status["sedd"][1]
    assert (
        status["theirs"][0] == "failed"
        and "40" in status["theirs"][1]
        and "48" in status["theirs"][1]
    )
    assert {c["baseline"] for c in only["cells"]} == {"ours-vanilla"}
    (problem,) = results.problems(told)
    assert problem.startswith("tiny: theirs: ")


def test_the_first_difference() -> None:
    assert equality.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert equality.first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert (
        equality.first_difference([1, 2], [1, 2, 3]) == 2
        and equality.first_difference([1, 2, 3], []) == 0
    )


class Hungry(Decoder):
    """Has memory for two rows."""

    asked = 0

    def run(self, cell: Cell, ask: Ask) -> Run:
        self.asked += 1
        if len(ask.prompts) > 2:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return Run([[1, 2, 3]] * len(ask.prompts), 0.5, 0.25, len(ask.prompts))


def test_out_of_memory_ends_a_baseline_at_that_batch_size_and_larger_ones(
    settings: Make, part: Make
) -> None:
    loaded, hungry = load(settings(), part()), Hungry()
    loaded.decoders["sedd"] = hungry
    entry = next(e for e in loaded.entries() if e.name == "sedd")

    def attempt(batch: int) -> Run | str:
        ask = loaded.ask([loaded.prompts[0]] * batch, 1.0, seed=0, exactly=3)
        return loaded.attempt(Cell("batch", entry.name, 2, 1, "token", 1.0, batch), ask)

    assert isinstance(attempt(2), Run)
    assert attempt(4) == attempt(8) == "out of memory at batch 4: tried to allocate 1 GiB"
    assert hungry.asked == 2 and isinstance(attempt(1), Run)
    other = loaded.attempt(
        Cell("batch", entry.name, "auto", 1, "token", 1.0, 4),
        loaded.ask([loaded.prompts[0]] * 4, 1.0, seed=0),
    )
    assert isinstance(other, str) and hungry.asked == 4, "another setting is tried for itself"


def greedy_turn(loaded: session.Session) -> dict[str, Any]:
    unit = next(u for u in order.units(loaded) if "/main/0/" in u.key)
    return unit.work()


def test_greedy_answers_of_another_model_are_caught(
    settings: Make, part: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the sedd cell decodes with a target that is not ours."""
    loaded = load(settings(), part())
    loaded.best[("sedd", 0.0)] = (2, None)
    assert greedy_turn(loaded)["divergences"] == []
    sedd = loaded.decoders["sedd"]
    assert isinstance(sedd, Ours)
    loaded.decoders["sedd"] = Ours(CausalTarget(tiny.model("llama", seed=7)), sedd.build)
    found = greedy_turn(loaded)["divergences"]
    assert {d["baseline"] for d in found} == {"sedd"} and not any(d["near_tie"] for d in found)
    (first, *_) = found
    assert (
        first["top2_gap"] > equality.TIES[torch.float32]
        and first["top2"][0] == first["tokens"][1] != first["tokens"][0]
    )
    judge, ids = loaded.decoders["hf"], list(loaded.prompts[0].ids)
    best = equality._gap(judge, ids, [0, 0], torch.float32)["top2"]
    monkeypatch.setitem(equality.TIES, torch.float32, 0.5)  # wider than the gap of the first two
    assert equality._gap(judge, ids, best, torch.float32)["near_tie"]
    assert not equality._gap(judge, ids, [best[0], 0], torch.float32)["near_tie"], (
        "a token far below is no tie"
    )
    assert not equality._gap(judge, ids, [best[0], equality.ENDED], torch.float32)["near_tie"]
    monkeypatch.setitem(equality.TIES, torch.float32, 1e9)
    assert all(d["near_tie"] for d in greedy_turn(loaded)["divergences"])


class Broken(Drafter[None]):
    """Raises in its second round."""

    draft_len = 2
    rounds = 0

    def propose(self, context: Any, state: None, noise: Any, draft_len: int) -> Draft:
        self.rounds += 1
        if self.rounds > 1:
            raise RuntimeError("lost its way")
        return Draft(context.batch.anchor[:, None].expand(-1, draft_len).contiguous())


def test_a_drafter_that_breaks_is_not_measured_as_plain_decoding(
    settings: Make, part: Make
) -> None:
    loaded = load(settings(), part())
    loaded.decoders["sedd"] = Ours(loaded.lm.target, lambda options: Broken())
    ask = loaded.ask(loaded.prompts[:1], 0.0, seed=0)
    why = loaded.attempt(Cell("main", "sedd", 2, None, "token", 0.0, 1), ask)
    assert isinstance(why, str) and "lost its way" in why
    entry = next(e for e in loaded.entries() if e.name == "sedd")
    assert "lost its way" in measure.conditional(loaded, entry, 0.0, loaded.prompts)["why"]
    assert "lost its way" in measure.draft_cost(loaded, entry, 16, None, 2)["why"]


def test_acceptance_given_reached_is_the_overlap(
    part: Make, settings: Make, drafters: dict[str, str]
) -> None:
    """E[accepted | reached] = E[1 - TV(p, q)] under `token`: within four standard errors over a few thousand positions."""
    loaded = load(settings(), part())
    sedd, params = loaded.decoders["sedd"], SamplingParams(max_tokens=60)
    assert isinstance(sedd, Ours)
    prompts = [list(p.ids) for p in loaded.prompts] * 8
    batches = [Batch.of(prompts, [params] * 16, [16 * b + i for i in range(16)]) for b in range(2)]
    for entry in costs.conditional(
        loaded.lm.target, sedd.drafter(None), batches, verifier("token"), 3
    ):
        n, mean = entry["reached"], entry["overlap"]
        assert abs(entry["acceptance"] - mean) < 4 * (mean * (1 - mean) / n) ** 0.5 + 1e-3
        assert entry["accepted"] <= n


def test_the_overlap_of_laws() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]])
    q = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]])
    tokens = torch.tensor([[0, 1]])
    assert torch.allclose(costs.overlaps(Draft(tokens, q), p), torch.tensor([[0.75, 0.3]]))
    assert torch.allclose(costs.overlaps(Draft(tokens), p), torch.tensor([[0.5, 0.3]]))


def test_contexts_reach_as_far_as_the_model() -> None:
    wanted = (128, 512, 1024, 4096)
    assert costs.reachable(wanted, 8192) == list(wanted)
    assert costs.reachable(wanted, 1024) == [128, 512, 1024 - costs.MARGIN]
    assert costs.reachable(wanted, 130) == [2] and costs.reachable(wanted, 100) == []


def test_a_target_is_no_drafter_of_its_own(settings: Make, part: Make) -> None:
    loaded = load(
        settings(), part(Entry("ours-vanilla", "ours", "none"), Entry("best", "ours", "auto"))
    )
    assert "no drafter for" in loaded.problems["best"] and isinstance(
        loaded.decoders["ours-vanilla"].drafter(None), NoDrafter
    )  # type: ignore[attr-defined]
