"""Bars: how much faster, where the time goes; and acceptance by position. Each takes a part and draws it, or says why it cannot."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from specdiff.bench.svg import INK, MARKERS, Drawing, colours, legend, panels, short, whiskers

Part = Mapping[str, Any]
Cell = Mapping[str, Any]
Draw = Callable[[Part], Drawing | str]
STAGES = {"prefill": "#56b4e9", "draft": "#009e73", "score": "#e69f00", "verify": "#cc79a7", "commit": "#7a78c8", "host": "#8a8a8a",
          "not split": "#bdbdbd"}  # fmt: skip
FEW = 5  # times a position must be reached before its share is drawn


def by_heat(part: Part, stage: str) -> dict[float, list[Cell]]:
    """The sound cells of a stage, by temperature."""
    found: dict[float, list[Cell]] = {}
    for cell in part["cells"]:
        if cell["stage"] == stage and cell["status"] == "ok":
            found.setdefault(cell["temperature"], []).append(cell)
    return dict(sorted(found.items()))


def label(cell: Cell) -> str:
    """A cell's name and setting."""
    length = "" if cell["draft_len"] is None else f" K={cell['draft_len']}"
    steps = f", {cell['steps']} passes" if (cell["steps"] or 1) > 1 else ""
    return short(cell["baseline"]) + length + steps


def names(part: Part) -> list[str]:
    return [b["name"] for b in part["baselines"]] + [c["baseline"] for c in part["cells"]]


