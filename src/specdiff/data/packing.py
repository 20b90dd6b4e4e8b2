"""Token rows and texts someone already has -> a corpus folder. Nothing is generated."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdiff import files
from specdiff.data.corpus import GROUP_BITS, Row
from specdiff.data.ledger import Ledger
from specdiff.errors import CorpusError, UsageError

MODES = (0.0, 0.7, 1.0)  # what the numbers of a `mode` tensor stand for


def read_rows(path: Path, vocab_size: int) -> list[Row]:
    """Rows of a file with `tokens` [n], `offsets` [rows + 1], `prompt_lengths` [rows], and `mode` or `temperatures` (default 1).

    Raises UsageError if there is no such file, CorpusError naming the tensor that is missing or does not fit.
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
                f"{path} needs a one-dimensional tensor {name!r}; it has {', '.join(sorted(data)) or 'none'}"
            )
    tokens, offsets, prompts = (
        data["tokens"].long(),
        data["offsets"].long(),
        data["prompt_lengths"].long(),
    )
    lengths = offsets.diff()
    if (
        len(offsets) != len(prompts) + 1
        or int(offsets[0]) != 0
        or int(offsets[-1]) != len(tokens)
        or bool((lengths < 1).any())
    ):
        raise CorpusError(
            f"{path}: offsets must rise from 0 to {len(tokens)} in {len(prompts)} steps, one a row"
        )
    if bool((prompts < 0).any()) or bool((prompts > lengths).any()):
        raise CorpusError(f"{path}: a prompt length lies outside its row")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise CorpusError(
            f"{path}: token ids reach {int(tokens.max())}, but the target's vocabulary has {vocab_size}; made with another tokenizer?"
        )
    heat = _temperatures(data, len(prompts), path)
    rows = zip(torch.split(tokens, lengths.tolist()), prompts.tolist(), heat, strict=True)
    return [
        Row(ids, prompt, temperature, key) for key, (ids, prompt, temperature) in enumerate(rows)
    ]


def _temperatures(data: dict[str, Tensor], rows: int, path: Path) -> list[float]:
    if "temperatures" in data:
        found = [round(t, 6) for t in data["temperatures"].double().tolist()]
    elif "mode" in data:
        modes = data["mode"].long()
        if bool((modes < 0).any()) or bool((modes >= len(MODES)).any()):
            raise CorpusError(
                f"{path}: mode must be 0 (greedy), 1 (temperature 0.7) or 2 (temperature 1)"
            )
        found = torch.tensor(MODES, dtype=torch.float64)[modes].tolist()
    else:
        found = [1.0] * rows
    if len(found) != rows:
        raise CorpusError(f"{path}: {len(found)} temperatures for {rows} rows")
    return found


def about(path: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """What an imported corpus says of itself; `identity` is its target's."""
    return {
        **identity,
        "source": {"kind": "tokens", "input": path.name, "input_sha256": files.digest(path)},
    }


def packed(documents: Iterable[Sequence[int]], end: int | None, length: int) -> Iterator[Row]:
    """Documents as rows of `length` tokens: an end token after each, all joined, cut anew (how SEDD and its paper train).

    Every so often a group of rows ends with its last document, so that a whole group can be held out. Groups grow with the
    corpus: a small one still has several, and a large one few short rows.
    """
    remaining = filter(None, documents)
    joined: list[int] = []
    for group in count(1):
        size = length * (1 + group // 4)
        for document in remaining:
            joined += [*document, *([] if end is None else [end])]
            if (
                len(joined) >= size and len(joined) % length != 1
            ):  # a row of one token teaches nothing
                break
        if len(joined) < 2:
            return
        for place, start in enumerate(range(0, len(joined), length)):
            if len(joined) - start > 1:
                yield Row(
                    torch.tensor(joined[start : start + length]),
                    0,
                    1.0,
                    group << GROUP_BITS | place,
                )
        joined = []


def add_rows(rows: Iterable[Row], tally: Ledger) -> Iterator[int]:
    """Hand over the rows that are not there yet; yields the tokens of each."""
    for row in rows:
        if row.key not in tally.known:
            tally.add(row)
            yield len(row.tokens)
