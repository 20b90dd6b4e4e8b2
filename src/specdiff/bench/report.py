"""report.html: all of results.json to look at, in one file that needs no network and no JavaScript."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdiff import files
from specdiff.bench import results, summary, table
from specdiff.bench.plan import VANILLA
from specdiff.errors import MissingExtraError
from specdiff.unicode import valid

Record = Mapping[str, Any]
NAME = "report.html"
UNITS = {  # of the table's columns
    "K": "tokens", "steps": "passes", "tok/s": "end to end", "decode": "tok/s", "vs hf": "ratio (min-max)",
    "vs vanilla": "ratio (min-max)", "tau": "tok/round", "fresh": "tau", "alpha": "share", "even": "tau", "limit": "share",
    "TTFT": "ms", "exact": "share",
}  # fmt: skip
CAPTIONS = {  # of figures, in their order: title, and how to read it
    "speedups": (
        "Speed-up",
        "Ratio of the medians of tokens per second; whiskers: single turns. Left of the dashed line is a slow-down.",
    ),
    "figure2": (
        "Diffusion steps against acceptance and speed-up (Figure 2 of the paper)",
        "A line for each draft length K; whiskers: single turns. Lines stand a little apart so that whiskers do not cover one another.",
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
        "Acceptance beside theory",
        "Accepted given reached, beside the mean of 1 - TV(p, q) over the same positions: the most that any rule accepts which looks at "
        "one token at a time. Dots off the line are chance, or an error.",
    ),
    "costs": (
        "Cost of a pass",
        "Medians with least and largest of repeated measurements, batch 1.",
    ),
    "contexts": (
        "Cost against context",
        "The same measurements over the tokens that are already there.",
    ),
    "batches": (
        "Throughput against batch",
        "All rows together; a ring marks the first batch at which drafting is no faster than ours-vanilla.",
    ),
    "stages": (
        "Time by stage",
        "Of one token, over all turns; transformers' own runs are not split. Shorter is faster.",
    ),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """What the page shows of one drawing: `svg`, or `why` there is none."""

    title: str
    caption: str
    svg: str | None
    why: str | None


def write(folder: Path, told: Record) -> Path:
    """report.html beside results.json, whole or not at all. Raises MissingExtraError or StorageError."""
    return files.write_text(folder / NAME, valid(page(told)))


def page(told: Record) -> str:
    """The page of a run, whole or partial. Raises MissingExtraError."""
    parts = [
        _part(part, f"p{i}") | ({"summary": []} if told["settings"]["smoke"] else {})
        for i, part in enumerate(told["parts"])
    ]
    return render(
        "report.html",
        told=told,
        parts=parts,
        problems=results.problems(told),
        drafters=_drafters(told),
    )


def render(template: str, **told: Any) -> str:
    """A template of this package, everything in it escaped that is not markup of ours. Raises MissingExtraError."""
    try:
        import jinja2
    except ImportError:
        raise missing("Jinja2") from None
    where = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(
        loader=where,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(**told)


def missing(package: str) -> MissingExtraError:
    """What is raised where the extra is not installed."""
    return MissingExtraError(f"the report needs {package}:  pip install 'specdiff[bench]'")


def _part(part: Record, name: str) -> dict[str, Any]:
    return {
        "raw": part,
        "summary": list(summary.sentences(part)),
        "heads": UNITS,
        "rows": [_row(cell) for cell in _main(part)],
        "tasks": tasks(part),
        "figures": list(figures(part, name)) if part["cells"] or part["missing"] is None else [],
        "absent": table.absent(part),
        "compared": any(cell["exact"] is not None for cell in part["cells"]),
        "outputs": grouped(part["outputs"]),
    }


def _row(cell: Record) -> dict[str, Any]:
    shown = {name: show(cell) for name, show in table.COLUMNS.items()}
    ratio = cell["speedup_vs_vanilla"]
    verdict = summary.verdict(ratio) if ratio and cell["baseline"] != VANILLA else ""
    return {"cells": shown, "failed": cell["why"], "verdict": verdict}


def _main(part: Record) -> list[Record]:
    return sorted(
        (cell for cell in part["cells"] if cell["stage"] == "main"),
        key=lambda cell: cell["temperature"],
    )


def tasks(part: Record) -> dict[str, Any] | None:
    """Each drafter's speed-up over plain decoding, a column for each task; None where there are no two tasks."""
    cells = [
        c
        for c in _main(part)
        if c["tau"] is not None and any(t["speedup_vs_vanilla"] for t in c["tasks"].values())
    ]
    heads = list(dict.fromkeys(task for c in cells for task in c["tasks"]))
    ratios = [
        (
            f"{summary.named(c)}, T={c['temperature']:g}",
            [(c["tasks"].get(h) or {}).get("speedup_vs_vanilla") for h in heads],
        )
        for c in cells
    ]
    return {"heads": heads, "rows": ratios} if len(heads) > 1 else None


def figures(part: Record, name: str) -> Iterator[Figure]:
    """Every drawing of a part, or why it is left out; `name` begins the ids within. Raises MissingExtraError."""
    try:
        from specdiff.bench import curves, svg
        from specdiff.bench import figures as bars
    except ImportError as error:
        raise missing(str(error.name).partition(".")[0]) from None
    draws: dict[str, bars.Draw] = {
        "speedups": bars.speedups, "figure2": curves.figure2, "gamma": curves.gamma, "positions": bars.positions,
        "conditional": bars.conditional, "costs": curves.costs, "contexts": curves.contexts, "batches": curves.batches,
        "stages": bars.stages,
    }  # fmt: skip
    with svg.style():
        for kind, (title, caption) in CAPTIONS.items():
            drawn = draws[kind](part)
            shown = None if isinstance(drawn, str) else svg.inline(drawn, f"{name}-{kind}")
            yield Figure(title, caption, shown, drawn if isinstance(drawn, str) else None)


def grouped(outputs: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Answers by prompt, as they came."""
    found: dict[str, list[Record]] = {}
    for output in outputs:
        found.setdefault(f"{output['prompt']} ({output['task']})", []).append(output)
    return list(found.items())


def _drafters(told: Record) -> list[str]:
    """Name and specification of what drafted, over all parts."""
    ours = [
        b
        for part in told["parts"]
        for b in part["baselines"]
        if b["kind"] == "ours" and b["spec"] not in (None, "none")
    ]
    return list(
        dict.fromkeys(
            b["name"] if b["name"] == b["spec"] else f"{b['name']} = {b['spec']}" for b in ours
        )
    )
