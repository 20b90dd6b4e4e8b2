"""Drawings as inline SVG that follow the page's colours, light or dark; and what all of them look like."""

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdiff.bench.plan import ASSISTED, HF, LOOKUP, VANILLA

INK, GRID = "#010203", "#040506"  # stand-ins, which the page's own colours replace
WIDTH = 8.0  # inches
STYLE: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "specdiff", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9.5,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": GRID,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.linewidth": 0.6,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "figure.constrained_layout.h_pad": 0.09,
}  # fmt: skip
# Okabe and Ito's colours where they can be seen on white and on black; markers and dashes tell the same
COLOURS = {HF: "#8a8a8a", ASSISTED: "#cc79a7", LOOKUP: "#e69f00", VANILLA: "#56b4e9", "autoregressive": "#d55e00", "sedd": "#009e73",
           "ngram": "#a6862d"}  # fmt: skip
SPARE = ("#7a78c8", "#0f7cc0", "#b5541c", "#5f9e1f", "#d0508a")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, and in words what it shows."""

    figure: Figure
    alt: str


def style() -> AbstractContextManager[None]:
    """Everything is drawn and written within this."""
    return mpl.rc_context(STYLE)


def panels(
    rows: int, columns: int, height: float, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of `height` inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False, **options)]


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each baseline, the same in every figure of a part."""
    names = list(dict.fromkeys(names))
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(others)}


def short(name: str, most: int = 24) -> str:
    """A label that fits: a drafter may be named by a path."""
    return name if len(name) <= most else "…" + name[1 - most :]


def powers(axes: Axes, values: Iterable[float], label: str) -> None:
    """A doubling x axis whose ticks are the values measured."""
    known = sorted(set(values))
    axes.set_xscale("log", base=2)
    near = [v for i, v in enumerate(known) if i == 0 or v / known[i - 1] >= 1.2]
    axes.set_xticks(near, [f"{v:g}" for v in near])
    axes.set_xticks([], minor=True)
    if len(near) == 1:
        axes.set_xlim(near[0] / 2, near[0] * 2)
    axes.set_xlabel(label)


def whiskers(spreads: Sequence[Mapping[str, float]], middle: str) -> list[list[float]]:
    """How far each minimum and maximum lies from the middle; a middle of pooled turns may lie outside of them."""
    return [
        [max(0.0, s[middle] - s["min"]) for s in spreads],
        [max(0.0, s["max"] - s[middle]) for s in spreads],
    ]


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for handle, label in (
        pair for a in axes for pair in zip(*a.get_legend_handles_labels(), strict=True)
    ):
        found.setdefault(label, handle)
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside upper left",
            ncols=columns,
            handlelength=2.6,
        )


def inline(drawing: Drawing, name: str) -> str:
    """The drawing as an <svg> element for the body of a page, its ids beginning with `name`. No colour of text is in it."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # a name in a script the font has not: a box stands for it
        drawing.figure.savefig(out, format="svg")
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid, #8884)")
    said = drawing.alt.translate({ord(c): f"&#{ord(c)};" for c in '&<>"'})
    return text.replace("<svg", f'<svg role="img" aria-label="{said}"', 1).strip()
