"""What every figure shares: style, colors, panels, and the way to inline SVG.

Drawings follow the page's colors, light or dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdiff.bench.metrics import CellResult
from specdiff.bench.results import PartResult
from specdiff.bench.settings import ASSISTED, AUTO, DFLASH, HF, LLAMA_CPP, LOOKUP, VANILLA

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
    "block": "#0f7cc0",
    "ngram": "#a6862d",
    "cascade": "#5f9e1f",
    AUTO: "#d0508a",
    DFLASH: "#b59adf",
    LLAMA_CPP: "#7a78c8",
}
MORE_COLORS = ("#7a78c8", "#b5541c", "#3aa5a5", "#c0a000", "#a04fb0")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", ":", "-.")


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
