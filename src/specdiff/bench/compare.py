"""Two runs side by side. Ratios are the second run's figures over the first's: above 1, the second is larger.

A baseline is compared with itself at the settings each run's tuning found best; sweeps are compared point by point.
"""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from specdiff.bench.results import KEY

Record = Mapping[str, Any]
UNTOLD = ("date",)  # differs always
SETTING = ("draft_len", "steps")


def compare(first: Record, second: Record) -> dict[str, Any]:
    """{differences [{what, first, second}], cells [row], only_first [key], only_second [key]}; figures by `_row`."""
    ours, theirs = _cells(first), _cells(second)
    return {
        "differences": list(differences(first, second)),
        "cells": [_row(ours[key], theirs[key]) for key in ours if key in theirs],
        "only_first": [_named(ours[key]) for key in ours if key not in theirs],
        "only_second": [_named(theirs[key]) for key in theirs if key not in ours],
    }


def differences(first: Record, second: Record) -> Iterator[dict[str, Any]]:
    """What else than the code may make the figures differ: environment, settings, models, and runs that were cut short."""
    for name in ("status", "suite"):
        if first[name] != second[name]:
            yield {"what": name, "first": first[name], "second": second[name]}
    for group in ("environment", "settings"):
        a, b = first[group] or {}, second[group] or {}
        for name in dict.fromkeys([*a, *b]):
            if a.get(name) != b.get(name) and name not in UNTOLD:
                yield {"what": f"{group}: {name}", "first": a.get(name), "second": b.get(name)}
    parts, others = ({p["name"]: p for p in run["parts"]} for run in (first, second))
    for part in (name for name in parts if name in others):
        for field in ("model", "dtype", "max_tokens", "prompts"):
            a, b = parts[part].get(field), others[part].get(field)
            if a != b:
                told = (
                    {"first": len(a or ()), "second": len(b or ())}
                    if field == "prompts"
                    else {"first": a, "second": b}
                )
                yield {"what": f"{part}: {field}", **told}


def _cells(run: Record) -> dict[tuple[Any, ...], Record]:
    return {
        (part["name"], *_same(cell)): {"part": part["name"], **cell}
        for part in run["parts"]
        for cell in part["cells"]
    }


def _same(cell: Record) -> list[Any]:
    tuned = cell["stage"] != "sweep" and isinstance(cell["draft_len"], int)
    return [None if tuned and name in SETTING else cell[name] for name in KEY]


def _named(cell: Record) -> dict[str, Any]:
    return {name: cell[name] for name in ("part", *KEY)}


def _row(a: Record, b: Record) -> dict[str, Any]:
    """The second's cell, `before` (the first's draft_len and steps, if others), and each figure {first, second, ratio, min, max} | null.

    Verdicts only where both spreads are known and do not overlap.
    """
    speed = _ratio(a["tokens_per_second"], b["tokens_per_second"])
    gain = _ratio(_speedup(a), _speedup(b))
    tau = _ratio(_over_tasks(a), _over_tasks(b))
    told = {
        "tokens_per_second": speed,
        "speedup_vs_vanilla": gain,
        "tau": tau,
        "alpha": _ratio(_bare(a["alpha"]), _bare(b["alpha"])),
    }
    failed = [name for name, cell in (("first", a), ("second", b)) if cell["status"] == "failed"]
    return {
        **_named(b),
        "before": {name: a[name] for name in SETTING}
        if any(a[name] != b[name] for name in SETTING)
        else None,
        **told,
        "verdict": verdict(speed, "faster", "slower"),
        "tau_verdict": verdict(tau, "longer", "shorter"),
        "failed": failed,
    }


def _speedup(cell: Record) -> dict[str, float] | None:
    told = cell["speedup_vs_vanilla"]
    return {"median": told["ratio"], "min": told["min"], "max": told["max"]} if told else None


def _over_tasks(cell: Record) -> dict[str, float] | None:
    """tau of the whole cell, with its least and largest task; fewer than two tasks spread nothing."""
    known = [task["tau"] for task in cell["tasks"].values() if task["tau"] is not None]
    if cell["tau"] is None:
        return None
    return (
        _bare(cell["tau"])
        if len(known) < 2
        else {"median": cell["tau"], "min": min(known), "max": max(known)}
    )


def _bare(value: float | None) -> dict[str, float] | None:
    return None if value is None else {"median": value}


def _ratio(a: Mapping[str, float] | None, b: Mapping[str, float] | None) -> dict[str, Any] | None:
    """The second's median over the first's; the least and largest that the two spreads allow."""
    if not a or not b or not a["median"]:
        return None
    known = "min" in a and "min" in b and a["min"] > 0
    spread = (
        {"min": b["min"] / a["max"], "max": b["max"] / a["min"]}
        if known
        else {"min": None, "max": None}
    )
    return {
        "first": a["median"],
        "second": b["median"],
        "ratio": b["median"] / a["median"],
        **spread,
    }


def verdict(ratio: Mapping[str, Any] | None, more: str, less: str) -> str | None:
    """Of the second run, if the spreads do not overlap; None where they do, or are not known."""
    if ratio is None or ratio["min"] is None:
        return None
    return more if ratio["min"] > 1 else less if ratio["max"] < 1 else None


def middle(found: Record) -> float | None:
    """The median over the cells of the main table of the ratio of tokens/s; None if there are none."""
    known = [
        row["tokens_per_second"]["ratio"]
        for row in found["cells"]
        if row["stage"] == "main" and row["tokens_per_second"]
    ]
    return statistics.median(known) if known else None
