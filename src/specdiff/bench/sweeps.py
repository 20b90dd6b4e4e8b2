"""Figures of sweeps: diffusion steps, draft length, costs of a pass, throughput of a batch.

Each function draws a part, or returns why it cannot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from specdiff.bench.costs import DraftCost, TargetCost
from specdiff.bench.drawing import (
    DASHES,
    INK,
    MARKERS,
    Cells,
    Draw,
    Drawing,
    by_temperature,
    colors,
    legend,
    panels,
    powers,
    short,
    whiskers,
)
from specdiff.bench.metrics import CellResult, Speedup, Spread
from specdiff.bench.results import BatchCurve, PartResult
from specdiff.bench.settings import HF, VANILLA

NO_SWEEPS = (
    "the sweeps of draft length and diffusion steps were not run (--quick leaves them out), "
    "or not finished"
)
FACTOR = "speed-up vs ours-vanilla (ratio)"
Line = tuple[str, int | str | None]  # baseline, draft length or steps


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a line, with the limits of its whisker if it has any."""

    x: float
    y: float
    limits: tuple[float, float] | None = None


def draw_line(panel: Axes, points: Sequence[Point], **look: Any) -> None:
    """Points by x. Lines with whiskers are offset a little, so that these do not cover each
    other."""
    offset = 1 + 0.035 * (len(panel.containers) - 1)
    xs = [offset * p.x if p.limits else p.x for p in points]
    order = sorted(range(len(points)), key=lambda i: xs[i])
    spreads = [(points[i].y, *limits) for i in order if (limits := points[i].limits)]
    errors = whiskers(spreads) if len(spreads) == len(points) else None
    panel.errorbar(
        [xs[i] for i in order],
        [points[i].y for i in order],
        yerr=errors,
        elinewidth=0.8,
        capsize=2,
        **look,
    )


def ratio_point(x: float, ratio: Speedup) -> Point:
    return Point(x, ratio.ratio, (ratio.min, ratio.max))


def _swept(part: PartResult) -> Cells:
    return by_temperature(part, "sweep", lambda c: c.baseline not in (HF, VANILLA))


def line_looks() -> Iterator[dict[str, str]]:
    """Markers and dashes of successive lines, which differ not by color alone."""
    for marker, dash in zip(cycle(MARKERS), cycle(DASHES), strict=False):
        yield {"marker": marker, "linestyle": dash}


def line_shades(count: int) -> list[tuple[float, ...]]:
    """Ordered colors that are visible on white and on black."""
    plasma = mpl.colormaps["plasma"]
    return [tuple(plasma(0.38 + 0.44 * i / max(1, count - 1))) for i in range(count)]


def _length(cell: CellResult) -> int:
    assert isinstance(cell.draft_len, int), "sweeps are over numbers"
    return cell.draft_len


def _steps_lines(rows: Sequence[CellResult]) -> dict[Line, list[CellResult]]:
    """The cells of each drafter and draft length, if they differ in steps."""
    lines: dict[Line, list[CellResult]] = {}
    for cell in rows:
        if cell.steps:
            lines.setdefault((cell.baseline, cell.draft_len), []).append(cell)
    return {line: cells for line, cells in lines.items() if len({c.steps for c in cells}) > 1}


def figure2(part: PartResult) -> Drawing | str:
    """Diffusion steps against acceptance and against speed-up, a line for each draft length."""
    swept = _swept(part)
    groups = {temperature: _steps_lines(rows) for temperature, rows in swept.items()}
    groups = {temperature: lines for temperature, lines in groups.items() if lines}
    if not groups:
        if not swept:
            return NO_SWEEPS
        return "no drafter was swept over more than one number of diffusion steps"
    figure, axes = panels(len(groups), 2, 0.7 + 2.6 * len(groups))
    shades = line_shades(len({line for lines in groups.values() for line in lines}))
    words: list[str] = []
    for row, (temperature, lines) in zip(axes, groups.items(), strict=True):
        looks = zip(lines.items(), line_looks(), shades, strict=False)
        for ((name, length), cells), look, shade in looks:
            title = f"{name} K={length}"
            options: dict[str, Any] = {"label": f"{short(name)} K={length}", "color": shade}
            options |= look
            alphas = [(c.steps or 0, c.alpha) for c in cells if c.alpha is not None]
            draw_line(row[0], [Point(steps, alpha) for steps, alpha in alphas], **options)
            ratios = [(c.steps or 0, c.speedup_vs_vanilla) for c in cells]
            draw_line(row[1], [ratio_point(steps, r) for steps, r in ratios if r], **options)
            words += [f"{title}, {steps} steps: alpha {alpha:.2f}" for steps, alpha in alphas]
        row[1].axhline(1, color=INK, linewidth=1, linestyle="--")
        steps = [c.steps or 0 for cells in lines.values() for c in cells]
        for panel, title in zip(row, ("acceptance rate alpha", FACTOR), strict=True):
            powers(panel, steps, "diffusion steps (network passes per draft)")
            panel.set_ylim(bottom=0)
            panel.set_ylabel(title)
            panel.set_title(f"temperature {temperature:g}", loc="left")
    legend(figure, [panel for row in axes for panel in row], columns=5)
    return Drawing(figure, "Diffusion steps against acceptance and speed-up: " + "; ".join(words))


