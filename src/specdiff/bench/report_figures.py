"""Figures of the report: each one with its title and caption, or why there is none."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from specdiff.bench.results import BenchResults, PartResult
from specdiff.errors import MissingExtraError

CAPTIONS = {  # of figures, in order: title, and how to read it
    "speedups": (
        "Speed-up",
        "Ratio of the medians of tokens per second; whiskers: single turns. Left of the dashed "
        "line is a slow-down.",
    ),
    "figure2": (
        "Diffusion steps against acceptance and speed-up (Figure 2 of the paper)",
        "A line for each draft length K; whiskers: single turns. Lines are offset a little so that "
        "whiskers do not cover one another.",
    ),
    "gamma": (
        "Draft length: standard speculation against diffusion",
        "Below the dashed line drafting costs more than it gains; whiskers: single turns.",
    ),
    "positions": (
        "Acceptance by position",
        "Of the tokens that were reached; positions reached fewer than 5 times are left out.",
    ),
    "conditional": (
        "Acceptance against theory",
        "Accepted given reached, and the mean of 1 - TV(p, q) over the same positions: the most "
        "that any rule accepts which looks at one token at a time. Dots off the line are chance, "
        "or an error.",
    ),
    "costs": (
        "Cost of a pass",
        "Medians with minimum and maximum of repeated measurements, batch 1.",
    ),
    "contexts": (
        "Cost against context",
        "The same measurements over the tokens that are already there.",
    ),
    "batches": (
        "Throughput against batch",
        "All rows together; a ring marks the first batch at which drafting is no faster than "
        "ours-vanilla.",
    ),
    "stages": (
        "Time by stage",
        "Of one token, over all turns; transformers' own runs are not split. Shorter is faster.",
    ),
}


PAPER_CAPTIONS = {  # of the figures over all data sets of the paper
    "passes": (
        "Figure 2: diffusion steps against acceptance and speed-up",
        "Each data set at the draft length K that is fastest on it; whiskers: single turns.",
    ),
    "lengths": (
        "Sensitivity to the draft length",
        "Below the dashed line drafting costs more than it gains; whiskers: single turns.",
    ),
}


@dataclass(frozen=True, slots=True)
class FigureView:
    """One drawing on the page: `svg`, or `why` there is none."""

    title: str
    caption: str
    svg: str | None
    why: str | None


def figures(part: PartResult, name: str) -> Iterator[FigureView]:
    """Every drawing of a part, or why it is left out; `name` begins the ids within.

    Raises MissingExtraError.
    """
    try:
        from specdiff.bench import figures as bars
        from specdiff.bench import sweeps
    except ImportError as error:
        raise missing_extra(str(error.name).partition(".")[0]) from None
    draws = bars.DRAWS | sweeps.DRAWS
    yield from _views(CAPTIONS, {kind: partial(draws[kind], part) for kind in CAPTIONS}, name)


def paper_figures(run: BenchResults) -> Iterator[FigureView]:
    """The paper's figures over all data sets. Raises MissingExtraError."""
    try:
        from specdiff.bench import paper_figures as figures
    except ImportError as error:
        raise missing_extra(str(error.name).partition(".")[0]) from None
    draws = figures.DRAWS
    bound = {kind: partial(draws[kind], run.parts) for kind in PAPER_CAPTIONS}
    yield from _views(PAPER_CAPTIONS, bound, "paper")


def _views(
    captions: Mapping[str, tuple[str, str]], draws: Mapping[str, Callable[[], Any]], name: str
) -> Iterator[FigureView]:
    from specdiff.bench import drawing

    with drawing.style():
        for kind, (title, caption) in captions.items():
            figure = draws[kind]()
            if isinstance(figure, str):
                yield FigureView(title, caption, None, figure)
            else:
                yield FigureView(title, caption, drawing.inline(figure, f"{name}-{kind}"), None)


def missing_extra(package: str) -> MissingExtraError:
    """The error of a report without its libraries."""
    return MissingExtraError(f"the report needs {package}:  pip install 'specdiff[bench]'")
