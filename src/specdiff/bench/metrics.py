"""One cell's figures from its turns. Arithmetic only: nothing here runs a model or looks at a clock."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Spread = dict[str, float]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median with minimum and maximum of what is known; None of nothing."""
    known = [v for v in values if v is not None]
    return (
        {"median": statistics.median(known), "min": min(known), "max": max(known)}
        if known
        else None
    )


def rate(run: Record) -> float | None:
    """Tokens per second, end to end."""
    return run["size"] / run["seconds"] if run["size"] and run["seconds"] > 0 else None


def decode_rate(run: Record) -> float | None:
    """Tokens per second after the first emission; None where nothing came after it, or it was not seen by itself."""
    tokens, seconds = run["size"] - run["first_tokens"], run["seconds"] - run["first_seconds"]
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def speedup(
    runs: Sequence[Record], references: Sequence[Record | None], of: Any
) -> dict[str, float] | None:
    """Ratio of the two medians over the turns both were in; min and max are those of single turns, `faster` how many were above 1."""
    pairs = [
        (of(run), of(other))
        for run, other in zip(runs, references, strict=True)
        if other is not None
    ]
    known = [(a, b) for a, b in pairs if a and b]
    if not known:
        return None
    ratios = [a / b for a, b in known]
    ratio = statistics.median(a for a, _ in known) / statistics.median(b for _, b in known)
    return {
        "ratio": ratio,
        "min": min(ratios),
        "max": max(ratios),
        "turns": len(known),
        "faster": sum(r > 1 for r in ratios),
    }


def speeds(
    runs: Sequence[Record], hf: Sequence[Record | None], vanilla: Sequence[Record | None]
) -> dict[str, Any]:
    """What a stopwatch tells. `hf` and `vanilla` are the same turns' references."""
    decoding = [r for r in runs if decode_rate(r) is not None]
    return {
        "tokens_per_second": spread(map(rate, runs)),
        "decode_tokens_per_second": spread(map(decode_rate, runs)),
        "ttft": spread(r["first_seconds"] for r in runs),
        "tpot": spread(1 / (decode_rate(r) or 1) * _rows(r) for r in decoding),
        "speedup_vs_hf": speedup(runs, hf, rate),
        "speedup_vs_vanilla": speedup(runs, vanilla, rate),
        "decode_speedup_vs_hf": speedup(runs, hf, decode_rate),
        "decode_speedup_vs_vanilla": speedup(runs, vanilla, decode_rate),
    }


def _rows(run: Record) -> int:
    return int(run["cell"]["batch"])


def acceptance(runs: Sequence[Record]) -> dict[str, Any]:
    """What became of the drafts, summed over all turns; all None for transformers' own, which do not tell."""
    counted = [r for r in runs if r["counts"]]
    names = (
        "tau",
        "tau_before_loop",
        "alpha",
        "accepted_per_draft",
        "per_position",
        "reached",
        "rounds",
        "plain_rounds",
    )
    if not counted:
        return dict.fromkeys(names)
    total = {
        n: sum(r["counts"][n] for r in counted)
        for n in ("rounds", "plain_rounds", "tokens", "drafted", "accepted")
    }
    reached, kept = (_columns([r["counts"][n] for r in counted]) for n in ("reached", "kept"))
    drafts, rounds = (
        total["rounds"] - total["plain_rounds"],
        sum(r["fresh_rounds"] for r in counted),
    )
    return {
        "tau": total["tokens"] / total["rounds"] if total["rounds"] else None,
        "tau_before_loop": sum(r["fresh_tokens"] for r in counted) / rounds if rounds else None,
        "alpha": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "accepted_per_draft": total["accepted"] / drafts if drafts else None,
        "per_position": [k / n if n else 0.0 for k, n in zip(kept, reached, strict=True)],
        "reached": reached,
        "rounds": total["rounds"],
        "plain_rounds": total["plain_rounds"],
    }


def _columns(rows: Sequence[Sequence[int]]) -> list[int]:
    width = max(map(len, rows), default=0)
    return [sum(row[k] for row in rows if k < len(row)) for k in range(width)]


