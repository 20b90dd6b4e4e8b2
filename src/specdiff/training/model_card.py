"""Model cards of trained folders, written from what the run recorded: nothing is typed by hand."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import specdiff
from specdiff import environment, files
from specdiff.data.corpus import Corpus
from specdiff.training.recipe import Recipe, as_yaml

# the folders of absolute paths: a card is published, the names of local folders are not
FOLDERS = re.compile(r"(?<![\w./:~])~?(/[\w.+-]+)+/(?=[\w.+-])")
TITLES = {
    "sedd": "SEDD drafter",
    "autoregressive": "autoregressive drafter",
    "block": "block drafter",
    "target": "finetuned target",
}
COLUMNS = (
    "step",
    "minutes",
    "tokens",
    "held_out_loss",
    "tau_at_0",
    "alpha_at_0",
    "tau_at_1",
    "alpha_at_1",
)


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
    method = "discrete-diffusion" if recipe.kind in ("sedd", "block") else recipe.kind
    metadata = ModelCardData(
        license=license,
        library_name="specdiff",
        base_model=base_model,
        tags=["speculative-decoding", method],
    )
    source = json.dumps(corpus.manifest["about"])
    text = f"""---
{metadata.to_yaml()}
---

# {TITLES[recipe.kind]} for {model}

{_usage(recipe, model, out.name)}

## Measured

{_measurements(out / "training" / "curve.jsonl")}

## Made

- command: `{command}`
- specdiff {specdiff.__version__}, commit {environment.commit() or "unknown"}
- parameters: {sizes["trained"]:,} trained, {sizes["stored"]:,} stored
- data: {corpus.tokens:,} tokens in {len(corpus):,} rows ({source}),
  of which {recipe.held_out:.0%}, chosen by a hash of the row's key, are held out
- license: {license}

```yaml
{as_yaml(recipe).rstrip()}
```
"""
    files.write_text(out / "README.md", FOLDERS.sub("", text))


def _usage(recipe: Recipe, model: str, name: str) -> str:
    if recipe.kind == "target":
        return f'`specdiff "Hello" --model {name}` runs it; so does transformers.'
    return (
        f'`specdiff "Hello" --model {model} --drafter {name}` runs it.\n'
        f"The text stays exactly the target's; only its speed changes."
    )


def _measurements(curve: Path) -> str:
    lines = curve.read_text(encoding="utf-8").splitlines() if curve.exists() else []
    if not lines:
        return "Nothing was measured yet."
    points = [json.loads(line) for line in lines]
    last = points[-1]
    if "tau_at_0" not in last:
        return f"Held-out loss {last['held_out_loss']} nats per token after {last['step']} steps."
    titles = [column.replace("_", " ") for column in COLUMNS]
    history = [_cells(point) for point in points]
    positions = [str(k + 1) for k in range(len(last["per_position_at_0"]))]
    acceptance = [["0", *last["per_position_at_0"]], ["1", *last["per_position_at_1"]]]
    return f"""Held-out prompts through the real decode loop, `token` verifier;
tau counts the bonus token, alpha is accepted / drafted.

{_table(titles, history)}

Acceptance of each draft position, once reached, at the last evaluation:

{_table(["temperature", *positions], acceptance)}"""


def _cells(point: Mapping[str, Any]) -> list[Any]:
    return [point.get(column, "") for column in COLUMNS]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
