"""A whole benchmark of tiny models: what it measures, what survives an interrupt, and how a bad
cell leaves the others alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from specdiff import environment
from specdiff.bench import costs, equality, experiment, results, runner, turns
from specdiff.bench.baselines import Decoder, OurDecoder
from specdiff.bench.equality import Divergence, first_difference, tie_at
from specdiff.bench.journal import FailureRecord, Journal, Tuning, TuningPoint, Turn, as_json
from specdiff.bench.results import BenchResults
from specdiff.bench.settings import Baseline, BenchSettings, Cell, Part, baselines
from specdiff.bench.timing import Measurement, Workload
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.types import Batch, Draft, SamplingParams
from specdiff.verify import verifier

ABOUT = {"suite": "jsonl:x", "command": "specdiff bench"}
Make = Callable[..., Any]


def journal(folder: Path, settings: BenchSettings, resume: bool = False) -> Journal:
    return Journal(
        folder,
        {"smoke": settings.smoke, "seed": settings.seed, "gammas": settings.gammas},
        ABOUT,
        resume=resume,
    )


def whole(settings: BenchSettings, part: Part, folder: Path, resume: bool = False) -> BenchResults:
    log = journal(folder, settings, resume)
    for _ in runner.run(settings, [part], log):
        pass
    return results.fold(log.records, finished=True)


def names(run: BenchResults) -> list[tuple[Any, ...]]:
    return [
        (c.stage, c.baseline, c.draft_len == "auto", c.temperature, c.batch)
        for c in run.parts[0].cells
    ]


def load(settings: BenchSettings, part: Part) -> experiment.Experiment:
    return experiment.load(part, settings, runner.read(part, settings))


def test_everything_is_measured(
    settings: Make, part: Make, drafters: dict[str, str], tmp_path: Path
) -> None:
    small = drafters["small"]
    everything = (
        Baseline("hf", "hf"),
        Baseline("hf-assisted", "hf-assisted", small),
        Baseline("hf-prompt-lookup", "hf-prompt-lookup"),
        Baseline("ours-vanilla", "ours", "none"),
        Baseline("autoregressive", "ours", small),
        Baseline("sedd", "ours", drafters["sedd"]),
        Baseline("ngram", "ours", "ngram"),
    )
    run = whole(settings(batch=(1, 2), sweeps=True), part(*everything), tmp_path)
    assert results.problems(run) == [] and run.schema == 1
    assert run.environment is not None and run.environment["torch"]
    (only,) = run.parts
    main = only.stage("main")
    greedy = [c for c in main if c.temperature == 0]
    assert [c.baseline for c in greedy][:7] == [b.name for b in everything]
    drafting = {"autoregressive", "sedd", "ngram"}
    assert {c.baseline for c in main if c.draft_len == "auto"} <= drafting
    assert all(c.turns >= 5 and c.speedup_vs_hf.turns == c.turns for c in main)
    assert all(c.exact == 1.0 for c in greedy)
    assert {(t.baseline, t.temperature) for t in only.tuning} == {
        (n, t) for n in ("hf-prompt-lookup", *drafting) for t in (0.0, 1.0)
    }
    swept = {(c.baseline, c.draft_len, c.steps) for c in only.stage("sweep")}
    assert {("sedd", 2, 1), ("sedd", 4, 1), ("autoregressive", 2, None)} <= swept
    assert ("hf", None, None) in swept
    assert {b.baseline for b in only.batches} == {"hf", "ours-vanilla"} | drafting
    assert {p.n for p in only.costs.target} == {1, 3}
    assert {p.baseline for p in only.costs.draft} >= {"sedd", "ngram"}
    overlaps = [p.overlap for c in only.conditional for p in c.positions]
    assert overlaps and all(0 <= overlap <= 1 + 1e-6 for overlap in overlaps)
    assert {o.task for o in only.outputs} == {"odd", "even"}
    assert sum(c.seconds["total"] for c in main) > 0
    assert all(c.memory is None or c.memory.peak > 0 for c in main)


def test_an_interrupted_run_goes_on_where_it_was(
    settings: Make, part: Make, tmp_path: Path
) -> None:
    """Closed after a few units, the last line torn: the same units once each, and the same cells as
    in a run without an interrupt."""
    options = settings()
    one = part()
    log = journal(tmp_path / "a", options)
    events = runner.run(options, [one], log)
    while len(log.records) < 6:
        next(events)
    events.close()
    with (tmp_path / "a" / "journal.jsonl").open("a") as file:
        file.write('{"kind": "turn", "key": "tiny/main/0/')
    done = [r["key"] for r in log.records]
    resumed = whole(options, one, tmp_path / "a", resume=True)
    alone = whole(options, one, tmp_path / "b")
    assert names(resumed) == names(alone)
    assert resumed.parts[0].prompts == alone.parts[0].prompts
    again = journal(tmp_path / "a", options, resume=True)
    keys = [r["key"] for r in again.records]
    assert keys[: len(done)] == done
    measured = [k for k in keys if not k.endswith(("/part", "/end")) and k != "begin"]
    assert len(measured) == len(set(measured))
    assert set(measured) == {u.key for u in runner.units(load(options, one))}
    assert resumed.parts[0].notes == []
    before = len(again.records)
    assert list(runner.run(options, [one], again)) == []  # nothing is left to do
    assert len(again.records) == before


def test_resuming_with_other_code_is_reported(
    settings: Make, part: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(temperatures=(0.0,))
    one = part()
    for at, commit in enumerate(("old", "new", "new")):
        monkeypatch.setattr(environment, "commit", lambda commit=commit: commit)
        log = journal(tmp_path, options, resume=at > 0)
        events = runner.run(options, [one], log)
        before = len(log.records)
        while len(log.records) < before + 3:
            next(events)
        events.close()
    (one_part,) = results.fold(log.records, finished=False).parts
    assert one_part.notes == ["resumed with another commit: old, then new"]


def test_one_batch_size_is_measured_too(settings: Make, part: Make) -> None:
    keys = [u.key for u in runner.units(load(settings(batch=(2,)), part()))]
    assert sum("/batch/" in key for key in keys) == runner.ALTERNATIONS
    assert not any("/batch/" in u.key for u in runner.units(load(settings(batch=(1,)), part())))


def test_the_fastest_is_known_even_where_nothing_is_to_be_tuned(
    settings: Make, part: Make, drafters: dict[str, str]
) -> None:
    few = (
        Baseline("ours-vanilla", "ours", "none"),
        Baseline("small", "ours", drafters["small"]),
        Baseline("ngram", "ours", "ngram"),
    )
    loaded = load(settings(draft_len=2, gammas=(2,)), part(*few))
    for unit in runner.units(loaded):
        if "/tune/" in unit.key:
            loaded.restore(unit.work())
    assert set(loaded.rates) == {(n, t) for n in ("small", "ngram") for t in (0.0, 1.0)}
    loaded.rates["small", 0.0] = 1.0
    loaded.rates["ngram", 0.0] = 2.0
    assert runner.main_cells(loaded, 0.0)[-1].baseline == "ngram"


def test_the_default_drafter_runs_at_the_default_length(
    settings: Make, part: Make, drafters: dict[str, str]
) -> None:
    """It is not tuned, and where the cascade is the fastest it is not measured twice."""
    plain = Baseline("ours-vanilla", "ours", "none")
    ngram = Baseline("ngram", "ours", "ngram")
    default = Baseline("auto", "ours", f"cascade:{drafters['sedd']}", draft_len="auto")
    loaded = load(settings(sweeps=True), part(plain, ngram, default))
    keys = [u.key for u in runner.units(loaded)]
    assert not any(key.endswith("/auto") for key in keys)
    cells = [(c.baseline, c.draft_len) for c in runner.main_cells(loaded, 0.0)]
    assert cells == [("ours-vanilla", None), ("ngram", 2), ("auto", "auto"), ("ngram", "auto")]
    loaded.part = replace(loaded.part, baselines=(plain, replace(ngram, spec="cascade"), default))
    assert [c.baseline for c in runner.main_cells(loaded, 0.0)] == ["ours-vanilla", "ngram", "auto"]
    assert {c.baseline for c in runner.sweep_cells(loaded, 0.0)} == {"ours-vanilla"}


def test_draft_temperatures_are_lines_of_their_own(
    settings: Make, part: Make, drafters: dict[str, str]
) -> None:
    """Above temperature 0, and not of what looks up."""
    chosen = settings(
        drafters=(f"mine={drafters['small']}", "other=ngram"),
        only=("mine", "ngram"),
        draft_temperatures=(0.0, 0.3),
    )
    lines = baselines(chosen)
    names = [line.name for line in lines if line.kind == "ours"]
    assert names == ["ours-vanilla", "ngram", "mine", "mine-t0", "mine-t0.3"]
    loaded = load(chosen, part(*(line for line in lines if line.kind == "ours")))
    assert loaded.problems == {}
    decoder = loaded.decoders["mine-t0.3"]
    assert isinstance(decoder, OurDecoder)
    drafter = decoder.drafter(None)
    assert isinstance(drafter, AutoregressiveDrafter)
    assert drafter.draft_temperature == 0.3 and drafter.temperatures == (1.0,)
    greedy = {cell.baseline for cell in runner.main_cells(loaded, 0.0)}
    assert greedy == {"ours-vanilla", "ngram", "mine"}
    assert {cell.baseline for cell in runner.main_cells(loaded, 1.0)} == {*names}


def test_a_full_curve_has_every_number_of_positions(settings: Make) -> None:
    assert settings(widths=(1, 64), curves=True).scored == [*range(1, 33), 64]
    assert settings(widths=(1, 64)).scored == [1, 64]


def test_a_ratio_has_five_turns_however_few_prompts(settings: Make, part: Make) -> None:
    def turns(**changes: Any) -> dict[str, int]:
        keys = [u.key.split("/") for u in runner.units(load(settings(**changes), part()))]
        return {t: sum(k[1:3] == ["main", t] for k in keys) for t in ("0", "1")}

    assert turns() == {"0": 6, "1": 6}  # two prompts, three times
    assert turns(times=4) == {"0": 8, "1": 8}


def test_the_best_of_a_large_grid_must_be_so_twice(
    settings: Make, part: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K=6 is lucky on the first prompts and slow on the others; K=2 fails; K=5 would be the best
    but does not reach the finals."""
    loaded = load(settings(gammas=(2, 3, 4, 5, 6)), part())
    speeds = {3: (3.0, 3.0), 4: (4.0, 4.0), 5: (1.0, 9.0), 6: (6.0, 0.1)}
    calls: list[tuple[Any, int]] = []

    def attempt(_: Any, cell: Cell, work: Workload, *, remember: bool) -> Measurement | str:
        final = work.prompts[0] == loaded.prompts[1].ids
        calls.append((cell.draft_len, int(final)))
        if cell.draft_len == 2:
            return "too short"
        return Measurement([[0] * 8], 8 / speeds[cell.draft_len][final], 0.1, 1)  # type: ignore[index]

    monkeypatch.setattr(experiment.Experiment, "attempt", attempt)
    tuning = turns.tune(
        loaded, baseline(loaded, "sedd"), 0.0, loaded.prompts[:1], loaded.prompts[1:], 8
    )
    assert tuning.best is not None and tuning.best.draft_len == 4
    assert {k for k, final in calls if final} == {3, 4, 6}
    assert [p.why for p in tuning.grid] == ["too short", None, None, None, None]


