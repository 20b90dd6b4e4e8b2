"""results.json and results.csv: a fold over the journal.

results.json, schema 1. Seconds, bytes, tokens per second. A *spread* is {"median", "min", "max"}; null stands for what was not, or
cannot be, measured.

    schema 1 · status "complete" | "partial" · suite · command · settings {flag: value} · seconds (spent measuring)
    environment {specdiff, torch, transformers, python, platform, cpu, cores, threads, device, device_name, commit, date}
        (of the last session, where a run was gone on with)
    parts [part]: one, or in the suite `paper` one for each target and data set
    paper null | {"table2": [row], "appendix_a": [row], "notes": [text]}: see paper.py

part    name · model · dataset|null · notes [text] · missing null | why this part did not run and how to get what it lacks
        prompts [{id, task, tokens}] · max_tokens · dtype
        baselines [{name, kind, spec, status "ok" | "missing" | "failed", why}]: missing is no fault (this target has no such thing)
        tuning [{baseline, temperature, grid [{draft_len, steps, tokens_per_second, why}], best one of them | null, why}]
        cells [cell] · costs {target [{context, n, seconds spread}], draft [{baseline, steps, context, draft_len, seconds spread}]}
        conditional [{baseline, draft_len, steps, temperature, verifier, positions [{reached, accepted, acceptance, overlap}]}]:
            accepted given reached beside the mean of 1 - TV(p, q) over the same reached rows
        batches [{baseline, temperature, sizes [{batch, tokens_per_second, vanilla_tokens_per_second}], break_even}]: the first size at
            which drafting no longer pays against ours-vanilla; null: it pays at every size measured (null speeds are not measured)
        divergences [{baseline, draft_len, prompt, position, tokens [cell's, reference's], top2_gap, near_tie, stage, batch}]: at
            temperature 0; gap of the target's two largest logits there, as transformers computes them
        failures [{what, why}]: cost curves and acceptance counts that could not be taken
        outputs [{prompt, task, baseline, draft_len, temperature, text, pieces [[text, from the draft?]]}]: real answers, cut into
            runs of accepted tokens and of the target's own

cell    stage "main" | "sweep" | "batch" · baseline · draft_len int | "auto" | null · steps int | null · verifier · temperature · batch
        status "ok" | "failed" · why null | text · turns · tokens
        tokens_per_second spread · decode_tokens_per_second spread (after the first emission) · ttft spread · tpot spread
        speedup_vs_hf, speedup_vs_vanilla, decode_speedup_vs_hf, decode_speedup_vs_vanilla {ratio, min, max, turns, faster} | null: ratio
            of the two medians over the turns both ran in; min and max of the turns' own ratios, and how many of them were above 1
        tau · tau_before_loop (before the first repeated 8-gram) · alpha · accepted_per_draft · per_position [given reached] · reached [n]
        rounds · plain_rounds · break_even_tau (a mean round over a plain one) · free_limit (tau T(1) / T(K+1), scoring passes of these
        turns, null on a GPU) ·
        free_fraction (decode_speedup_vs_vanilla / free_limit)
        seconds {prefill, draft, score, verify, commit, host, total}: host is what the stages leave of the total; on a GPU, host seconds
        memory {kind "rss" | "cuda", peak, growth}: high-water mark of the *process* while the cell ran (it holds every baseline's
            weights), and how far that lay above the level before; the largest of its runs
        joules_per_token null | number · exact null | share of temperature-0 answers equal to the reference's
        tasks {task: {turns, tokens_per_second, tau, speedup_vs_hf, speedup_vs_vanilla}}

results.csv has one line a cell, spreads flattened to name, name_min, name_max.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specdiff import files, strict_json
from specdiff.bench import metrics, paper
from specdiff.bench.plan import HF, VANILLA
from specdiff.unicode import valid

SCHEMA = 1
KEY = ("stage", "baseline", "draft_len", "steps", "verifier", "temperature", "batch")
INNER = ("kind", "key", "part", "took")  # the journal's own
PLAIN = ("seconds", "memory", "tasks", "per_position", "reached")  # not in the table


def fold(records: Sequence[Mapping[str, Any]], *, finished: bool) -> dict[str, Any]:
    """The whole of results.json. `finished`: nothing is left to be measured."""
    begin = records[0]
    parts = {r["part"]: r for r in records if r["kind"] == "part"}  # the last one counts
    measured = [
        _part(about, [r for r in records if r.get("part") == name]) for name, about in parts.items()
    ]
    return {
        "schema": SCHEMA,
        "status": "complete" if finished else "partial",
        **{name: begin[name] for name in ("suite", "command", "settings")},
        "environment": next(
            (r["environment"] for r in reversed(parts.values()) if "environment" in r), None
        ),
        "seconds": sum(r.get("took", 0.0) for r in records),
        "parts": measured,
        "paper": paper.compare(measured, smoke=begin["settings"]["smoke"])
        if begin["suite"] == paper.SUITE
        else None,
    }


def _part(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of = {
        kind: [r for r in records if r["kind"] == kind]
        for kind in ("tune", "turn", "cost", "conditional")
    }
    empty: dict[str, Any] = {"prompts": [], "baselines": [], "dtype": None}
    named = ("model", "dataset", "notes", "missing", "prompts", "baselines", "max_tokens", "dtype")
    curves = {
        kind: [_point(r, p) for r in of["cost"] if r["of"] == kind for p in r.get("points", ())]
        for kind in ("target", "draft")
    }
    found = cells(of["turn"])
    return {
        "name": about["part"],
        **{name: (empty | dict(about))[name] for name in named},
        "tuning": [_without(r, *INNER) for r in of["tune"]],
        "cells": found,
        "costs": curves,
        "conditional": [_without(r, *INNER) for r in of["conditional"] if "positions" in r],
        "batches": batches(found),
        "divergences": [d for r in of["turn"] for d in r["divergences"]],
        "outputs": [shown for r in of["turn"] for shown in _outputs(r)],
        "failures": [
            {"what": r["key"], "why": r["why"]}
            for r in [*of["cost"], *of["conditional"]]
            if r.get("why")
        ],
    }


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _point(record: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    named = (
        {}
        if record["of"] == "target"
        else {"baseline": record["baseline"], "steps": record["steps"]}
    )
    return named | dict(point)


def _outputs(turn: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for run in turn["runs"]:
        if "pieces" in run:
            own = {name: run["cell"][name] for name in ("baseline", "draft_len", "temperature")}
            text = "".join(piece for piece, _ in run["pieces"])
            yield {
                "prompt": turn["prompt"],
                "task": turn["task"],
                **own,
                "text": text,
                "pieces": run["pieces"],
            }


def cells(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a cell, in the order they first ran. A cell that failed once has failed, and says why; its other runs still count."""
    found: dict[tuple[Any, ...], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for turn in turns:
        for run in turn["runs"]:
            found.setdefault(tuple(run["cell"][name] for name in KEY), []).append((turn, run))
    return [_cell(dict(zip(KEY, key, strict=True)), listed) for key, listed in found.items()]


def _cell(
    key: dict[str, Any], listed: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> dict[str, Any]:
    able = [(turn, run) for turn, run in listed if "why" not in run]
    runs = [{**run, "task": turn["task"]} for turn, run in able]
    theirs, plain = ([_reference(turn, name) for turn, _ in able] for name in (HF, VANILLA))
    wrong = [
        d
        for turn, _ in able
        for d in turn["divergences"]
        if all(d[name] == key[name] for name in KEY)
    ]
    why = next((run["why"] for _, run in listed if "why" in run), None) or _wrong(wrong)
    exact = (
        1 - len(wrong) / (len(able) * key["batch"]) if key["temperature"] == 0 and able else None
    )
    return {
        **key,
        "status": "failed" if why else "ok",
        "why": why,
        "exact": exact,
        **metrics.cell(runs, theirs, plain),
    }


def _reference(turn: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next(
        (run for run in turn["runs"] if run["cell"]["baseline"] == name and "why" not in run), None
    )


def _wrong(divergences: Sequence[Mapping[str, Any]]) -> str | None:
    """What is told of a cell whose answers are not the target's own, near ties apart."""
    bad = next((d for d in divergences if not d["near_tie"]), None)
    if bad is None:
        return None
    gap = "unknown" if bad["top2_gap"] is None else f"{bad['top2_gap']:.3g}"
    return f"not the target's own tokens: prompt {bad['prompt']}, position {bad['position']}, where the two largest logits are {gap} apart"


def batches(listed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Throughput of each drafter against batch size, and the first size at which plain decoding is as fast."""
    found: dict[tuple[str, float], dict[int, float | None]] = {}
    for cell in listed:
        if cell["stage"] == "batch":
            speed = cell["tokens_per_second"]
            found.setdefault((cell["baseline"], cell["temperature"]), {})[cell["batch"]] = (
                speed["median"] if speed else None
            )
    told = []
    for (baseline, heat), sizes in found.items():
        plain = found.get((VANILLA, heat), {})
        rows = [
            {"batch": b, "tokens_per_second": s, "vanilla_tokens_per_second": plain.get(b)}
            for b, s in sorted(sizes.items())
        ]
        lost = (b for b, s in sorted(sizes.items()) if s and (v := plain.get(b)) and s <= v)
        drafting = baseline not in (HF, VANILLA)
        told.append(
            {
                "baseline": baseline,
                "temperature": heat,
                "sizes": rows,
                "break_even": next(lost, None) if drafting else None,
            }
        )
    return told


def problems(results: Mapping[str, Any]) -> list[str]:
    """Everything that makes the run a failed one, in plain words: parts, baselines and cells that should have been, and wrong tokens."""
    found = []
    for part in results["parts"]:
        if part["missing"]:
            found.append(f"{part['name']}: {part['missing']}")
        found += [
            f"{part['name']}: {b['name']}: {b['why']}"
            for b in part["baselines"]
            if b["status"] == "failed"
        ]
        found += [
            f"{part['name']}: tuning {t['baseline']}: {t['why']}"
            for t in part["tuning"]
            if t["why"]
        ]
        bad = [c for c in part["cells"] if c["status"] == "failed"]
        failed = [
            c for c in bad if c["stage"] != "sweep" or c["exact"] not in (None, 1)
        ]  # a sweep may ask for drafts that are too long
        found += [
            f"{part['name']}: {c['stage']}, {c['baseline']}, batch {c['batch']}: {c['why']}"
            for c in failed
        ]
        found += [f"{f['what']}: {f['why']}" for f in part["failures"]]
    return list(dict.fromkeys(found))


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """What --json prints: the results without answers, prompts, curves and counts by stage."""
    parts = [
        {name: part[name] for name in ("name", "model", "missing", "baselines", "tuning")}
        | {"cells": [_without(cell, *PLAIN) for cell in part["cells"]]}
        for part in results["parts"]
    ]
    return {
        name: results[name] for name in ("schema", "status", "suite", "environment", "paper")
    } | {"parts": parts}


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json and results.csv, each whole or not at all. Raises StorageError."""
    files.write_json(folder / "results.json", strict_json.plain(results))
    files.write_text(folder / "results.csv", valid(table(results)))


def table(results: Mapping[str, Any]) -> str:
    """One line a cell."""
    rows = [
        {"part": p["name"]} | _flat(_without(cell, *PLAIN))
        for p in results["parts"]
        for cell in p["cells"]
    ]
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in cell.items():
        if isinstance(value, dict):
            middle = "median" if "median" in value else "ratio"
            flat |= {name: value[middle], f"{name}_min": value["min"], f"{name}_max": value["max"]}
        else:
            flat[name] = value
    return flat
