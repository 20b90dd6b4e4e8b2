"""Part by part, unit by unit: a generator of events, over which the live table folds. Each unit's record is in the journal first."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdiff.bench import environment, order, session, suites
from specdiff.bench.journal import Journal
from specdiff.bench.plan import Part, Settings
from specdiff.bench.session import LOADING, Session

GONE_ON = "gone on"  # how notes of it begin


@dataclass(frozen=True, slots=True)
class Event:
    """A unit is about to begin (`record` None) or done; `done` of `total` weight of the part are behind it, `skipped` from earlier runs."""

    part: str
    title: str
    done: float = 0.0
    total: float = 1.0
    skipped: float = 0.0
    record: dict[str, Any] | None = None


def run(settings: Settings, parts: Sequence[Part], journal: Journal) -> Iterator[Event]:
    """Measure what the journal does not hold yet.

    Where there are several parts, one that cannot be loaded is told in its record, and the others go on; a single one raises.
    """
    for part in parts:
        if f"{part.name}/end" in journal.keys:
            continue
        yield Event(part.name, f"loading {part.model}")
        try:
            loaded = session.load(part, settings, read(part, settings))
        except LOADING as error:
            if len(parts) == 1:
                raise
            told = {"missing": " ".join(filter(None, (session.explained(error, 1), part.remedy)))}
            yield Event(part.name, "missing", 1.0, record=_add(journal, part, told))
            continue
        _add(journal, part, _described(loaded, journal))
        yield from _measure(loaded, journal)
        journal.add({"kind": "end", "key": f"{part.name}/end", "part": part.name})


def read(part: Part, settings: Settings) -> list[suites.Text]:
    """A part's texts. Raises UsageError naming file and line, or what a data set lacks."""
    return (
        suites.spread(part.texts, settings.prompts)
        if part.texts is not None
        else suites.read(part.suite, settings.prompts)
    )


def _add(journal: Journal, part: Part, told: dict[str, Any]) -> dict[str, Any]:
    """The part's own record; a resumed run may know better than the first, and the last one counts."""
    about = {
        "part": part.name,
        "model": part.model,
        "dataset": part.dataset,
        "max_tokens": part.max_tokens,
        "notes": list(part.notes),
    }
    return journal.add(
        {"kind": "part", "key": f"{part.name}/part", **about, "missing": None, **told}
    )


def _described(loaded: Session, journal: Journal) -> dict[str, Any]:
    told = [
        {
            "name": e.name,
            "kind": e.kind,
            "spec": e.spec,
            "why": (why := loaded.problems.get(e.name)),
        }
        | {"status": "ok" if why is None else "failed" if e.required else "missing"}
        for e in loaded.part.entries
    ]
    prompts = [{"id": p.id, "task": p.task, "tokens": len(p.ids)} for p in loaded.prompts]
    dtype = str(loaded.lm.target.info.dtype).removeprefix("torch.")
    where = environment.describe(loaded.lm.target.info.device)
    before = [
        r
        for r in journal.records
        if r["key"] == f"{loaded.part.name}/part" and r["missing"] is None
    ]
    notes = [*loaded.notes, *(note for r in before[-1:] for note in _changes(r, where))]
    return {
        "notes": notes,
        "prompts": prompts,
        "baselines": told,
        "dtype": dtype,
        "environment": where,
    }


def _changes(before: Mapping[str, Any], where: Mapping[str, Any]) -> Iterator[str]:
    """What a run that is gone on with no longer has in common with itself; and what it had lost before that."""
    yield from (note for note in before["notes"] if note.startswith(GONE_ON))
    old = before["environment"]
    for name in (n for n in where if n != "date" and where[n] != old.get(n)):
        yield f"{GONE_ON} with another {name}: {old.get(name)}, then {where[name]}"


def _measure(loaded: Session, journal: Journal) -> Iterator[Event]:
    name, known = loaded.part.name, journal.keys
    for record in journal.records:
        if record.get("part") == name:
            loaded.learn(record)
    todo, done = order.units(loaded), 0.0
    total, skipped = sum(u.weight for u in todo), sum(u.weight for u in todo if u.key in known)
    if skipped < total:
        yield Event(name, "warming up", skipped=skipped, total=total)
        order.warm(loaded)
    for unit in todo:
        if unit.key not in known:
            yield Event(name, unit.title, done, total, skipped)
            begin = time.perf_counter()
            record = journal.add(
                {"key": unit.key, "part": name, **unit.work(), "took": time.perf_counter() - begin}
            )
            loaded.learn(record)
            yield Event(name, unit.title, done + unit.weight, total, skipped, record)
        done += unit.weight