def test_tuning_results_are_restored(settings: Make, part: Make, tmp_path: Path) -> None:
    """The resumed run measures at the first one's draft lengths, not at ones of its own."""
    options = settings()
    log = journal(tmp_path, options)
    for temperature, best in (("0", 4), ("1", 2)):
        point = TuningPoint(best, 1, 1e9, None)
        tuning = Tuning("sedd", float(temperature), [point], point, None)
        key = {"key": f"tiny/tune/{temperature}/sedd", "part": "tiny"}
        log.add(key | as_json(tuning))
    cells = whole(options, part(), tmp_path, resume=True).parts[0].cells
    assert {(c.temperature, c.draft_len) for c in cells if c.baseline == "sedd"} == {
        (0, 4),
        (0, "auto"),
        (1, 2),
        (1, "auto"),
    }


def test_tuning_once_settles_every_temperature(settings: Make, part: Make, tmp_path: Path) -> None:
    (only,) = whole(settings(tune_each=False), part(), tmp_path).parts
    (tuning,) = only.tuning
    assert tuning.temperature == 0.0 and tuning.best is not None
    cells = [c for c in only.cells if c.baseline == "sedd" and c.draft_len != "auto"]
    length = tuning.best.draft_len
    assert [(c.temperature, c.draft_len) for c in cells] == [(0.0, length), (1.0, length)]


