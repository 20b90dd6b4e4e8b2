"""Figures of the main comparison: speed-ups, time by stage, acceptance by position.

Each function draws a part, or returns why it cannot. Drawings become inline SVG that follows the
page's colors, light or dark.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specdiff.bench.costs import Conditional, PositionCost
from specdiff.bench.metrics import CellResult, Speedup
from specdiff.bench.results import PartResult
from specdiff.bench.settings import ASSISTED, HF, LLAMA_CPP, LOOKUP, VANILLA

INK = "#010203"  # a stand-in, which the page's own color replaces
GRID = "#040506"
WIDTH = 8.0  # inches
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
CLEAR = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
OFF = ("text.parse_math", "legend.frameon", "axes.spines.top", "axes.spines.right")
STYLE: Any = {
    **dict.fromkeys(INKED, INK),
    **dict.fromkeys(CLEAR, "none"),
    **dict.fromkeys(OFF, False),
    "svg.fonttype": "path",
    "svg.hashsalt": "specdiff",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.h_pad": 0.09,
}
# of Okabe and Ito, visible on white and on black; markers and dashes distinguish lines as well
COLORS = {
    HF: "#8a8a8a",
    ASSISTED: "#cc79a7",
    LOOKUP: "#e69f00",
    VANILLA: "#56b4e9",
    "autoregressive": "#d55e00",
    "sedd": "#009e73",
    "ngram": "#a6862d",
    LLAMA_CPP: "#7a78c8",
}
MORE_COLORS = ("#7a78c8", "#0f7cc0", "#b5541c", "#5f9e1f", "#d0508a")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", ":", "-.")
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


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, and its content in words."""

    figure: Figure
    alt: str


Draw = Callable[[PartResult], Drawing | str]
Cells = dict[float, list[CellResult]]  # by temperature


def style() -> AbstractContextManager[None]:
    """The context in which everything is drawn and written."""
    return mpl.rc_context(STYLE)


def panels(
    rows: int, columns: int, height: float, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of `height` inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False, **options)]


def colors(part: PartResult) -> dict[str, str]:
    """A color for each baseline, the same in every figure of a part."""
    names = [b.name for b in part.baselines] + [c.baseline for c in part.cells]
    others = [name for name in dict.fromkeys(names) if name not in COLORS]
    more = {name: MORE_COLORS[i % len(MORE_COLORS)] for i, name in enumerate(others)}
    return COLORS | more


def short(name: str, most: int = 24) -> str:
    """A label that fits: a drafter may be named by a path."""
    return name if len(name) <= most else "…" + name[1 - most :]


def powers(axes: Axes, values: Iterable[float], label: str) -> None:
    """A doubling x axis whose ticks are the measured values."""
    distinct = sorted(set(values))
    axes.set_xscale("log", base=2)
    ticks = [v for i, v in enumerate(distinct) if i == 0 or v / distinct[i - 1] >= 1.2]
    axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axes.set_xticks([], minor=True)
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, ticks[0] * 2)
    axes.set_xlabel(label)


def whiskers(points: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Distances of (middle, min, max) from the middle, which may lie outside of single turns."""
    below = [max(0.0, middle - low) for middle, low, _ in points]
    return [below, [max(0.0, high - middle) for middle, _, high in points]]


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """One legend for all panels, above them."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        place: Any = {"loc": "outside upper left", "handlelength": 2.6}
        figure.legend(list(handles.values()), list(handles), ncols=columns, **place)


def inline(drawing: Drawing, name: str) -> str:
    """The drawing as an <svg> element for the body of a page.

    Its ids begin with `name`, and it holds no text color of its own.
    """
    out = io.StringIO()
    with warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        drawing.figure.savefig(out, format="svg")
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid, #8884)")
    alt = drawing.alt.translate({ord(c): f"&#{ord(c)};" for c in '&<>"'})
    return text.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1).strip()


def by_temperature(part: PartResult, stage: str, usable: Callable[[CellResult], object]) -> Cells:
    """The sound and usable cells of a stage, by temperature; no temperature without any."""
    cells: Cells = {}
    for cell in part.stage(stage):
        if cell.status == "ok" and usable(cell):
            cells.setdefault(cell.temperature, []).append(cell)
    return dict(sorted(cells.items()))


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
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("position in the draft")
    panel.set_title(title, loc="left")


def conditional(part: PartResult) -> Drawing | str:
    """Acceptance by position, expected and observed."""
    entries = [c for c in part.conditional if _reached(c)]
    if not entries:
        return "acceptance and 1 - TV(p, q) were not counted"
    across = min(3, len(entries))
    down = -(-len(entries) // across)
    figure, axes = panels(down, across, 0.5 + 2.6 * down, sharey=True)
    every = [panel for row in axes for panel in row]
    hues = colors(part)
    words: list[str] = []
    for panel, entry in zip(every, entries, strict=False):
        points = _reached(entry)
        at = [k for k, _ in points]
        expected = [_number(p.overlap) for _, p in points]
        observed = [_number(p.acceptance) for _, p in points]
        panel.plot(at, expected, color=INK, linestyle="--", linewidth=1.2, label="1 - TV(p, q)")
        color = hues.get(entry.baseline, INK)
        panel.plot(at, observed, color=color, marker="o", linestyle="none", label="accepted")
        setting = f"K={entry.draft_len}, temperature {entry.temperature:g}"
        _share_axes(panel, f"{short(entry.baseline)} {setting}")
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