def limits(
    runs: Sequence[Record],
    vanilla: Sequence[Record | None],
    tau: float | None,
    measured: float | None,
) -> dict[str, Any]:
    """Break-even tau = a mean round / a plain one; the limit of free drafting = tau T_target(1) / T_target(K+1); its share reached.

    Medians over the turns of each run's median, all of the same turns. Where a drafter leaves some rounds plain (it found nothing, or
    rested), round and scoring pass are means of the two kinds as they came.
    """
    plain = [r for r in vanilla if r is not None]
    single, one = _median(plain, "plain_round"), _median(plain, "plain_score")
    mean, scoring = _mean(runs, "round"), _mean(runs, "score")
    even = mean / single if mean and single else None
    limit = tau * one / scoring if tau and one and scoring else None
    return {
        "break_even_tau": even,
        "free_limit": limit,
        "free_fraction": measured / limit if measured and limit else None,
    }


def _mean(runs: Sequence[Record], what: str) -> float | None:
    """Seconds of a round, or of its scoring pass, over drafting and plain ones; None for a baseline that never drafted."""
    drafting, plain = _median(runs, f"draft_{what}"), _median(runs, f"plain_{what}")
    if drafting is None or plain is None:
        return drafting
    counted = [r["counts"] for r in runs if r["counts"]]
    share: float = sum(c["plain_rounds"] for c in counted) / max(
        1, sum(c["rounds"] for c in counted)
    )
    return drafting * (1 - share) + plain * share


def _median(runs: Sequence[Record], name: str) -> float | None:
    values = [r["medians"][name] for r in runs if r["medians"] and r["medians"][name]]
    return statistics.median(values) if values else None


def totals(runs: Sequence[Record]) -> dict[str, Any]:
    """Seconds by stage over all turns, the highest memory mark, and joules a token."""
    stages: dict[str, float] = {}
    for run in runs:
        for stage, value in ((run["counts"] or {}).get("seconds") or {}).items():
            stages[stage] = stages.get(stage, 0.0) + value
    marks = [r["memory"] for r in runs if r["memory"]]
    peak = (
        {"kind": marks[0]["kind"], **{n: max(m[n] for m in marks) for n in ("peak", "growth")}}
        if marks
        else None
    )
    spent = [r for r in runs if r["joules"] is not None]
    return {
        "seconds": stages | {"total": sum(r["seconds"] for r in runs)},
        "memory": peak,
        "joules_per_token": sum(r["joules"] for r in spent) / max(1, sum(r["size"] for r in spent))
        if spent
        else None,
    }


def tasks(
    runs: Sequence[Record], hf: Sequence[Record | None], vanilla: Sequence[Record | None]
) -> dict[str, Any]:
    """The main figures of each task by itself."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(r["task"] for r in runs):
        at = [i for i, r in enumerate(runs) if r["task"] == task]
        own, theirs, plain = [runs[i] for i in at], [hf[i] for i in at], [vanilla[i] for i in at]
        found[task] = {
            "turns": len(at),
            "tokens_per_second": spread(map(rate, own)),
            "tau": acceptance(own)["tau"],
            "speedup_vs_hf": speedup(own, theirs, rate),
            "speedup_vs_vanilla": speedup(own, plain, rate),
        }
    return found


def cell(
    runs: Sequence[Record], hf: Sequence[Record | None], vanilla: Sequence[Record | None]
) -> dict[str, Any]:
    """Every figure of the cells of results.json."""
    fast, accepted = speeds(runs, hf, vanilla), acceptance(runs)
    gained = fast["decode_speedup_vs_vanilla"]  # the prompt's own pass is no part of the bound
    bounds = limits(runs, vanilla, accepted["tau"], gained["ratio"] if gained else None)
    whole = {"turns": len(runs), "tokens": sum(r["size"] for r in runs)}
    return {
        **whole,
        **fast,
        **accepted,
        **bounds,
        **totals(runs),
        "tasks": tasks(runs, hf, vanilla),
    }
