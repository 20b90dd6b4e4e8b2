"""In which order a part is measured, as units of which each can be skipped if an earlier run has done it.

What a unit compares is settled when it runs: tuning comes first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from specdiff.bench import costs, measure
from specdiff.bench.plan import ASSISTED, HF, LOOKUP, VANILLA, Cell
from specdiff.bench.session import Session

ALTERNATIONS = 5  # turns that a ratio needs at least
TUNING_PROMPTS, FINAL_PROMPTS = 2, 3
COST_TIMES = 5
BATCH_TOKENS = 32
WARM_TOKENS = 4

Work = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Unit:
    """Something to measure. `weight`: about how many passes of the target it takes."""

    key: str
    title: str
    weight: float
    work: Work


def units(loaded: Session) -> list[Unit]:
    """All of a part's units, with keys that are the same in every run of it."""
    listed = [*_tuning(loaded), *_main(loaded), *_conditional(loaded), *_costs(loaded)]
    if loaded.settings.sweeps:
        listed += _sweeps(loaded)
    if loaded.settings.batch != (1,):
        listed += _batches(loaded)
    return [replace(unit, key=f"{loaded.part.name}/{unit.key}") for unit in listed]


def warm(loaded: Session) -> None:
    """Every baseline once, unmeasured: first runs allocate, compile and page weights in. What fails here fails again in its turn."""
    heat = loaded.settings.temperatures[0]
    for entry in loaded.entries():
        ask = loaded.ask(loaded.prompts[:1], heat, seed=0, most=WARM_TOKENS)
        loaded.attempt(loaded.cell("warm", entry, heat, 1), ask, remember=False)


def _tuning(loaded: Session) -> Iterator[Unit]:
    prompts, most = (
        loaded.prompts[:TUNING_PROMPTS],
        min(loaded.settings.tuning_tokens, loaded.part.max_tokens),
    )
    finals = loaded.prompts[TUNING_PROMPTS : TUNING_PROMPTS + FINAL_PROMPTS]
    heats, drafting = loaded.settings.temperatures, loaded.entries(drafting=True)
    for heat in heats if loaded.settings.tune_each else heats[:1]:
        for entry in loaded.entries():
            points = len(loaded.grid(entry))
            if points > 1 or (
                entry in drafting and len(drafting) > 1
            ):  # which is the fastest must be known of all
                work = partial(measure.tune, loaded, entry, heat, prompts, finals, most)
                title = f"tuning {entry.name} at temperature {heat:g}"
                yield Unit(f"tune/{heat:g}/{entry.name}", title, points * len(prompts) * most, work)


def main_cells(loaded: Session, heat: float) -> list[Cell]:
    """Every baseline at its best setting, and the fastest drafter once more as users have it: `auto`, at its own draft length."""
    cells = [loaded.cell("main", entry, heat, 1) for entry in loaded.entries()]
    drafting = [e for e in loaded.entries(drafting=True) if e.name not in loaded.problems]
    if drafting:
        best = max(drafting, key=lambda entry: loaded.rates.get((entry.name, heat), 0.0))
        cells.append(replace(loaded.cell("main", best, heat, 1), draft_len="auto"))
    return cells


def sweep_cells(loaded: Session, heat: float) -> list[Cell]:
    """All settings of each drafter with a network, and what they are compared with. (Prompt lookup's are in its tuning.)"""
    entries = {e.name: e for e in loaded.entries()}
    plain = [
        loaded.cell("sweep", entries[name], heat, 1) for name in (HF, VANILLA) if name in entries
    ]
    swept = [e for e in loaded.entries(drafting=True) if e.spec != "ngram"]
    return plain + [
        loaded.cell("sweep", e, heat, 1, chosen) for e in swept for chosen in _swept(loaded, e.name)
    ]


def _swept(loaded: Session, name: str) -> list[tuple[int | None, int | None]]:
    entry = next(e for e in loaded.entries() if e.name == name)
    own = loaded.grid(entry)[0][0]
    free = replace(entry, draft_len=None, steps=None)
    points = loaded.grid(free)
    fixed = [
        (own, steps) for steps in dict.fromkeys(s for _, s in points) if (own, steps) not in points
    ]
    return [*points, *fixed]


