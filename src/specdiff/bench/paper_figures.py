"""Figures of the paper over all data sets: network passes, and draft length."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from specdiff.bench.drawing import DASHES, INK, MARKERS, Drawing, legend, panels, powers
from specdiff.bench.metrics import CellResult
from specdiff.bench.results import PartResult
from specdiff.bench.settings import HF, VANILLA
from specdiff.bench.sweeps import FACTOR, Point, draw_line, line_shades, ratio_point

DIFFUSION = "sedd"
STANDARD = "autoregressive"
DrawAll = Callable[[Sequence[PartResult]], Drawing | str]


def passes(parts: Sequence[PartResult]) -> Drawing | str:
    """Figure 2: network passes against alpha and speed, a line for each part at the draft length
    that is fastest in it."""
    lines = {part.name: _at_best_length(part) for part in parts}
    lines = {name: cells for name, cells in lines.items() if len(cells) > 1}
    if not lines:
        return f"{DIFFUSION} was not swept over several numbers of passes"
    figure, (row,) = panels(1, 2, 3.9)
    words: list[str] = []
    options = _looks(parts)
    for name, cells in lines.items():
        title = f"{name}, K={cells[0].draft_len}"
        alphas = [Point(c.steps or 0, c.alpha) for c in cells if c.alpha is not None]
        draw_line(row[0], alphas, label=title, **options[name])
        draw_line(row[1], _ratios(cells, lambda c: c.steps or 0), label=title, **options[name])
        words += [f"{title}, {point.x:g} passes: alpha {point.y:.2f}" for point in alphas]
    steps = [c.steps or 0 for cells in lines.values() for c in cells]
    _finish(row[0], steps, "diffusion steps T (passes per draft)", "acceptance rate alpha")
    _finish(row[1], steps, "diffusion steps T (passes per draft)", FACTOR)
    row[1].axhline(1, color=INK, linewidth=1, linestyle="--")
    legend(figure, row, columns=2)
    return Drawing(figure, "Passes against acceptance and speed: " + "; ".join(words))


def lengths(parts: Sequence[PartResult]) -> Drawing | str:
    """Draft length against speed: diffusion in one pass, and standard speculation."""
    groups = {
        "diffusion (SEDD), one pass": {p.name: _swept(p, DIFFUSION, 1) for p in parts},
        "standard speculation": {p.name: _swept(p, STANDARD, None) for p in parts},
    }
    every = [c for lines in groups.values() for cells in lines.values() for c in cells]
    if not every:
        return "no drafter was swept over draft lengths"
    figure, (row,) = panels(1, 2, 3.9, sharey=True)
    words: list[str] = []
    options = _looks(parts)
    for panel, (title, lines) in zip(row, groups.items(), strict=True):
        for name, cells in lines.items():
            points = _ratios(cells, lambda c: float(c.draft_len or 0))
            if points:
                draw_line(panel, points, label=name, **options[name])
            words += [f"{title}, {name}, K={point.x:g}: {point.y:.2f}" for point in points]
        panel.axhline(1, color=INK, linewidth=1, linestyle="--")
        panel.set_title(title, loc="left")
        _finish(panel, [float(c.draft_len or 0) for c in every], "draft length K (gamma)", "")
    row[0].set_ylabel(FACTOR)
    legend(figure, row, columns=2)
    return Drawing(figure, "Draft length against speed: " + "; ".join(words))


def _looks(parts: Sequence[PartResult]) -> dict[str, dict[str, Any]]:
    """Part -> its look: a color and a marker for each data set, a dashed line if finetuned."""
    datasets: dict[str, list[str]] = {}
    for part in parts:
        datasets.setdefault(part.name.partition("/")[0], []).append(part.name)
    result: dict[str, dict[str, Any]] = {}
    for names, marker, shade in zip(
        datasets.values(), MARKERS, line_shades(len(datasets)), strict=False
    ):
        for name, dash in zip(names, cycle(DASHES)):
            fill = "full" if name == names[0] else "none"
            result[name] = {
                "color": shade,
                "marker": marker,
                "linestyle": dash,
                "fillstyle": fill,
            }
    return result


def _ratios(cells: Sequence[CellResult], x: Callable[[CellResult], float]) -> list[Point]:
    return [ratio_point(x(c), c.speedup_vs_vanilla) for c in cells if c.speedup_vs_vanilla]


def _swept(part: PartResult, baseline: str, steps: int | None) -> list[CellResult]:
    cells = [c for c in part.stage("sweep") if c.baseline == baseline and c.status == "ok"]
    return [c for c in cells if c.steps == steps and isinstance(c.draft_len, int)]


def _at_best_length(part: PartResult) -> list[CellResult]:
    """The diffusion drafter's cells at the draft length of the fastest of them."""
    cells = [c for c in part.stage("sweep") if c.baseline == DIFFUSION and c.status == "ok"]
    timed = [c for c in cells if c.speedup_vs_vanilla and c.baseline not in (HF, VANILLA)]
    best = max(timed, key=_gain, default=None)
    return [] if best is None else [c for c in timed if c.draft_len == best.draft_len]


def _gain(cell: CellResult) -> float:
    return cell.speedup_vs_vanilla.ratio if cell.speedup_vs_vanilla else 0.0


def _finish(panel: Axes, values: Sequence[float], across: str, up: str) -> None:
    powers(panel, values, across)
    panel.set_ylim(bottom=0)
    panel.set_ylabel(up)


DRAWS: dict[str, DrawAll] = {"passes": passes, "lengths": lengths}