def test_other_settings_cannot_resume(settings: Make, tmp_path: Path) -> None:
    journal(tmp_path, settings()).add({"kind": "turn", "key": "x"})
    with pytest.raises(UsageError, match="holds a benchmark already; resume it with --resume"):
        journal(tmp_path, settings())
    with pytest.raises(UsageError, match=r"was begun with gammas = \[2, 4\], not \[2\]"):
        journal(tmp_path, settings(gammas=(2,)), resume=True)
    assert len(journal(tmp_path, settings(), resume=True).records) == 2


def test_a_drafter_for_another_target_is_reported_and_the_rest_runs(
    settings: Make, part: Make, drafters: dict[str, str], tmp_path: Path
) -> None:
    plain = Baseline("ours-vanilla", "ours", "none")
    absent = Baseline("sedd", "ours", "sedd", required=False)
    foreign = Baseline("theirs", "ours", drafters["foreign"])
    run = whole(settings(temperatures=(0.0,)), part(plain, absent, foreign), tmp_path)
    (only,) = run.parts
    status = {b.name: (b.status, b.why or "") for b in only.baselines}
    assert status["ours-vanilla"] == ("ok", "")
    assert status["sedd"][0] == "missing" and "no bundled sedd drafter" in status["sedd"][1]
    assert status["theirs"][0] == "failed"
    assert "40" in status["theirs"][1] and "48" in status["theirs"][1]
    assert {c.baseline for c in only.cells} == {"ours-vanilla"}
    (problem,) = results.problems(run)
    assert problem.startswith("tiny: theirs: ")


