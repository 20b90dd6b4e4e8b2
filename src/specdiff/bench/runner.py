"""Benchmark runner: a generator of events, part by part and unit by unit.

Each unit's record is in the journal before its event. A unit whose key the journal holds is
skipped; what a unit compares is decided when it runs, because tuning comes first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from specdiff import environment
from specdiff.bench import costs, experiment, suites
from specdiff.bench.experiment import LOADING, DrafterSetting, Experiment
from specdiff.bench.journal import (
    BaselineStatus,
    FailureRecord,
    Journal,
    PartRecord,
    PromptFacts,
    Tuning,
    Turn,
    as_json,
    parse,
)
from specdiff.bench.settings import (
    ASSISTED,
    AUTO,
    DFLASH,
    HF,
    LOOKUP,
    PEERS,
    VANILLA,
    Baseline,
    BenchSettings,
    Cell,
    Part,
)
from specdiff.bench.turns import take_turn, tune

RESUMED = "resumed"  # how notes of a resumed run begin
ALTERNATIONS = 5  # turns that a ratio needs at least
TUNING_PROMPTS = 2
FINAL_PROMPTS = 3
COST_TIMES = 5
BATCH_TOKENS = 32
WARM_TOKENS = 4

UnitRecord = Tuning | Turn | costs.CostRecord | costs.Conditional | FailureRecord
ListCells = Callable[[Experiment, float], list[Cell]]


@dataclass(frozen=True, slots=True)
class BenchEvent:
    """A unit is about to run (`record` None), or done.

    `done` of the part's `total` weight is complete, `skipped` of it by earlier runs.
    """

    part: str
    title: str
    done: float = 0.0
    total: float = 1.0
    skipped: float = 0.0
    record: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """Something to measure. `weight`: roughly how many passes of the target it takes."""

    key: str
    title: str
    weight: float
    work: Callable[[], UnitRecord]


def run(settings: BenchSettings, parts: Sequence[Part], journal: Journal) -> Iterator[BenchEvent]:
    """Measure what the journal does not hold yet.

    If a part of several cannot be loaded, its record says so and the others run; a single one
    raises.
    """
    for part in parts:
        if f"{part.name}/end" in journal.keys:
            continue
        yield BenchEvent(part.name, f"loading {part.model}")
        try:
            loaded = experiment.load(part, settings, read(part, settings))
        except LOADING as error:
            if len(parts) == 1:
                raise
            missing = " ".join(filter(None, (experiment.explain(error, 1), part.remedy)))
            record = _add_part(journal, part, _part_record(part, missing))
            yield BenchEvent(part.name, "missing", 1.0, record=record)
            continue
        _add_part(journal, part, _describe(loaded, journal))
        yield from _measure(loaded, journal)
        journal.add({"kind": "end", "key": f"{part.name}/end", "part": part.name})


def read(part: Part, settings: BenchSettings) -> list[suites.PromptText]:
    """A part's prompts. Raises UsageError naming file and line, or what a data set lacks."""
    if part.texts is not None:
        return suites.spread(part.texts, settings.prompts)
    return suites.read(part.suite, settings.prompts, settings.per_task)


def _add_part(journal: Journal, part: Part, record: PartRecord) -> dict[str, Any]:
    """A resumed run adds the part's record again, and the last one counts."""
    return journal.add({"key": f"{part.name}/part"} | as_json(record))


def _part_record(part: Part, missing: str | None) -> PartRecord:
    return PartRecord(
        part.name, part.model, part.dataset, part.max_tokens, list(part.notes), missing
    )


def _describe(loaded: Experiment, journal: Journal) -> PartRecord:
    info = loaded.lm.target.info
    facts = environment.describe(info.device)
    key = f"{loaded.part.name}/part"
    before = [r for r in journal.records if r["key"] == key and r["missing"] is None]
    changes = list(_changes(before[-1], facts)) if before else []
    return replace(
        _part_record(loaded.part, None),
        notes=[*loaded.notes, *changes],
        prompts=[PromptFacts(p.id, p.task, len(p.ids)) for p in loaded.prompts],
        baselines=[_status(b, loaded.problems.get(b.name)) for b in loaded.part.baselines],
        dtype=str(info.dtype).removeprefix("torch."),
        environment=facts,
    )


def _status(baseline: Baseline, why: str | None) -> BaselineStatus:
    status = "ok"
    if why is not None:
        status = "failed" if baseline.required else "missing"
    return BaselineStatus(baseline.name, baseline.kind, baseline.spec, status, why)


