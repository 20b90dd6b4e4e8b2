"""What a run comes to, in sentences that say a slow-down as plainly as a gain."""

from collections.abc import Iterator, Mapping
from typing import Any

from specdiff.bench.plan import ASSISTED, HF, LOOKUP, VANILLA

Cell = Mapping[str, Any]
THEIRS = (ASSISTED, LOOKUP)
AGREE = 0.8  # of the turns


def sentences(part: Mapping[str, Any]) -> Iterator[str]:
    """A few lines for each temperature of a part's main comparison; nothing for a part without any."""
    main = [c for c in part["cells"] if c["stage"] == "main" and c["status"] == "ok"]
    for heat in sorted({c["temperature"] for c in main}):
        rows = [c for c in main if c["temperature"] == heat]
        drafting = [
            c
            for c in rows
            if c["baseline"] not in (HF, VANILLA, *THEIRS) and c["speedup_vs_vanilla"]
        ]
        ranked = sorted(drafting, key=lambda c: -c["speedup_vs_vanilla"]["ratio"])
        begin = f"At temperature {heat:g}, "
        if not ranked:
            yield begin + "no drafter was measured beside plain decoding."
            continue
        best, *others = ranked
        yield begin + f"the best of our drafters is {named(best)}: {against(best)}"
        if others:
            yield (
                "The others, against plain decoding in our engine: "
                + "; ".join(f"{named(c)} {times(c)}" for c in others)
                + "."
            )
        yield from _beside(best, rows)


def named(cell: Cell) -> str:
    return str(cell["baseline"]) + (
        "" if cell["draft_len"] is None else f" (K={cell['draft_len']})"
    )


def times(cell: Cell) -> str:
    """A ratio, and in a word what it means."""
    ratio = cell["speedup_vs_vanilla"]
    return f"{ratio['ratio']:.2f}x ({agreed(ratio)})"


def verdict(ratio: Mapping[str, float]) -> str:
    """It is called faster or slower where the medians say so and four turns in five agree."""
    enough, faster = AGREE * ratio["turns"], ratio["faster"]
    if ratio["ratio"] > 1 and faster >= enough:
        return "faster"
    if ratio["ratio"] < 1 and ratio["turns"] - faster >= enough:
        return "slower"
    return "no clear difference"


def agreed(ratio: Mapping[str, float]) -> str:
    """The verdict with the turns it stands on."""
    said, faster, turns = verdict(ratio), ratio["faster"], ratio["turns"]
    if said == "no clear difference":
        return f"{said}: faster in {faster} of {turns} turns"
    return f"{said} in {faster if said == 'faster' else turns - faster} of {turns} turns"


def against(cell: Cell) -> str:
    """The gain over plain decoding in the same engine, or the loss and what it would take to break even."""
    ratio = cell["speedup_vs_vanilla"]
    spread = f"{ratio['ratio']:.2f}x plain decoding in our engine ({ratio['min']:.2f} to {ratio['max']:.2f}), {agreed(ratio)}"
    tau, needed = cell["tau"], cell["break_even_tau"]
    rounds = (
        ""
        if tau is None or needed is None
        else f" It writes {tau:.2f} tokens a round and needs {needed:.2f} to break even."
    )
    said = {
        "faster": f"{spread}.",
        "slower": f"{spread}. A slow-down: plain decoding is the better choice here.",
        "no clear difference": f"{spread}.",
    }
    return said[verdict(ratio)] + rounds


def _beside(best: Cell, rows: list[Cell]) -> Iterator[str]:
    """How it stands against transformers, and how much of that is the engine's."""
    if best["speedup_vs_hf"]:
        plain = next((c for c in rows if c["baseline"] == VANILLA and c["speedup_vs_hf"]), None)
        share = (
            ""
            if plain is None
            else f"; our engine without any drafter is {plain['speedup_vs_hf']['ratio']:.2f}x"
        )
        yield f"Against transformers' generate it is {best['speedup_vs_hf']['ratio']:.2f}x{share}."
    quick = [c for c in rows if c["baseline"] in THEIRS and c["speedup_vs_hf"]]
    if quick:
        told = "; ".join(f"{c['baseline']} {c['speedup_vs_hf']['ratio']:.2f}x" for c in quick)
        yield f"Transformers' own speculation, against its generate: {told}."
