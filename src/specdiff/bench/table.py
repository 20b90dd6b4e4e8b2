"""The table of a run, as it stands: rich renderables over results.json's own dict."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

COLUMNS: dict[
    str, Callable[[Mapping[str, Any]], str]
] = {  # name -> of results.json's cell, what is shown
    "baseline": lambda c: c["baseline"],
    "T": lambda c: f"{c['temperature']:g}",
    "K": lambda c: str(c["draft_len"] or ""),
    "steps": lambda c: str(c["steps"] or ""),
    "tok/s": lambda c: _spread(c["tokens_per_second"]),
    "decode": lambda c: _spread(c["decode_tokens_per_second"]),
    "vs hf": lambda c: _ratio(c["speedup_vs_hf"]),
    "vs vanilla": lambda c: _ratio(c["speedup_vs_vanilla"]),
    "tau": lambda c: _number(c["tau"]),
    "fresh": lambda c: _number(c["tau_before_loop"]),
    "alpha": lambda c: _number(c["alpha"]),
    "even": lambda c: _number(c["break_even_tau"]),
    "limit": lambda c: _number(c["free_fraction"]),
    "TTFT": lambda c: _spread(c["ttft"], 1000, 0),
    "exact": lambda c: "" if c["exact"] is None else f"{100 * c['exact']:.0f} %",
}
FEW = ("baseline", "T", "K", "tok/s", "vs hf", "vs vanilla", "tau", "exact")
WIDE = 140  # characters that all columns need
LEGEND = (
    "T temperature; K draft length; medians over turns, of speed-ups (min-max of single turns); fresh: tau before the first repeated\n"
    "8-gram; even: break-even tau; limit: share of the speed-up that free drafting would give; TTFT in ms; exact: share of greedy\n"
    "answers equal to transformers' own"
)


def main(part: Mapping[str, Any], width: int) -> Table:
    """The main comparison of one part: a line a cell; the columns that fit."""
    table = Table(
        title=f"{part['name']}: {part['model']}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown = COLUMNS if width >= WIDE else {name: COLUMNS[name] for name in FEW}
    for name in shown:
        table.add_column(name, justify="left" if name == "baseline" else "right", no_wrap=True)
    heat = None
    for cell in part["cells"]:
        if cell["stage"] == "main":
            if heat not in (None, cell["temperature"]):
                table.add_section()
            heat = cell["temperature"]
            table.add_row(
                *(show(cell) for show in shown.values()),
                style="red" if cell["status"] == "failed" else None,
            )
    return table


def absent(part: Mapping[str, Any]) -> list[str]:
    """Why a part, or a baseline of it, is not in the table; failed cells too."""
    told = [f"{b['name']}: {b['why']}" for b in part["baselines"] if b["status"] != "ok"]
    failed = [
        f"{c['stage']} {c['baseline']}, batch {c['batch']}: {c['why']}"
        for c in part["cells"]
        if c["status"] == "failed"
    ]
    return [*([part["missing"]] if part["missing"] else []), *told, *failed]


def _spread(value: Mapping[str, float] | None, times: float = 1, digits: int = 1) -> str:
    return "" if value is None else f"{times * value['median']:.{digits}f}"


def _ratio(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['ratio']:.2f} ({value['min']:.2f}-{value['max']:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def paper(told: Mapping[str, Any]) -> Table:
    """Table 2, ours beside the paper's."""
    table = Table(
        title="Table 2: speed-up over plain decoding", title_justify="left", box=SIMPLE_HEAD
    )
    for name in (
        "data set",
        "target",
        "drafter",
        "K",
        "paper",
        "ours vs hf",
        "ours vs our plain",
        "accepted per draft",
        "",
    ):
        table.add_column(
            name, justify="left" if name in ("data set", "target", "drafter", "") else "right"
        )
    for row in told["table2"]:
        ours = [_number(row[name]) for name in ("vs_hf", "vs_vanilla", "accepted_per_draft")]
        known = f"{row['paper']:.2f}" if row["paper"] else "not known"
        table.add_row(
            row["dataset"],
            row["target"],
            row["baseline"],
            str(row["draft_len"] or ""),
            known,
            *ours,
            row["why"] or "",
        )
    return table


def appendix(told: Mapping[str, Any]) -> Table:
    """Every setting of the sweeps; Appendix A's own figures are not known."""
    table = Table(
        title="Appendix A: settings (ours; the paper's figures are not known here)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in (
        "data set",
        "target",
        "drafter",
        "K",
        "steps",
        "alpha",
        "accepted per draft",
        "vs hf",
        "vs our plain",
    ):
        table.add_column(
            name, justify="left" if name in ("data set", "target", "drafter") else "right"
        )
    for row in told["appendix_a"]:
        ours = [
            _number(row[name]) for name in ("alpha", "accepted_per_draft", "vs_hf", "vs_vanilla")
        ]
        table.add_row(
            row["dataset"],
            row["target"],
            row["baseline"],
            str(row["draft_len"] or ""),
            str(row["steps"] or ""),
            *ours,
        )
    return table


def whole(told: Mapping[str, Any], width: int) -> Iterator[RenderableType]:
    """All of a run: a table for each part, what is absent from it and why, and the paper's tables."""
    for part in told["parts"]:
        if part["cells"]:
            yield main(part, width)
        for line in absent(part):
            yield f"  {line}"
    if any(part["cells"] for part in told["parts"]):
        yield LEGEND
    if told["paper"]:
        yield paper(told["paper"])
        yield appendix(told["paper"])
        yield from (f"note: {line}" for line in told["paper"]["notes"])
