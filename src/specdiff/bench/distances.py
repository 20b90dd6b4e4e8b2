"""The exactness study as a figure: how far each way of drafting moves the law, from the least to the most harmed case."""

from collections.abc import Mapping, Sequence
from typing import Any

from specdiff.bench.svg import INK, MARKERS, Drawing, legend, panels

COLOURS = {"token": "#d55e00", "block": "#7a78c8", "match": "#009e73"}
FINEST = 1e-3  # below it the axis runs evenly to 0
TICKS = {0.0: "0", 0.001: "0.001", 0.01: "0.01", 0.1: "0.1", 1.0: "1"}


def draw(rows: Sequence[Mapping[str, Any]], verifiers: Sequence[str]) -> Drawing:
    """A line of marks for each way of drafting: on the left edge it is lawful, elsewhere it is not. Whiskers: what sampling can hide."""
    figure, ((axes,),) = panels(1, 1, 0.9 + 0.29 * len(rows))
    apart = 0.22
    for i, verifier in enumerate(verifiers):
        at = [y + apart * (i - (len(verifiers) - 1) / 2) for y in range(len(rows))]
        least, most = zip(*(row["distance"][verifier] for row in rows), strict=True)
        off = [row["error"] or 0.0 for row in rows]
        look: Any = {
            "color": COLOURS[verifier],
            "marker": MARKERS[i],
            "linestyle": "none",
            "markersize": 4,
        }
        axes.hlines(at, least, most, color=COLOURS[verifier], linewidth=2.2)
        axes.errorbar(
            most,
            at,
            xerr=[[0.0] * len(off), off],
            elinewidth=0.8,
            capsize=2,
            label=verifier,
            **look,
        )
        axes.plot(least, at, **look)
    axes.set_xscale("symlog", linthresh=FINEST, linscale=0.5)
    axes.set_xlim(-FINEST / 8, 1)
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.set_xticks([], minor=True)
    axes.axvline(0, color=INK, linewidth=1, linestyle="--")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(
        range(len(rows)), [("biased: " if row["biased"] else "") + row["draft"] for row in rows]
    )
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("total variation from the target's law (0: lawful)")
    legend(figure, [axes], columns=3)
    biased = [row["draft"] for row in rows if row["biased"]]
    return Drawing(figure, "Total variation from the target's law. Biased: " + "; ".join(biased))
