"""The table of a run, as it stands: rich renderables over results.json's own dict."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

COLUMNS = (
    "baseline",
    "T",
    "K",
    "steps",
    "tok/s",
    "decode",
    "vs hf",
    "vs vanilla",
    "tau",
    "fresh",
    "alpha",
    "even",
    "limit",
    "TTFT",
    "exact",
)
LEGEND = (
    "T temperature; K draft length; tok/s and speed-ups: medians over turns (min-max of single turns); fresh: tau before the first\n"
    "repeated 8-gram; even: break-even tau; limit: share of the speed-up that free drafting would give; TTFT in ms; exact: share of\n"
    "greedy answers equal to transformers' own"
)


def main(part: Mapping[str, Any]) -> Table:
    """The main comparison of one part: a line a cell, or why there is none."""
    table = Table(title=f"{part['name']} on {part['model']}" if part["name"] != part["model"] else part["name"], title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if not i else "right", no_wrap=True)
    heat = None
    for cell in part["cells"]:
        if cell["stage"] == "main":
            if heat not in (None, cell["temperature"]):
                table.add_section()
            heat = cell["temperature"]
            table.add_row(*_row(cell), style="red" if cell["status"] == "failed" else None)
    return table


def absent(part: Mapping[str, Any]) -> list[str]:
    """Why a part, or a baseline of it, is not in the table; failed cells too."""
    told = [f"{b['name']}: {b['why']}" for b in part["baselines"] if b["status"] != "ok"]
    failed = [f"{c['stage']} {c['baseline']}, batch {c['batch']}: {c['why']}" for c in part["cells"] if c["status"] == "failed"]
    return [*([part["missing"]] if part["missing"] else []), *told, *failed]


def _row(cell: Mapping[str, Any]) -> list[str]:
    ttft = cell["ttft"]
    return [
        cell["baseline"],
        f"{cell['temperature']:g}",
        str(cell["draft_len"] or ""),
        str(cell["steps"] or ""),
        _spread(cell["tokens_per_second"], "median"),
        _number(cell["decode_tokens_per_second"]["median"] if cell["decode_tokens_per_second"] else None, 1),
        _spread(cell["speedup_vs_hf"], "ratio", 2),
        _spread(cell["speedup_vs_vanilla"], "ratio", 2),
        _number(cell["tau"]),
        _number(cell["tau_before_loop"]),
        _number(cell["alpha"]),
        _number(cell["break_even_tau"]),
        _number(cell["free_fraction"]),
        _number(1000 * ttft["median"] if ttft else None, 0),
        "" if cell["exact"] is None else f"{100 * cell['exact']:.0f} %",
    ]


def _spread(value: Mapping[str, float] | None, middle: str, digits: int = 1) -> str:
    return "" if value is None else f"{value[middle]:.{digits}f} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def paper(told: Mapping[str, Any]) -> Table:
    """Table 2, ours beside the paper's."""
    table = Table(title="Table 2: speed-up over plain decoding", title_justify="left")
    for name in ("data set", "target", "drafter", "K", "paper", "ours vs hf", "ours vs our plain", "accepted per draft", ""):
        table.add_column(name, justify="left" if name in ("data set", "target", "drafter", "") else "right")
    for row in told["table2"]:
        ours = [_number(row[name]) for name in ("vs_hf", "vs_vanilla", "accepted_per_draft")]
        known = f"{row['paper']:.2f}" if row["paper"] else "not known"
        table.add_row(row["dataset"], row["target"], row["baseline"], str(row["draft_len"] or ""), known, *ours, row["why"] or "")
    return table


def appendix(told: Mapping[str, Any]) -> Table:
    """Every setting of the sweeps; Appendix A's own figures are not known."""
    table = Table(title="Appendix A: settings (ours; the paper's figures are not known here)", title_justify="left")
    for name in ("data set", "target", "drafter", "K", "steps", "alpha", "accepted per draft", "vs hf", "vs our plain"):
        table.add_column(name, justify="left" if name in ("data set", "target", "drafter") else "right")
    for row in told["appendix_a"]:
        ours = [_number(row[name]) for name in ("alpha", "accepted_per_draft", "vs_hf", "vs_vanilla")]
        table.add_row(row["dataset"], row["target"], row["baseline"], str(row["draft_len"] or ""), str(row["steps"] or ""), *ours)
    return table


def whole(told: Mapping[str, Any]) -> Iterator[RenderableType]:
    """All of a run: a table for each part, what is absent from it and why, and the paper's tables."""
    for part in told["parts"]:
        if part["cells"]:
            yield main(part)
        for line in absent(part):
            yield f"  {line}".replace("[", "\\[")
    if any(part["cells"] for part in told["parts"]):
        yield LEGEND
    if told["paper"]:
        yield paper(told["paper"])
        yield appendix(told["paper"])
        yield from (f"note: {line}" for line in told["paper"]["notes"])