def _changes(before: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    """Notes on what differs since the run before, and on what differed already then."""
    yield from (note for note in before["notes"] if note.startswith(RESUMED))
    old = before["environment"]
    for name in facts:
        if name != "date" and facts[name] != old.get(name):
            yield f"{RESUMED} with another {name}: {old.get(name)}, then {facts[name]}"


def _measure(loaded: Experiment, journal: Journal) -> Iterator[BenchEvent]:
    name = loaded.part.name
    keys = journal.keys
    for record in journal.records:
        if record.get("part") == name and record["kind"] == Tuning.kind:
            loaded.restore(parse(Tuning, record))
    everything = units(loaded)
    total = sum(u.weight for u in everything)
    skipped = sum(u.weight for u in everything if u.key in keys)
    done = 0.0
    if skipped < total:
        yield BenchEvent(name, "warming up", skipped=skipped, total=total)
        warm_up(loaded)
    for unit in everything:
        if unit.key not in keys:
            yield BenchEvent(name, unit.title, done, total, skipped)
            begin = time.perf_counter()
            result = unit.work()
            seconds = time.perf_counter() - begin
            about = {"key": unit.key, "part": name}
            record = journal.add(about | as_json(result) | {"took": seconds})
            if isinstance(result, Tuning):
                loaded.restore(result)
            yield BenchEvent(name, unit.title, done + unit.weight, total, skipped, record)
        done += unit.weight


def units(loaded: Experiment) -> list[Unit]:
    """All of a part's units, with keys that are the same in every run of it."""
    everything = [*_tuning(loaded)]
    for temperature in loaded.settings.temperatures:
        everything += _turns(loaded, "main", temperature, len(loaded.prompts), main_cells)
    everything += [*_conditional(loaded), *_costs(loaded)]
    if loaded.settings.sweeps:
        for temperature in loaded.settings.temperatures:
            sample = loaded.settings.sample
            everything += _turns(loaded, "sweep", temperature, sample, sweep_cells)
    if loaded.settings.batch != (1,):
        everything += _batches(loaded)
    return [replace(unit, key=f"{loaded.part.name}/{unit.key}") for unit in everything]


def warm_up(loaded: Experiment) -> None:
    """Every baseline once, unmeasured: first runs allocate, compile and page weights in.

    What fails here fails again in its turn.
    """
    temperature = loaded.settings.temperatures[0]
    for baseline in loaded.baselines():
        work = loaded.workload(loaded.prompts[:1], temperature, seed=0, most=WARM_TOKENS)
        loaded.attempt(loaded.cell("warm", baseline, temperature, 1), work, remember=False)


def _tuning(loaded: Experiment) -> Iterator[Unit]:
    settings = loaded.settings
    prompts = loaded.prompts[:TUNING_PROMPTS]
    finals = loaded.prompts[TUNING_PROMPTS : TUNING_PROMPTS + FINAL_PROMPTS]
    most = min(settings.tuning_tokens, loaded.part.max_tokens)
    drafting = _tunable(loaded)
    temperatures = settings.temperatures if settings.tune_each else settings.temperatures[:1]
    for temperature in temperatures:
        for baseline in loaded.distinct(temperature):
            points = len(loaded.grid(baseline))
            # the speeds of all drafters must be known, to find the fastest
            if points > 1 or (baseline in drafting and len(drafting) > 1):
                yield Unit(
                    key=f"tune/{temperature:g}/{baseline.name}",
                    title=f"tuning {baseline.name} at temperature {temperature:g}",
                    weight=points * len(prompts) * most,
                    work=partial(tune, loaded, baseline, temperature, prompts, finals, most),
                )


def _tunable(loaded: Experiment) -> list[Baseline]:
    """The drafters that run at a draft length of their own."""
    return [b for b in loaded.baselines(drafting=True) if b.draft_len != AUTO]


def main_cells(loaded: Experiment, temperature: float) -> list[Cell]:
    """Every baseline at its best setting, and the fastest drafter once more at the default draft
    length, unless it is the default drafter too."""
    baselines = loaded.distinct(temperature)
    cells = [loaded.cell("main", b, temperature, 1) for b in baselines]
    drafting = [b for b in _tunable(loaded) if b in baselines and b.name not in loaded.problems]
    if drafting:
        best = max(drafting, key=lambda b: loaded.rates.get((b.name, temperature), 0.0))
        by_default = any(c.baseline == AUTO and c.draft_len == AUTO for c in cells)
        if not (by_default and best.spec == "cascade"):
            cells.append(replace(loaded.cell("main", best, temperature, 1), draft_len=AUTO))
    return cells


def sweep_cells(loaded: Experiment, temperature: float) -> list[Cell]:
    """All settings of each drafter that is a network, and the references.

    (The settings of those that look up are in their tuning.)
    """
    references = [b for b in loaded.baselines() if b.name in (HF, VANILLA)]
    cells = [loaded.cell("sweep", b, temperature, 1) for b in references]
    for baseline in loaded.baselines(drafting=True):
        if not baseline.looks_up and baseline.draft_temperature is None:
            settings = _sweep_settings(loaded, baseline)
            cells += [loaded.cell("sweep", baseline, temperature, 1, s) for s in settings]
    return cells


def _sweep_settings(loaded: Experiment, baseline: Baseline) -> list[DrafterSetting]:
    length = loaded.grid(baseline)[0][0]
    points = loaded.grid(replace(baseline, draft_len=None, steps=None))
    own = [(length, steps) for steps in dict.fromkeys(s for _, s in points)]
    return [*points, *(setting for setting in own if setting not in points)]


def _turns(
    loaded: Experiment, stage: str, temperature: float, count: int, cells: ListCells
) -> Iterator[Unit]:
    """Turns over the first `count` prompts, repeated until a ratio has its alternations."""
    prompts = loaded.prompts[:count]
    times = max(loaded.settings.times if stage == "main" else 1, -(-ALTERNATIONS // len(prompts)))
    weight = float(len(cells(loaded, temperature)) * loaded.part.max_tokens)
    for at in range(times * len(prompts)):
        repetition, i = divmod(at, len(prompts))
        yield Unit(
            key=f"{stage}/{temperature:g}/{repetition}/{i}",
            title=f"{stage}, temperature {temperature:g}: turn {at + 1} of {times * len(prompts)}",
            weight=weight,
            work=partial(_turn, loaded, cells, temperature, i, repetition, at),
        )


def _turn(
    loaded: Experiment, cells: ListCells, temperature: float, i: int, repetition: int, at: int
) -> Turn:
    return take_turn(loaded, cells(loaded, temperature), [loaded.prompts[i]], repetition, rotate=at)


def _conditional(loaded: Experiment) -> Iterator[Unit]:
    """At the last temperature above 0."""
    temperatures = loaded.settings.temperatures
    temperature = next((t for t in reversed(temperatures) if t > 0), temperatures[0])
    sample = loaded.prompts[: loaded.settings.sample]
    for baseline in _tunable(loaded):
        yield Unit(
            key=f"conditional/{baseline.name}",
            title=f"acceptance of {baseline.name}",
            weight=0.7 * len(sample) * loaded.part.max_tokens,
            work=partial(costs.conditional, loaded, baseline, temperature, sample),
        )


def _costs(loaded: Experiment) -> Iterator[Unit]:
    settings = loaded.settings
    weight = COST_TIMES * sum(1 + width / 16 for width in settings.widths)
    # on random text, which repeats nothing, a cascade costs what its inner drafter does
    own = [b for b in _tunable(loaded) if b.draft_temperature is None]
    drafting = [b for b in own if b.spec == "ngram" or not b.looks_up]
    for context in costs.reachable(settings.contexts, loaded.lm.target.info.max_positions):
        yield Unit(
            key=f"cost/{context}",
            title=f"cost of scoring after {context} tokens",
            weight=weight,
            work=partial(costs.target_cost, loaded, context, COST_TIMES),
        )
        for baseline in drafting:
            for steps in dict.fromkeys(steps for _, steps in loaded.grid(baseline)):
                yield Unit(
                    key=f"cost/{context}/{baseline.name}/{steps}",
                    title=f"cost of {baseline.name} after {context} tokens",
                    weight=2 * weight,
                    work=partial(costs.draft_cost, loaded, baseline, context, steps, COST_TIMES),
                )


def _batches(loaded: Experiment) -> Iterator[Unit]:
    """At the last temperature, stop ids ignored.

    Transformers speculates at batch 1 only, and other engines are measured there.
    """
    temperature = loaded.settings.temperatures[-1]
    kinds = (ASSISTED, DFLASH, LOOKUP, *PEERS)
    able = [b for b in loaded.baselines() if b.kind not in kinds]
    tokens = min(BATCH_TOKENS, loaded.part.max_tokens)
    for size in loaded.settings.batch:
        for at in range(ALTERNATIONS):
            yield Unit(
                key=f"batch/{temperature:g}/{size}/{at}",
                title=f"batch {size}: turn {at + 1} of {ALTERNATIONS}",
                weight=len(able) * tokens * (1 + size / 4),
                work=partial(_batch_turn, loaded, able, temperature, size, at, tokens),
            )


def _batch_turn(
    loaded: Experiment, able: list[Baseline], temperature: float, size: int, at: int, tokens: int
) -> Turn:
    prompts = loaded.prompts
    rows = [prompts[(at * size + i) % len(prompts)] for i in range(size)]
    cells = [loaded.cell("batch", b, temperature, size) for b in able]
    return take_turn(loaded, cells, rows, at, rotate=at, max_tokens=tokens)
