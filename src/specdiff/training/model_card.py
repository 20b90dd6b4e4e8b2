"""The model card of a trained folder, written from what the run recorded: nothing in it is typed by hand."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import specdiff
from specdiff import environment, files
from specdiff.data.corpus import Corpus
from specdiff.training.recipe import Recipe, as_yaml

FOLDERS = re.compile(
    r"(?<![\w./:~])~?(/[\w.+-]+)+/(?=[\w.+-])"
)  # of an absolute path: a card is published, the machine's folders are not
TITLES = {
    "sedd": "SEDD drafter",
    "autoregressive": "autoregressive drafter",
    "target": "finetuned target",
}


def write(
    out: Path,
    recipe: Recipe,
    corpus: Corpus,
    model: str,
    command: str,
    sizes: Mapping[str, int],
    *,
    base_model: str | None,
    license: str,
) -> None:
    """README.md of the folder `out`, whole or not at all."""
    lines = "\n".join(
        [
            *_front_matter(recipe, base_model, license),
            f"# {TITLES[recipe.kind]} for {model}",
            "",
            _use(recipe, model, out.name),
            "",
            "## Measured",
            "",
            *_curve(out / "training" / "curve.jsonl"),
            "",
            "## Made",
            "",
            f"- command: `{command}`",
            f"- specdiff {specdiff.__version__}, commit {environment.commit() or 'unknown'}",
            f"- parameters: {sizes['trained']:,} trained, {sizes['stored']:,} stored",
            f"- data: {corpus.tokens:,} tokens in {len(corpus):,} rows ({json.dumps(corpus.manifest['about'])}), of which "
            f"{recipe.held_out:.0%}, chosen by a hash of the row's key, are held out",
            f"- license: {license}",
            "",
            "```yaml",
            as_yaml(recipe).rstrip(),
            "```",
            "",
        ]
    )
    files.write_text(out / "README.md", FOLDERS.sub("", lines))


def _front_matter(recipe: Recipe, base_model: str | None, license: str) -> list[str]:
    tags = ["speculative-decoding", "discrete-diffusion" if recipe.kind == "sedd" else recipe.kind]
    base = [f"base_model: {base_model}"] if base_model else []
    return [
        "---",
        f"license: {license}",
        "library_name: specdiff",
        *base,
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
    ]


def _use(recipe: Recipe, model: str, name: str) -> str:
    if recipe.kind == "target":
        return f'`specdiff "Hello" --model {name}` runs it; so does transformers.'
    return f'`specdiff "Hello" --model {model} --drafter {name}` runs it. The text stays exactly the target\'s; only its speed changes.'


def _curve(path: Path) -> list[str]:
    if not path.exists():
        return ["Nothing was measured yet."]
    points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not points or "tau_at_0" not in points[-1]:
        return (
            [
                f"Held-out loss {points[-1]['held_out_loss']} nats per token after {points[-1]['step']} steps."
            ]
            if points
            else []
        )
    head = [
        "step",
        "minutes",
        "tokens",
        "held_out_loss",
        "tau_at_0",
        "alpha_at_0",
        "tau_at_1",
        "alpha_at_1",
    ]
    last = points[-1]
    return [
        "Held-out prompts through the real decode loop, `token` verifier; tau counts the bonus token, alpha is accepted / drafted.",
        "",
        *_table(
            [h.replace("_", " ") for h in head], [[p.get(h, "") for h in head] for p in points]
        ),
        "",
        "Acceptance of each draft position, once reached, at the last evaluation:",
        "",
        *_table(
            ["temperature", *(str(k + 1) for k in range(len(last["per_position_at_0"])))],
            [["0", *last["per_position_at_0"]], ["1", *last["per_position_at_1"]]],
        ),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