def _turns(
    loaded: Session,
    stage: str,
    heat: float,
    count: int,
    cells: Callable[[Session, float], list[Cell]],
) -> Iterator[Unit]:
    """Turns over the first `count` prompts, all of them so often that a ratio has its alternations."""
    prompts = loaded.prompts[:count]
    times = max(loaded.settings.times if stage == "main" else 1, -(-ALTERNATIONS // len(prompts)))
    weight = float(len(cells(loaded, heat)) * loaded.part.max_tokens)
    for at in range(times * len(prompts)):
        repetition, place = divmod(at, len(prompts))
        work = partial(_turn, loaded, cells, heat, place, repetition, at)
        title = f"{stage}, temperature {heat:g}: turn {at + 1} of {times * len(prompts)}"
        yield Unit(f"{stage}/{heat:g}/{repetition}/{place}", title, weight, work)


def _turn(
    loaded: Session,
    cells: Callable[[Session, float], list[Cell]],
    heat: float,
    place: int,
    repetition: int,
    at: int,
) -> Any:
    return measure.turn(loaded, cells(loaded, heat), [loaded.prompts[place]], repetition, rotate=at)


def _main(loaded: Session) -> Iterator[Unit]:
    for heat in loaded.settings.temperatures:
        yield from _turns(loaded, "main", heat, len(loaded.prompts), main_cells)


def _sweeps(loaded: Session) -> Iterator[Unit]:
    for heat in loaded.settings.temperatures:
        yield from _turns(loaded, "sweep", heat, loaded.settings.sample, sweep_cells)


def _conditional(loaded: Session) -> Iterator[Unit]:
    sample = loaded.prompts[: loaded.settings.sample]
    heat = next(
        (t for t in reversed(loaded.settings.temperatures) if t > 0),
        loaded.settings.temperatures[0],
    )
    for entry in loaded.entries(drafting=True):
        work = partial(measure.conditional, loaded, entry, heat, sample)
        yield Unit(
            f"conditional/{entry.name}",
            f"acceptance of {entry.name}",
            0.7 * len(sample) * loaded.part.max_tokens,
            work,
        )


def _costs(loaded: Session) -> Iterator[Unit]:
    settings = loaded.settings
    weight = COST_TIMES * sum(1 + width / 16 for width in settings.widths)
    for context in costs.reachable(settings.contexts, loaded.lm.target.info.max_positions):
        of_target = partial(measure.target_cost, loaded, context, COST_TIMES)
        yield Unit(f"cost/{context}", f"cost of scoring behind {context} tokens", weight, of_target)
        for entry in loaded.entries(drafting=True):
            for steps in dict.fromkeys(steps for _, steps in loaded.grid(entry)):
                work = partial(measure.draft_cost, loaded, entry, context, steps, COST_TIMES)
                yield Unit(
                    f"cost/{context}/{entry.name}/{steps}",
                    f"cost of {entry.name} behind {context} tokens",
                    2 * weight,
                    work,
                )


def _batches(loaded: Session) -> Iterator[Unit]:
    """At the last temperature, ends of text ignored; transformers speculates at batch 1 only, so its two are not here."""
    heat = loaded.settings.temperatures[-1]
    able = [e for e in loaded.entries() if e.kind not in (ASSISTED, LOOKUP)]
    tokens = min(BATCH_TOKENS, loaded.part.max_tokens)
    for size in loaded.settings.batch:
        for at in range(ALTERNATIONS):
            rows = [loaded.prompts[(at * size + i) % len(loaded.prompts)] for i in range(size)]
            work = partial(
                _batch_turn, loaded, [e.name for e in able], heat, size, rows, at, tokens
            )
            weight = len(able) * tokens * (1 + size / 4)
            yield Unit(
                f"batch/{heat:g}/{size}/{at}",
                f"batch {size}: turn {at + 1} of {ALTERNATIONS}",
                weight,
                work,
            )


def _batch_turn(
    loaded: Session, names: list[str], heat: float, size: int, rows: list[Any], at: int, tokens: int
) -> dict[str, Any]:
    cells = [loaded.cell("batch", e, heat, size) for e in loaded.entries() if e.name in names]
    return measure.turn(loaded, cells, rows, at, rotate=at, max_tokens=tokens)
