"""How far each way of drafting moves the law of the text: by enumeration, for recipes and for this library's own drafters."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from specdiff import files, strict_json
from specdiff.bench import report
from specdiff.check import builtin_drafts, constructions

VERIFIERS = ("token", "block", "match")
ZERO = {
    "recipe": 1e-12,
    "drafter": 1e-6,
}  # what rounding leaves: recipes are in float64, networks work in float32
SAMPLE = 20_000  # drafts, where they cannot be enumerated
CASES = 2  # random networks of each drafter, against as many random targets


def rows() -> Iterator[dict[str, Any]]:
    """{draft, group "drafter" | "recipe", lawful, biased, distance {verifier: [least, most]}, error null | of the distance, either way}

    Total variations between texts of K + 1 tokens, over random cases. `lawful` is what is claimed, `biased` what was found under `token`
    and `block`.
    """
    for name, (build, whole) in builtin_drafts.DRAFTERS.items():
        found: dict[str, list[float]] = {v: [] for v in VERIFIERS}
        for seed in range(CASES):
            drafts, case = (
                builtin_drafts.enumerated(build(seed))
                if whole
                else builtin_drafts.drawn(build(seed), SAMPLE),
                constructions.Case(seed),
            )
            for verifier in VERIFIERS:
                found[verifier].append(
                    constructions.distance(partial(_known, drafts), verifier, case)
                )
        off = (
            None
            if whole
            else builtin_drafts.error(SAMPLE, constructions.V ** (constructions.K + 1))
        )
        yield _row(name, "drafter", True, {v: (min(d), max(d)) for v, d in found.items()}, off)
    for name, lawful, told in constructions.table():
        yield _row(name, "recipe", lawful, told, None)


def _known(drafts: constructions.Drafts, case: constructions.Case) -> constructions.Drafts:
    return drafts


def _row(
    name: str, group: str, lawful: bool, found: Mapping[str, tuple[float, float]], off: float | None
) -> dict[str, Any]:
    biased = max(found["token"][1], found["block"][1]) > ZERO[group] + (off or 0.0)
    told = {v: list(d) for v, d in found.items()}
    return {
        "draft": name,
        "group": group,
        "lawful": lawful,
        "biased": biased,
        "distance": told,
        "error": off,
    }


def shown(row: Mapping[str, Any], verifier: str) -> str:
    """A distance as it is read: 0, 0 but for an error, or from the least to the largest."""
    least, most = row["distance"][verifier]
    zero = most <= ZERO[row["group"]]
    if row["error"] is not None:
        return f"{0 if zero else f'{most:.3f}'} ± {row['error']:.3f}"
    return "0" if zero else f"{least:.3f} to {most:.2f}"


def shade(row: Mapping[str, Any], verifier: str) -> str:
    """How much that is, for the eye."""
    most = row["distance"][verifier][1]
    return (
        "zero"
        if most <= ZERO[row["group"]] + (row["error"] or 0.0)
        else "little"
        if most < 0.05
        else "some"
        if most < 0.2
        else "much"
    )


def write(folder: Path, found: list[dict[str, Any]]) -> Path:
    """law.json. Returns its place. Raises StorageError."""
    study = {
        "schema": 1,
        "tokens": constructions.K + 1,
        "vocabulary": constructions.V,
        "rows": found,
    }
    return files.write_json(folder / "law.json", strict_json.plain(study))


def page(folder: Path, found: list[dict[str, Any]]) -> Path:
    """law.html. Returns its place. Raises MissingExtraError or StorageError."""
    facts = {
        "tokens": constructions.K + 1,
        "vocabulary": constructions.V,
        "cases": constructions.CASES,
        "networks": CASES,
        "alarm": builtin_drafts.ALARM,
    }
    try:
        from specdiff.bench import distances, svg
    except ImportError as error:
        raise report.missing(str(error.name).partition(".")[0]) from None
    with svg.style():
        figure = svg.inline(distances.draw(found, VERIFIERS), "law")
    told = report.render(
        "law.html",
        rows=found,
        verifiers=VERIFIERS,
        shown=shown,
        shade=shade,
        facts=facts,
        figure=figure,
    )
    return files.write_text(folder / "law.html", told)
