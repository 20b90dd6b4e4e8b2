"""Existing token rows and texts as rows of a corpus. Nothing is generated."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdiff import files
from specdiff.data.corpus import GROUP_BITS
from specdiff.data.ledger import Ledger
from specdiff.data.shards import Row
from specdiff.errors import CorpusError, UsageError

MODES = (0.0, 0.7, 1.0)  # temperatures that the numbers of a `mode` tensor stand for


def read_rows(path: Path, vocab_size: int) -> list[Row]:
    """Rows of a safetensors file: `tokens` [n], `offsets` [rows + 1], `prompt_lengths` [rows].

    Its temperatures [rows] are in `temperatures` or, as numbers of MODES, in `mode`; default 1.

    Raises UsageError if there is no such file, CorpusError naming a tensor that is missing or bad.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        data = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read (truncated, or no safetensors file?): {error}"
        ) from None
    for name in ("tokens", "offsets", "prompt_lengths"):
        if name not in data or data[name].dim() != 1:
            raise CorpusError(
                f"{path} needs a one-dimensional tensor {name!r}; "
                f"it has {', '.join(sorted(data)) or 'none'}"
            )
    tokens = data["tokens"].long()
    offsets = data["offsets"].long()
    prompts = data["prompt_lengths"].long()
    lengths = offsets.diff()
    whole = len(offsets) == len(prompts) + 1 and offsets[[0, -1]].tolist() == [0, len(tokens)]
    if not whole or bool((lengths < 1).any()):
        raise CorpusError(
            f"{path}: offsets must rise from 0 to {len(tokens)} in {len(prompts)} steps, one a row"
        )
    if bool((prompts < 0).any()) or bool((prompts > lengths).any()):
        raise CorpusError(f"{path}: a prompt length lies outside its row")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise CorpusError(
            f"{path}: token ids reach {int(tokens.max())}, but the target's vocabulary "
            f"has {vocab_size}; made with another tokenizer?"
        )
    texts = torch.split(tokens, lengths.tolist())
    temperatures = _temperatures(data, len(prompts), path)
    columns = zip(texts, prompts.tolist(), temperatures, count(), strict=False)
    return [Row(*values) for values in columns]


def _temperatures(data: dict[str, Tensor], rows: int, path: Path) -> list[float]:
    if "temperatures" in data:
        values = [round(t, 6) for t in data["temperatures"].double().tolist()]
    elif "mode" in data:
        modes = data["mode"].long()
        if bool((modes < 0).any()) or bool((modes >= len(MODES)).any()):
            raise CorpusError(
                f"{path}: mode must be 0 (greedy), 1 (temperature 0.7) or 2 (temperature 1)"
            )
        values = torch.tensor(MODES, dtype=torch.float64)[modes].tolist()
    else:
        values = [1.0] * rows
    if len(values) != rows:
        raise CorpusError(f"{path}: {len(values)} temperatures for {rows} rows")
    return values


def about(path: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """The `about` of an imported corpus; `identity` is that of its target."""
    source = {"kind": "tokens", "input": path.name, "input_sha256": files.digest(path)}
    return {**identity, "source": source}


def packed(documents: Iterable[Sequence[int]], end: int | None, length: int) -> Iterator[Row]:
    """Documents as rows of `length` tokens, as SEDD and its paper train on them.

    The documents are joined, with an end token after each, and split again. Every so often a group
    of rows ends together with a document, so that a whole group can be held out. Groups grow with
    the corpus: a small one still has several, and a large one has few short rows.
    """
    remaining = filter(None, documents)
    joined: list[int] = []
    for group in count(1):
        size = length * (1 + group // 4)
        for document in remaining:
            joined += [*document, *([] if end is None else [end])]
            # a row of one token has nothing to predict
            if len(joined) >= size and len(joined) % length != 1:
                break
        if len(joined) < 2:
            return
        for place, start in enumerate(range(0, len(joined) - 1, length)):
            ids = torch.tensor(joined[start : start + length])
            yield Row(ids, 0, 1.0, group << GROUP_BITS | place)
        joined = []


def add_rows(rows: Iterable[Row], ledger: Ledger) -> Iterator[int]:
    """Add the rows whose keys are new; yields the number of tokens of each."""
    for row in rows:
        if row.key not in ledger.keys:
            ledger.add(row)
            yield len(row.tokens)
