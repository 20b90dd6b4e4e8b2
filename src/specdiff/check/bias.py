"""Bias of drafting: how far each way of making a draft moves the law of the text.

Recipes and this library's own drafters are enumerated by the code that decodes; a drafter that
cannot be enumerated is sampled instead, and its distance has an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from specdiff import files, strict_json
from specdiff.check import builtin_drafts, constructions
from specdiff.check.constructions import Case, Drafts
from specdiff.unicode import valid

VERIFIERS = ("token", "block", "match")
# what rounding leaves: recipes are in float64, networks work in float32
ZERO = {"recipe": 1e-12, "drafter": 1e-6}
SAMPLE = 20_000  # drafts of a drafter that cannot be enumerated
CASES = 2  # random networks of each drafter, against as many random targets
GROUPS = {"drafter": "This library's drafters", "recipe": "Recipes"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>specdiff check --recipes</title>
<style>
body {{ margin: 2rem auto; padding: 0 1rem; max-width: 64rem; font: 16px/1.5 sans-serif; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #8886; }}
</style>
</head>
<body>
<h1>Which ways of drafting leave the target's law as it is</h1>
<p>Total variation between the target's law and that of the text, over texts of {tokens} tokens from
a vocabulary of {vocabulary}, on random targets: 0 is lawful. Everything is enumerated; a row with
an error (±) was sampled instead, and the chance that the true distance is off by more is below
{alarm:g}.</p>
<p>Least to largest over {recipe_cases} random targets and networks for recipes, and {drafter_cases}
for this library's drafters (tiny random networks in single precision: less than {zero:g} counts as
0). The verifier <b>match</b> does not use a drafter's probabilities, so every way of drafting is
lawful under it.</p>
{tables}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class BiasRow:
    """One way of making a draft.

    group: "drafter" or "recipe".
    lawful: the claim; `biased`: the finding under `token` and `block`.
    distance: verifier -> (least, largest) total variation over random cases.
    error: of a sampled distance, either way; None if it was enumerated.
    """

    draft: str
    group: str
    lawful: bool
    biased: bool
    distance: dict[str, tuple[float, float]]
    error: float | None

    def text(self, verifier: str) -> str:
        """A distance in words: 0, 0 but for an error, or from the least to the largest."""
        least, largest = self.distance[verifier]
        zero = largest <= ZERO[self.group]
        if self.error is not None:
            return f"{0 if zero else f'{largest:.3f}'} ± {self.error:.3f}"
        return "0" if zero else f"{least:.3f} to {largest:.2f}"


def rows() -> Iterator[BiasRow]:
    """Every drafter of this library, then every recipe."""
    for name, (build, enumerable) in builtin_drafts.DRAFTERS.items():
        distances: dict[str, list[float]] = {v: [] for v in VERIFIERS}
        for seed in range(CASES):
            if enumerable:
                drafts = builtin_drafts.enumerated(build(seed))
            else:
                drafts = builtin_drafts.drawn(build(seed), SAMPLE)
            for verifier in VERIFIERS:
                distances[verifier].append(_distance(drafts, verifier, seed))
        texts = constructions.V ** (constructions.K + 1)
        error = None if enumerable else builtin_drafts.error(SAMPLE, texts)
        spans = {v: (min(d), max(d)) for v, d in distances.items()}
        yield _row(name, "drafter", True, spans, error)
    for name, lawful, spans in constructions.table():
        yield _row(name, "recipe", lawful, spans, None)


def _distance(drafts: Drafts, verifier: str, seed: int) -> float:
    return constructions.distance(lambda _: drafts, verifier, Case(seed))


def _row(
    name: str,
    group: str,
    lawful: bool,
    spans: dict[str, tuple[float, float]],
    error: float | None,
) -> BiasRow:
    largest = max(spans["token"][1], spans["block"][1])
    biased = largest > ZERO[group] + (error or 0.0)
    return BiasRow(name, group, lawful, biased, spans, error)


def wrong(study: Sequence[BiasRow]) -> list[str]:
    """The drafts whose finding contradicts the claim."""
    return [row.draft for row in study if row.lawful is row.biased]


def write(folder: Path, study: Sequence[BiasRow]) -> tuple[Path, Path]:
    """Write bias.json and bias.html, each whole or not at all. Raises StorageError."""
    facts = {
        "schema": 1,
        "tokens": constructions.K + 1,
        "vocabulary": constructions.V,
        "rows": [asdict(row) for row in study],
    }
    record = files.write_json(folder / "bias.json", strict_json.plain(facts))
    return record, files.write_text(folder / "bias.html", valid(page(study)))


def page(study: Sequence[BiasRow]) -> str:
    """The study as an HTML page of two tables."""
    tables = []
    for group, title in GROUPS.items():
        tables.append(f"<h2>{escape(title)}</h2>")
        tables.append(_table([row for row in study if row.group == group]))
    return PAGE.format(
        tokens=constructions.K + 1,
        vocabulary=constructions.V,
        alarm=builtin_drafts.ALARM,
        recipe_cases=constructions.CASES,
        drafter_cases=CASES,
        zero=ZERO["drafter"],
        tables="\n".join(tables),
    )


def _table(study: Sequence[BiasRow]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in ("a draft made by", *VERIFIERS, "is"))
    lines = [f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>']
    for row in study:
        outcome = "<strong>biased</strong>" if row.biased else "lawful"
        cells = [escape(row.draft), *(row.text(v) for v in VERIFIERS), outcome]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])