def _bars(axes: Axes, rows: Sequence[Cell], field: str, known: Mapping[str, str]) -> None:
    at = [(i, c, c[field]) for i, c in enumerate(rows) if c[field]]
    axes.barh([i for i, _, _ in at], [r["ratio"] for _, _, r in at], height=0.66, color=[known[c["baseline"]] for _, c, _ in at],
              xerr=whiskers([r for _, _, r in at], "ratio"), error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5})  # fmt: skip
    right = 1.25 * max([1.2, *(max(r["max"], r["ratio"]) for _, _, r in at)])
    for i, _, ratio in at:
        end = max(ratio["max"], ratio["ratio"])
        beside = 1.0 if end < 1 < end + 0.25 * right else end  # not across the line of no change
        axes.annotate(
            f"{ratio['ratio']:.2f}x",
            (beside, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [label(c) for c in rows])
    axes.set_xlim(0, right)


def speedups(part: Part) -> Drawing | str:
    """Bars with the least and largest of single turns; 1 is the reference."""
    fields = {"speedup_vs_hf": "hf", "speedup_vs_vanilla": "ours-vanilla"}
    heats = {
        heat: [c for c in rows if any(c[f] for f in fields)]
        for heat, rows in by_heat(part, "main").items()
    }
    heats = {heat: rows for heat, rows in heats.items() if rows}
    if not heats:
        return "no cell of the main comparison was measured together with a reference"
    high = [len(rows) for rows in heats.values()]
    figure, axes = panels(
        len(heats),
        2,
        0.5 + sum(0.75 + 0.27 * n for n in high),
        sharey="row",
        gridspec_kw={"height_ratios": high},
    )
    known, said = colours(names(part)), []
    for row, (heat, rows) in zip(axes, heats.items(), strict=True):
        for panel, (field, reference) in zip(row, fields.items(), strict=True):
            _bars(panel, rows, field, known)
            panel.set_title(f"against {reference}, temperature {heat:g}", loc="left")
            panel.set_xlabel("speed-up (ratio of tokens/s); 1 = no change")
            said += [
                f"{label(c)} {c[field]['ratio']:.2f} against {reference} at temperature {heat:g}"
                for c in rows
                if c[field]
            ]
    return Drawing(figure, "Speed-up bars: " + "; ".join(said))


def stages(part: Part) -> Drawing | str:
    """Milliseconds a token, by what they were spent on; transformers' own runs are not split."""
    heats = {
        heat: [c for c in rows if c["tokens"] and c["seconds"].get("total")]
        for heat, rows in by_heat(part, "main").items()
    }
    heats = {heat: rows for heat, rows in heats.items() if rows}
    if not heats:
        return "no cell of the main comparison has its time told"
    high = [len(rows) for rows in heats.values()]
    figure, axes = panels(
        len(heats),
        1,
        0.6 + sum(0.6 + 0.27 * n for n in high),
        sharex=True,
        gridspec_kw={"height_ratios": high},
    )
    said = []
    for (panel,), (heat, rows) in zip(axes, heats.items(), strict=True):
        begin = [0.0] * len(rows)
        for stage, colour in STAGES.items():
            long = [1000 * _stage(c, stage) / c["tokens"] for c in rows]
            panel.barh(range(len(rows)), long, left=begin, height=0.66, color=colour, label=stage)
            begin = [a + b for a, b in zip(begin, long, strict=True)]
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_yticks(range(len(rows)), [label(c) for c in rows])
        panel.grid(visible=False, axis="y")
        panel.set_title(f"temperature {heat:g}", loc="left")
        said += [
            f"{label(c)} {total:.1f} ms at temperature {heat:g}"
            for c, total in zip(rows, begin, strict=True)
        ]
    axes[-1][0].set_xlabel("milliseconds per token")
    legend(figure, axes[0], columns=7)
    return Drawing(figure, "Time per token by stage: " + "; ".join(said))


def _stage(cell: Cell, stage: str) -> float:
    told: Mapping[str, float] = cell["seconds"]
    split = [told[s] for s in STAGES if s in told]
    if stage == "not split":
        return 0.0 if split else told["total"]
    return told.get(stage, 0.0)


def positions(part: Part) -> Drawing | str:
    """The share of tokens accepted at each place of the draft, of those that were reached."""
    heats = {
        heat: [c for c in rows if c["per_position"]] for heat, rows in by_heat(part, "main").items()
    }
    heats = {heat: rows for heat, rows in heats.items() if rows}
    if not heats:
        return "no drafter's acceptance was counted"
    figure, axes = panels(1, len(heats), 3.4, sharey=True)
    known, said = colours(names(part)), []
    for panel, (heat, rows) in zip(axes[0], heats.items(), strict=True):
        for i, cell in enumerate(rows):
            at = [
                (k, p)
                for k, (p, n) in enumerate(
                    zip(cell["per_position"], cell["reached"], strict=True), start=1
                )
                if n >= FEW
            ]
            auto = cell["draft_len"] == "auto"
            panel.plot([k for k, _ in at], [p for _, p in at], color=known[cell["baseline"]], linestyle="--" if auto else "-",
                       marker=MARKERS[i % len(MARKERS)], fillstyle="none" if auto else "full", label=label(cell))  # fmt: skip
            said += (
                [f"{label(cell)} at temperature {heat:g}: {at[0][1]:.0%} at the first position"]
                if at
                else []
            )
        shares(panel, f"temperature {heat:g}")
    axes[0][0].set_ylabel("share accepted, of those reached")
    legend(figure, axes[0], columns=3)
    return Drawing(figure, "Acceptance by position: " + "; ".join(said))


def shares(panel: Axes, title: str) -> None:
    """Axes of shares over positions of a draft."""
    panel.set_ylim(-0.03, 1.03)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("position in the draft")
    panel.set_title(title, loc="left")


def conditional(part: Part) -> Drawing | str:
    """What theory says of the acceptance by position, beside what happened."""
    told = [c for c in part["conditional"] if any(p["reached"] >= FEW for p in c["positions"])]
    if not told:
        return "no acceptance beside 1 - TV(p, q) was counted"
    across = min(3, len(told))
    down = -(-len(told) // across)
    figure, axes = panels(down, across, 0.5 + 2.6 * down, sharey=True)
    known, said = colours(names(part)), []
    for panel, entry in zip([a for row in axes for a in row], told, strict=False):
        at = [(k, p) for k, p in enumerate(entry["positions"], start=1) if p["reached"] >= FEW]
        colour = known.get(entry["baseline"], INK)
        panel.plot(
            [k for k, _ in at],
            [math.nan if p["overlap"] is None else p["overlap"] for _, p in at],
            color=INK,
            linestyle="--",
            linewidth=1.2,
            label="1 - TV(p, q)",
        )
        panel.plot(
            [k for k, _ in at],
            [math.nan if p["acceptance"] is None else p["acceptance"] for _, p in at],
            color=colour,
            marker="o",
            linestyle="none",
            label="accepted",
        )
        shares(
            panel,
            f"{short(entry['baseline'])} K={entry['draft_len']}, temperature {entry['temperature']:g}",
        )
        apart = max(
            (
                abs(p["acceptance"] - p["overlap"])
                for _, p in at
                if None not in (p["acceptance"], p["overlap"])
            ),
            default=0.0,
        )
        said.append(f"{entry['baseline']}: at most {apart:.3f} apart")
    for spare in [a for row in axes for a in row][len(told) :]:
        spare.set_visible(False)
    axes[0][0].set_ylabel("share of those reached")
    legend(figure, axes[0], columns=2)
    return Drawing(
        figure, "Share accepted beside one minus the total variation: " + "; ".join(said)
    )