def gamma(part: PartResult) -> Drawing | str:
    """Draft length against speed-up: standard speculation and the diffusion drafters."""
    swept = _swept(part)
    if not swept:
        return NO_SWEEPS
    figure, axes = panels(1, len(swept), 3.6, sharey=True)
    hues = colors(part)
    words: list[str] = []
    for panel, (temperature, rows) in zip(axes[0], swept.items(), strict=True):
        lines: dict[Line, list[CellResult]] = {}
        for cell in rows:
            lines.setdefault((cell.baseline, cell.steps), []).append(cell)
        for ((name, steps), cells), look in zip(lines.items(), line_looks(), strict=False):
            ratios = [(_length(c), c.speedup_vs_vanilla) for c in cells]
            points = [(length, ratio) for length, ratio in ratios if ratio]
            passes = _passes(steps)
            draw_line(
                panel,
                [ratio_point(length, ratio) for length, ratio in points],
                label=short(name) + passes,
                color=hues[name],
                **look,
            )
            words += [f"{name}{passes} K={length}: {r.ratio:.2f}" for length, r in points]
        panel.axhline(1, color=INK, linewidth=1, linestyle="--")
        powers(panel, [_length(c) for c in rows], "draft length K (gamma)")
        panel.set_ylim(bottom=0)
        panel.set_title(f"temperature {temperature:g}", loc="left")
    axes[0][0].set_ylabel(FACTOR)
    legend(figure, axes[0])
    return Drawing(figure, "Draft length against speed-up: " + "; ".join(words))


def _passes(steps: int | str | None) -> str:
    if steps is None:
        return ""
    return ", 1 pass" if steps == 1 else f", {steps} passes"


def costs(part: PartResult) -> Drawing | str:
    """The cost of a pass: the target's over the tokens it scores, a draft's over its length."""
    target = part.costs.target
    draft = part.costs.draft
    if not target and not draft:
        return "no cost curve was measured"
    figure, (row,) = panels(1, 2, 3.7)
    contexts = sorted(_contexts(part))
    for context, shade, look in zip(
        contexts, line_shades(len(contexts)), line_looks(), strict=False
    ):
        points = [_milliseconds(p.n, p.seconds) for p in target if p.context == context]
        draw_line(row[0], points, color=shade, label=f"context {context}", **look)
    middle = _middle([p.context for p in draft])
    _draft_lines(row[1], part, [p for p in draft if p.context == middle], "draft_len")
    _finish(row[0], [p.n for p in target], "tokens scored in one pass, n", "T_target(n), ms")
    lengths = [p.draft_len for p in draft]
    _finish(row[1], lengths, f"draft length K, after {middle} tokens", "T_draft(K), ms")
    return Drawing(figure, "Cost of scoring and of drafting: " + _in_words(target))


def contexts(part: PartResult) -> Drawing | str:
    """The same costs over the length of the context."""
    target = part.costs.target
    draft = part.costs.draft
    if len(_contexts(part)) < 2:
        return "costs were measured after fewer than two lengths of context"
    figure, (row,) = panels(1, 2, 3.7)
    widths = sorted({p.n for p in target})
    middle = len(widths) // 2
    few = list(dict.fromkeys([*widths[:1], *widths[middle : middle + 1], *widths[-1:]]))
    for n, shade, look in zip(few, line_shades(len(few)), line_looks(), strict=False):
        points = [_milliseconds(p.context, p.seconds) for p in target if p.n == n]
        label = f"scoring {n} token{'s' * (n > 1)}"
        draw_line(row[0], points, color=shade, label=label, **look)
    length = _middle([p.draft_len for p in draft])
    _draft_lines(row[1], part, [p for p in draft if p.draft_len == length], "context")
    _finish(row[0], [p.context for p in target], "context, tokens", "T_target(n), ms")
    _finish(row[1], [p.context for p in draft], "context, tokens", f"T_draft({length}), ms")
    return Drawing(figure, "Cost against context: " + _in_words([p for p in target if p.n in few]))