def test_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], []) == 0


class Hungry(Decoder):
    """Has memory for two rows."""

    calls = 0

    def run(self, cell: Cell, work: Workload) -> Measurement:
        self.calls += 1
        if len(work.prompts) > 2:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return Measurement([[1, 2, 3]] * len(work.prompts), 0.5, 0.25, len(work.prompts))


def test_out_of_memory_ends_a_baseline_at_that_batch_size_and_larger_ones(
    settings: Make, part: Make
) -> None:
    loaded = load(settings(), part())
    hungry = Hungry()
    loaded.decoders["sedd"] = hungry

    def attempt(batch: int) -> Measurement | str:
        work = loaded.workload([loaded.prompts[0]] * batch, 1.0, seed=0, exactly=3)
        return loaded.attempt(Cell("batch", "sedd", 2, 1, "token", 1.0, batch), work)

    assert isinstance(attempt(2), Measurement)
    assert attempt(4) == attempt(8) == "out of memory at batch 4: tried to allocate 1 GiB"
    assert hungry.calls == 2 and isinstance(attempt(1), Measurement)
    other = loaded.attempt(
        Cell("batch", "sedd", "auto", 1, "token", 1.0, 4),
        loaded.workload([loaded.prompts[0]] * 4, 1.0, seed=0),
    )
    assert isinstance(other, str) and hungry.calls == 4, "another setting is tried on its own"


def greedy_divergences(loaded: experiment.Experiment) -> list[Divergence]:
    unit = next(u for u in runner.units(loaded) if "/main/0/" in u.key)
    turn = unit.work()
    assert isinstance(turn, Turn)
    return turn.divergences


def baseline(loaded: experiment.Experiment, name: str) -> Baseline:
    return next(b for b in loaded.baselines() if b.name == name)


