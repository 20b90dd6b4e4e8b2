"""Lines: sweeps of diffusion steps and draft length, costs of a pass, throughput of a batch. Each draws a part, or says why it cannot."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from specdiff.bench.figures import Cell, Part, by_heat, names
from specdiff.bench.plan import HF, VANILLA
from specdiff.bench.svg import (
    DASHES,
    INK,
    MARKERS,
    Drawing,
    colours,
    legend,
    panels,
    powers,
    short,
    whiskers,
)

Point = tuple[float, float, Mapping[str, float] | None]  # x, y, its spread
NO_SWEEPS = "the sweeps of draft length and diffusion steps were not run (they are left out by --quick), or not finished"
FACTOR = "speed-up vs ours-vanilla (ratio)"


def _line(panel: Axes, points: Sequence[Point], middle: str = "median", **look: Any) -> None:
    """Points by x, with their least and largest where they have a spread; lines stand a little apart, so that whiskers do not cover."""
    apart = 1 + 0.035 * (len(panel.containers) - 1)
    points = sorted((((apart * x if s else x), y, s) for x, y, s in points), key=lambda p: p[0])
    spreads = [s for _, _, s in points if s is not None]
    errors = whiskers(spreads, middle) if len(spreads) == len(points) else None
    panel.errorbar(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        yerr=errors,
        elinewidth=0.8,
        capsize=2,
        **look,
    )


def _drafting(part: Part) -> dict[float, list[Cell]]:
    heats = {
        heat: [c for c in rows if c["baseline"] not in (HF, VANILLA)]
        for heat, rows in by_heat(part, "sweep").items()
    }
    return {heat: rows for heat, rows in heats.items() if rows}


def _grouped(rows: Sequence[Cell], key: Callable[[Cell], Any]) -> dict[Any, list[Cell]]:
    found: dict[Any, list[Cell]] = {}
    for cell in rows:
        found.setdefault(key(cell), []).append(cell)
    return found


def _looks() -> Any:
    """Marker and dashes of one line after another; colour alone never tells two apart."""
    return (
        {"marker": m, "linestyle": d} for m, d in zip(cycle(MARKERS), cycle(DASHES), strict=False)
    )


def _shades(count: int) -> list[tuple[float, ...]]:
    """Ordered colours that are seen on white and on black."""
    import matplotlib as mpl

    return [
        tuple(mpl.colormaps["plasma"](0.38 + 0.44 * i / max(1, count - 1))) for i in range(count)
    ]


def figure2(part: Part) -> Drawing | str:
    """Diffusion steps against acceptance and against speed-up, a line for each draft length."""
    heats = {}
    for heat, rows in _drafting(part).items():
        lines = _grouped(rows, lambda c: (c["baseline"], c["draft_len"]))
        heats[heat] = {
            k: cells
            for k, cells in lines.items()
            if len({c["steps"] for c in cells if c["steps"]}) > 1
        }
    heats = {heat: lines for heat, lines in heats.items() if lines}
    if not heats:
        return (
            NO_SWEEPS
            if not _drafting(part)
            else "no drafter was swept over more than one number of diffusion steps"
        )
    figure, axes = panels(len(heats), 2, 0.7 + 2.6 * len(heats))
    said, shades = [], _shades(len({k for lines in heats.values() for k in lines}))
    for row, (heat, lines) in zip(axes, heats.items(), strict=True):
        for ((name, length), cells), look, shade in zip(
            lines.items(), _looks(), shades, strict=False
        ):
            named: dict[str, Any] = {"label": f"{short(name)} K={length}", "color": shade, **look}
            _line(
                row[0],
                [(c["steps"], c["alpha"], None) for c in cells if c["alpha"] is not None],
                **named,
            )
            told = [(c["steps"], c["speedup_vs_vanilla"]) for c in cells if c["speedup_vs_vanilla"]]
            _line(row[1], [(s, r["ratio"], r) for s, r in told], "ratio", **named)
            said += [
                f"{name} K={length}, {c['steps']} steps: alpha {c['alpha']:.2f}"
                for c in cells
                if c["alpha"] is not None
            ]
        row[1].axhline(1, color=INK, linewidth=1, linestyle="--")
        for panel, wanted in zip(row, ("acceptance rate alpha", FACTOR), strict=True):
            powers(
                panel,
                (c["steps"] for cells in lines.values() for c in cells),
                "diffusion steps (network passes per draft)",
            )
            panel.set_ylim(bottom=0)
            panel.set_ylabel(wanted)
            panel.set_title(f"temperature {heat:g}", loc="left")
    legend(figure, [a for row in axes for a in row], columns=5)
    return Drawing(figure, "Diffusion steps against acceptance and speed-up: " + "; ".join(said))


def gamma(part: Part) -> Drawing | str:
    """Draft length against speed-up: standard speculation beside the diffusion drafters."""
    heats = _drafting(part)
    if not heats:
        return NO_SWEEPS
    figure, axes = panels(1, len(heats), 3.6, sharey=True)
    known, said = colours(names(part)), []
    for panel, (heat, rows) in zip(axes[0], heats.items(), strict=True):
        for ((name, steps), cells), look in zip(
            _grouped(rows, lambda c: (c["baseline"], c["steps"])).items(), _looks(), strict=False
        ):
            told = [
                (c["draft_len"], c["speedup_vs_vanilla"]) for c in cells if c["speedup_vs_vanilla"]
            ]
            passes = "" if steps is None else ", 1 pass" if steps == 1 else f", {steps} passes"
            points: list[Point] = [(length, r["ratio"], r) for length, r in told]
            _line(panel, points, "ratio", label=short(name) + passes, color=known[name], **look)
            said += [f"{name}{passes} K={length}: {r['ratio']:.2f}" for length, r in told]
        panel.axhline(1, color=INK, linewidth=1, linestyle="--")
        powers(panel, (c["draft_len"] for c in rows), "draft length K (gamma)")
        panel.set_ylim(bottom=0)
        panel.set_title(f"temperature {heat:g}", loc="left")
    axes[0][0].set_ylabel(FACTOR)
    legend(figure, axes[0])
    return Drawing(figure, "Draft length against speed-up: " + "; ".join(said))


def costs(part: Part) -> Drawing | str:
    """What a pass costs: the target's over the tokens it scores, a draft's over its length."""
    target, draft = part["costs"]["target"], part["costs"]["draft"]
    if not target and not draft:
        return "no cost curve was measured"
    figure, (row,) = panels(1, 2, 3.7)
    known, contexts = colours(names(part)), sorted({p["context"] for p in [*target, *draft]})
    for context, shade, look in zip(contexts, _shades(len(contexts)), _looks(), strict=False):
        points = [_cost(p, "n") for p in target if p["context"] == context]
        _line(row[0], points, color=shade, label=f"context {context}", **look)
    middle = _middle([p["context"] for p in draft])
    lines = _lines([p for p in draft if p["context"] == middle])
    for ((name, steps), told), look in zip(lines.items(), _looks(), strict=False):
        _line(
            row[1],
            [_cost(p, "draft_len") for p in told],
            color=known[name],
            label=_draft_label(name, steps),
            **look,
        )
    _finish(row[0], [p["n"] for p in target], "tokens scored in one pass, n", "T_target(n), ms")
    _finish(
        row[1],
        [p["draft_len"] for p in draft],
        f"draft length K, behind {middle} tokens",
        "T_draft(K), ms",
    )
    for panel in row:
        panel.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handlelength=2.6, columnspacing=1
        )
    ends = [
        f"{p['n']} tokens behind {p['context']}: {1000 * p['seconds']['median']:.1f} ms"
        for p in target
    ]
    return Drawing(figure, "Cost of scoring and of drafting: " + "; ".join(ends))


def contexts(part: Part) -> Drawing | str:
    """The same costs over the length of the context."""
    target, draft = part["costs"]["target"], part["costs"]["draft"]
    if len({p["context"] for p in [*target, *draft]}) < 2:
        return "costs were measured behind fewer than two lengths of context"
    figure, (row,) = panels(1, 2, 3.7)
    known, widths = colours(names(part)), sorted({p["n"] for p in target})
    chosen = list(
        dict.fromkeys([*widths[:1], *widths[len(widths) // 2 : len(widths) // 2 + 1], *widths[-1:]])
    )
    for n, shade, look in zip(chosen, _shades(len(chosen)), _looks(), strict=False):
        _line(
            row[0],
            [_cost(p, "context") for p in target if p["n"] == n],
            color=shade,
            label=f"scoring {n} token{'s' * (n > 1)}",
            **look,
        )
    length = _middle([p["draft_len"] for p in draft])
    lines = _lines([p for p in draft if p["draft_len"] == length])
    for ((name, steps), points), look in zip(lines.items(), _looks(), strict=False):
        _line(
            row[1],
            [_cost(p, "context") for p in points],
            color=known[name],
            label=_draft_label(name, steps),
            **look,
        )
    _finish(row[0], [p["context"] for p in target], "context, tokens", "T_target(n), ms")
    _finish(row[1], [p["context"] for p in draft], "context, tokens", f"T_draft({length}), ms")
    for panel in row:
        panel.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handlelength=2.6, columnspacing=1
        )
    ends = [
        f"{p['n']} tokens behind {p['context']}: {1000 * p['seconds']['median']:.1f} ms"
        for p in target
        if p["n"] in chosen
    ]
    return Drawing(figure, "Cost against context: " + "; ".join(ends))


def _cost(point: Mapping[str, Any], x: str) -> Point:
    spread = {name: 1000 * value for name, value in point["seconds"].items()}
    return point[x], spread["median"], spread


def _lines(points: Sequence[Mapping[str, Any]]) -> dict[Any, list[Cell]]:
    return _grouped(points, lambda p: (p["baseline"], p["steps"]))


def _draft_label(name: str, steps: int | None) -> str:
    return short(name, 18) + ("" if steps is None else f", {steps} pass{'es' * (steps > 1)}")


def _middle(values: Sequence[int]) -> int:
    known = sorted(set(values))
    return known[len(known) // 2] if known else 0


def _finish(panel: Axes, values: Sequence[float], across: str, up: str) -> None:
    panel.set_ylim(bottom=0)
    panel.set_ylabel(up)
    panel.set_xlabel(across)
    if values:
        powers(panel, values, across)
    else:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")


def batches(part: Part) -> Drawing | str:
    """Throughput of whole batches, and where drafting ceases to pay."""
    heats: dict[float, list[Cell]] = {}
    for entry in part["batches"]:
        if len([s for s in entry["sizes"] if s["tokens_per_second"]]) > 1:
            heats.setdefault(entry["temperature"], []).append(entry)
    if not heats:
        return "fewer than two batch sizes were measured"
    figure, axes = panels(1, len(heats), 3.6, sharey=True)
    known, said = colours(names(part)), []
    for panel, (heat, entries) in zip(axes[0], heats.items(), strict=True):
        for entry, look in zip(entries, _looks(), strict=False):
            at = [
                (s["batch"], s["tokens_per_second"])
                for s in entry["sizes"]
                if s["tokens_per_second"]
            ]
            told = even(entry)
            _line(
                panel,
                [(b, v, None) for b, v in at],
                color=known[entry["baseline"]],
                label=short(entry["baseline"]) + told,
                **look,
            )
            lost = [(b, v) for b, v in at if b == entry["break_even"]]
            panel.plot(
                [b for b, _ in lost],
                [v for _, v in lost],
                marker="o",
                markersize=11,
                fillstyle="none",
                color=INK,
                linestyle="none",
            )
            said.append(
                f"{entry['baseline']}{told}: " + ", ".join(f"{v:.0f} at {b}" for b, v in at)
            )
        powers(panel, (s["batch"] for e in entries for s in e["sizes"]), "batch, rows")
        panel.set_ylim(bottom=0)
        panel.set_title(f"temperature {heat:g}", loc="left")
    axes[0][0].set_ylabel("tokens/s, all rows")
    legend(figure, axes[0], columns=3)
    return Drawing(figure, "Tokens per second against batch: " + "; ".join(said))


def even(entry: Mapping[str, Any]) -> str:
    """The break-even batch, as a word behind a name."""
    if entry["baseline"] in (HF, VANILLA):
        return ""
    if entry["break_even"] is not None:
        return f" (no gain from batch {entry['break_even']})"
    known = [
        s["batch"]
        for s in entry["sizes"]
        if s["tokens_per_second"] and s["vanilla_tokens_per_second"]
    ]
    whole = len(known) == len(entry["sizes"])
    return (
        " (pays at every size)"
        if whole
        else f" (pays up to batch {max(known)}, then not measured)"
        if known
        else ""
    )