def _contexts(part: PartResult) -> set[int]:
    return {p.context for p in part.costs.target} | {p.context for p in part.costs.draft}


def _in_words(points: Sequence[TargetCost]) -> str:
    return "; ".join(
        f"{p.n} tokens after {p.context}: {1000 * p.seconds.median:.1f} ms" for p in points
    )


def _milliseconds(x: float, seconds: Spread) -> Point:
    return Point(x, 1000 * seconds.median, (1000 * seconds.min, 1000 * seconds.max))


def _draft_lines(panel: Axes, part: PartResult, points: Sequence[DraftCost], x: str) -> None:
    hues = colors(part)
    lines: dict[tuple[str, int | None], list[DraftCost]] = {}
    for point in points:
        lines.setdefault((point.baseline, point.steps), []).append(point)
    for ((name, steps), line), look in zip(lines.items(), line_looks(), strict=False):
        draw_line(
            panel,
            [_milliseconds(getattr(p, x), p.seconds) for p in line],
            color=hues[name],
            label=short(name, 18) + _passes(steps),
            **look,
        )


def _middle(values: Sequence[int]) -> int:
    distinct = sorted(set(values))
    return distinct[len(distinct) // 2] if distinct else 0


def _finish(panel: Axes, values: Sequence[float], across: str, up: str) -> None:
    panel.set_ylim(bottom=0)
    panel.set_ylabel(up)
    panel.set_xlabel(across)
    if values:
        powers(panel, values, across)
    else:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")
    panel.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handlelength=2.6, columnspacing=1
    )


def batches(part: PartResult) -> Drawing | str:
    """Throughput of whole batches, and the batch at which drafting no longer pays."""
    groups: dict[float, list[BatchCurve]] = {}
    for entry in part.batches:
        if len(_rates(entry)) > 1:
            groups.setdefault(entry.temperature, []).append(entry)
    if not groups:
        return "fewer than two batch sizes were measured"
    figure, axes = panels(1, len(groups), 3.6, sharey=True)
    words: list[str] = []
    for panel, (temperature, entries) in zip(axes[0], groups.items(), strict=True):
        words += _batch_lines(panel, part, entries)
        powers(panel, [s.batch for entry in entries for s in entry.sizes], "batch, rows")
        panel.set_ylim(bottom=0)
        panel.set_title(f"temperature {temperature:g}", loc="left")
    axes[0][0].set_ylabel("tokens/s, all rows")
    legend(figure, axes[0], columns=3)
    return Drawing(figure, "Tokens per second against batch: " + "; ".join(words))


def _batch_lines(panel: Axes, part: PartResult, entries: Sequence[BatchCurve]) -> Iterator[str]:
    """Draw a line per baseline, with a ring at its break-even. Yields the lines in words."""
    hues = colors(part)
    for entry, look in zip(entries, line_looks(), strict=False):
        rates = _rates(entry)
        draw_line(
            panel,
            [Point(batch, rate) for batch, rate in rates.items()],
            color=hues[entry.baseline],
            label=short(entry.baseline) + break_even(entry),
            **look,
        )
        ring = [batch for batch in rates if batch == entry.break_even]
        panel.plot(
            ring,
            [rates[batch] for batch in ring],
            marker="o",
            markersize=11,
            fillstyle="none",
            color=INK,
            linestyle="none",
        )
        speeds = ", ".join(f"{rate:.0f} at {batch}" for batch, rate in rates.items())
        yield f"{entry.baseline}{break_even(entry)}: {speeds}"


def _rates(entry: BatchCurve) -> dict[int, float]:
    """Batch size -> tokens per second, if measured."""
    return {s.batch: s.tokens_per_second for s in entry.sizes if s.tokens_per_second}


def break_even(entry: BatchCurve) -> str:
    """The break-even batch, as the suffix of a name."""
    if entry.baseline in (HF, VANILLA):
        return ""
    if entry.break_even is not None:
        return f" (no gain from batch {entry.break_even})"
    rates = _rates(entry)
    pairs = [s.batch for s in entry.sizes if s.batch in rates and s.vanilla_tokens_per_second]
    if len(pairs) == len(entry.sizes):
        return " (pays at every size)"
    return f" (pays up to batch {max(pairs)}, then not measured)" if pairs else ""


DRAWS: dict[str, Draw] = {
    "figure2": figure2,
    "gamma": gamma,
    "costs": costs,
    "contexts": contexts,
    "batches": batches,
}