def test_greedy_answers_of_another_model_are_caught(
    settings: Make, part: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the sedd cell decodes with a target that is not ours."""
    loaded = load(settings(dtype="float32"), part())
    loaded.best[("sedd", 0.0)] = (2, None)
    assert greedy_divergences(loaded) == []
    sedd = loaded.decoders["sedd"]
    assert isinstance(sedd, OurDecoder)
    loaded.decoders["sedd"] = OurDecoder(CausalTarget(tiny.model("llama", seed=7)), sedd.build)
    divergences = greedy_divergences(loaded)
    assert {d.baseline for d in divergences} == {"sedd"}
    assert not any(d.near_tie for d in divergences)
    first = divergences[0]
    assert first.top2_gap is not None and first.top2_gap > equality.TIES[torch.float32]
    assert first.top2 is not None and first.top2[0] == first.tokens[1] != first.tokens[0]
    judge = loaded.decoders["hf"]
    ids = list(loaded.prompts[0].ids)
    best = tie_at(judge, ids, [0, 0], torch.float32).top2
    assert best is not None
    monkeypatch.setitem(equality.TIES, torch.float32, 0.5)  # wider than the gap of the first two
    assert tie_at(judge, ids, best, torch.float32).near_tie
    far = tie_at(judge, ids, [best[0], 0], torch.float32)
    assert not far.near_tie, "a token far below is no tie"
    assert not tie_at(judge, ids, [best[0], equality.ENDED], torch.float32).near_tie
    monkeypatch.setitem(equality.TIES, torch.float32, 1e9)
    assert all(d.near_tie for d in greedy_divergences(loaded))


class Broken(Drafter[None]):
    """Raises in its second round."""

    draft_len = 2
    rounds = 0

    def propose(self, context: Any, state: None, noise: Any, draft_len: int) -> Draft:
        self.rounds += 1
        if self.rounds > 1:
            raise RuntimeError("lost its way")
        return Draft(context.batch.anchor[:, None].expand(-1, draft_len).contiguous())


def test_a_drafter_that_fails_is_not_measured_as_plain_decoding(settings: Make, part: Make) -> None:
    loaded = load(settings(), part())
    loaded.decoders["sedd"] = OurDecoder(loaded.lm.target, lambda options: Broken())
    work = loaded.workload(loaded.prompts[:1], 0.0, seed=0)
    why = loaded.attempt(Cell("main", "sedd", 2, None, "token", 0.0, 1), work)
    assert isinstance(why, str) and "lost its way" in why
    sedd = baseline(loaded, "sedd")
    for record in (
        costs.conditional(loaded, sedd, 0.0, loaded.prompts),
        costs.draft_cost(loaded, sedd, 16, None, 2),
    ):
        assert isinstance(record, FailureRecord) and "lost its way" in record.why


def test_acceptance_given_reached_is_the_overlap(
    part: Make, settings: Make, drafters: dict[str, str]
) -> None:
    """E[accepted | reached] = E[1 - TV(p, q)] under `token`: within four standard errors over a few
    thousand positions."""
    loaded = load(settings(), part())
    sedd = loaded.decoders["sedd"]
    params = SamplingParams(max_tokens=60)
    assert isinstance(sedd, OurDecoder)
    prompts = [list(p.ids) for p in loaded.prompts] * 8
    batches = [Batch.of(prompts, [params] * 16, [16 * b + i for i in range(16)]) for b in range(2)]
    drafter = sedd.drafter(None)
    positions = costs.acceptance(loaded.lm.target, drafter, batches, verifier("token"), 3)
    assert len(positions) == 3
    for position in positions:
        n = position.reached
        mean = position.overlap
        assert position.acceptance is not None and mean is not None
        assert abs(position.acceptance - mean) < 4 * (mean * (1 - mean) / n) ** 0.5 + 1e-3
        assert position.accepted <= n


def test_the_overlap_of_distributions() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]])
    q = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]])
    tokens = torch.tensor([[0, 1]])
    assert torch.allclose(costs.overlaps(Draft(tokens, q), p), torch.tensor([[0.75, 0.3]]))
    assert torch.allclose(costs.overlaps(Draft(tokens), p), torch.tensor([[0.5, 0.3]]))


def test_contexts_reach_as_far_as_the_model() -> None:
    contexts = (128, 512, 1024, 4096)
    assert costs.reachable(contexts, 8192) == list(contexts)
    assert costs.reachable(contexts, 1024) == [128, 512, 1024 - costs.MARGIN]
    assert costs.reachable(contexts, 130) == [2] and costs.reachable(contexts, 100) == []


def test_a_target_is_no_drafter_of_its_own(settings: Make, part: Make) -> None:
    loaded = load(
        settings(), part(Baseline("ours-vanilla", "ours", "none"), Baseline("best", "ours", "auto"))
    )
    assert "no drafter for" in loaded.problems["best"]
    vanilla = loaded.decoders["ours-vanilla"]
    assert isinstance(vanilla, OurDecoder) and isinstance(vanilla.drafter(None), NoDrafter)
