"""Figures of the main comparison: speed-ups, time by stage, acceptance by position.

Each function draws a part, or returns why it cannot.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specdiff.bench.costs import Conditional, PositionCost
from specdiff.bench.drawing import (
    INK,
    MARKERS,
    Cells,
    Draw,
    Drawing,
    by_temperature,
    colors,
    legend,
    panels,
    short,
    whiskers,
)
from specdiff.bench.metrics import CellResult, Speedup
from specdiff.bench.results import PartResult
from specdiff.bench.settings import HF, VANILLA

STAGES = {
    "prefill": "#56b4e9",
    "draft": "#009e73",
    "score": "#e69f00",
    "verify": "#cc79a7",
    "commit": "#7a78c8",
    "host": "#8a8a8a",
    "not split": "#bdbdbd",
}
FEW = 5  # times a position must be reached for its share to be drawn


def label(cell: CellResult) -> str:
    """A cell's baseline and setting."""
    length = "" if cell.draft_len is None else f" K={cell.draft_len}"
    steps = f", {cell.steps} passes" if (cell.steps or 1) > 1 else ""
    return short(cell.baseline) + length + steps


def _bar_panels(
    cells: Cells, columns: int, frame: float, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A row of panels per temperature, as high as its bars and `frame` inches."""
    heights = [len(rows) for rows in cells.values()]
    options["gridspec_kw"] = {"height_ratios": heights}
    return panels(len(cells), columns, 0.6 + sum(frame + 0.27 * n for n in heights), **options)


def _label_rows(axes: Axes, rows: Sequence[CellResult]) -> None:
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [label(c) for c in rows])


def _bars(
    axes: Axes, rows: Sequence[CellResult], ratios: Sequence[Speedup | None], hues: dict[str, str]
) -> None:
    bars = [(i, ratio) for i, ratio in enumerate(ratios) if ratio]
    axes.barh(
        [i for i, _ in bars],
        [r.ratio for _, r in bars],
        height=0.66,
        color=[hues[rows[i].baseline] for i, _ in bars],
        xerr=whiskers([(r.ratio, r.min, r.max) for _, r in bars]),
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
    )
    right = 1.25 * max([1.2, *(max(r.max, r.ratio) for _, r in bars)])
    for i, ratio in bars:
        end = max(ratio.max, ratio.ratio)
        x = 1.0 if end < 1 < end + 0.25 * right else end  # not across the line of no change
        place: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{ratio.ratio:.2f}x", (x, i), fontsize=8.5, **place)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    _label_rows(axes, rows)
    axes.set_xlim(0, right)


def speedups(part: PartResult) -> Drawing | str:
    """Bars with the minimum and maximum of single turns; 1 is the reference."""
    cells = by_temperature(part, "main", lambda c: c.speedup_vs_hf or c.speedup_vs_vanilla)
    if not cells:
        return "no cell of the main comparison was measured together with a reference"
    figure, axes = _bar_panels(cells, 2, 0.75, sharey="row")
    hues = colors(part)
    words: list[str] = []
    for row, (temperature, rows) in zip(axes, cells.items(), strict=True):
        references = {
            HF: [c.speedup_vs_hf for c in rows],
            VANILLA: [c.speedup_vs_vanilla for c in rows],
        }
        for panel, (name, ratios) in zip(row, references.items(), strict=True):
            _bars(panel, rows, ratios, hues)
            panel.set_title(f"against {name}, temperature {temperature:g}", loc="left")
            panel.set_xlabel("speed-up (ratio of tokens/s); 1 = no change")
            for cell, ratio in zip(rows, ratios, strict=True):
                if ratio:
                    against = f"against {name} at temperature {temperature:g}"
                    words.append(f"{label(cell)} {ratio.ratio:.2f} {against}")
    return Drawing(figure, "Speed-up bars: " + "; ".join(words))


def stages(part: PartResult) -> Drawing | str:
    """Milliseconds per token, by stage; transformers' own runs are not split."""
    cells = by_temperature(part, "main", lambda c: c.tokens and c.seconds.get("total"))
    if not cells:
        return "no cell of the main comparison has its time"
    figure, axes = _bar_panels(cells, 1, 0.6, sharex=True)
    words: list[str] = []
    for (panel,), (temperature, rows) in zip(axes, cells.items(), strict=True):
        left = [0.0] * len(rows)
        for stage, color in STAGES.items():
            widths = [1000 * _stage(c, stage) / c.tokens for c in rows]
            panel.barh(range(len(rows)), widths, left=left, height=0.66, color=color, label=stage)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        _label_rows(panel, rows)
        panel.set_title(f"temperature {temperature:g}", loc="left")
        for cell, total in zip(rows, left, strict=True):
            words.append(f"{label(cell)} {total:.1f} ms at temperature {temperature:g}")
    axes[-1][0].set_xlabel("milliseconds per token")
    legend(figure, axes[0], columns=7)
    return Drawing(figure, "Time per token by stage: " + "; ".join(words))


def _stage(cell: CellResult, stage: str) -> float:
    if stage == "not split":
        return 0.0 if any(s in cell.seconds for s in STAGES) else cell.seconds["total"]
    return cell.seconds.get(stage, 0.0)


def positions(part: PartResult) -> Drawing | str:
    """The share of tokens accepted at each draft position, of those that were reached."""
    cells = by_temperature(part, "main", lambda c: c.per_position)
    if not cells:
        return "no drafter's acceptance was counted"
    figure, axes = panels(1, len(cells), 3.4, sharey=True)
    hues = colors(part)
    words: list[str] = []
    for panel, (temperature, rows) in zip(axes[0], cells.items(), strict=True):
        for i, cell in enumerate(rows):
            shares = zip(cell.per_position or (), cell.reached or (), strict=True)
            points = [(k, p) for k, (p, n) in enumerate(shares, start=1) if n >= FEW]
            auto = cell.draft_len == "auto"
            panel.plot(
                [k for k, _ in points],
                [p for _, p in points],
                color=hues[cell.baseline],
                linestyle="--" if auto else "-",
                marker=MARKERS[i % len(MARKERS)],
                fillstyle="none" if auto else "full",
                label=label(cell),
            )
            if points:
                first = f"{points[0][1]:.0%} at the first position"
                words.append(f"{label(cell)} at temperature {temperature:g}: {first}")
        _share_axes(panel, f"temperature {temperature:g}")
    axes[0][0].set_ylabel("share accepted, of those reached")
    legend(figure, axes[0], columns=3)
    return Drawing(figure, "Acceptance by position: " + "; ".join(words))


def _share_axes(panel: Axes, title: str) -> None:
    panel.set_ylim(-0.03, 1.03)
    # a single position is no interval of its own
    panel.set_xlim(0.6, max(1.0, panel.dataLim.x1) + 0.4)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.set_xlabel("position in the draft")
    panel.set_title(title, loc="left")


def conditional(part: PartResult) -> Drawing | str:
    """Acceptance by position, expected and observed."""
    entries = [c for c in part.conditional if _reached(c)]
    if not entries:
        return "acceptance and 1 - TV(p, q) were not counted"
    across = min(3, len(entries))
    down = -(-len(entries) // across)
    figure, axes = panels(down, across, 0.5 + 2.8 * down, sharey=True)
    every = [panel for row in axes for panel in row]
    hues = colors(part)
    words: list[str] = []
    for panel, entry in zip(every, entries, strict=False):
        points = _reached(entry)
        at = [k for k, _ in points]
        expected = [_number(p.overlap) for _, p in points]
        observed = [_number(p.acceptance) for _, p in points]
        panel.plot(
            at, expected, color=INK, linestyle="--", linewidth=1.2, marker="_", label="1 - TV(p, q)"
        )
        color = hues.get(entry.baseline, INK)
        panel.plot(at, observed, color=color, marker="o", linestyle="none", label="accepted")
        setting = f"K={entry.draft_len}, temperature {entry.temperature:g}"
        _share_axes(panel, f"{short(entry.baseline)}\n{setting}")
        gaps = [abs(a - b) for a, b in zip(expected, observed, strict=True)]
        apart = max((gap for gap in gaps if not math.isnan(gap)), default=0.0)
        words.append(f"{entry.baseline}: at most {apart:.3f} apart")
    for panel in every[len(entries) :]:
        panel.set_visible(False)
    axes[0][0].set_ylabel("share of those reached")
    legend(figure, axes[0], columns=2)
    return Drawing(figure, "Share accepted against 1 minus total variation: " + "; ".join(words))


def _reached(entry: Conditional) -> list[tuple[int, PositionCost]]:
    positions = enumerate(entry.positions, start=1)
    return [(k, position) for k, position in positions if position.reached >= FEW]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


DRAWS: dict[str, Draw] = {
    "speedups": speedups,
    "positions": positions,
    "conditional": conditional,
    "stages": stages,
}
