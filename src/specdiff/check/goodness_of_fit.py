"""Many texts from the real loop, the exact law of such texts, and the test that compares the two.

Shapes: N texts, L tokens at most, B rows. A text ends with its first stop id, then PADDING.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.sampling import probabilities
from specdiff.targets.base import Target
from specdiff.targets.table import TableTarget
from specdiff.types import PADDING, Batch, Params, SamplingParams
from specdiff.verify import Verifier

Law = dict[tuple[int, ...], float]


def texts(
    target: Target[Any],
    drafter: Drafter[Any],
    verifier: Verifier,
    params: SamplingParams,
    *,
    count: int = 100_000,
    rows: int = 20_000,
    token: int = 1,
    draft_len: int = 3,
    seed: int = 0,
) -> Int[Tensor, "N L"]:
    """`count` continuations of a one-token prompt, by hand-written rounds of `decode.step`.

    A one-token prompt leaves nothing to admit to the target, and admitting 1e5 rows one by one
    would take longer than decoding them. Other tests show that `decode.decode` and the engine give
    the same tokens.
    """
    parts = []
    one = Batch.of([[token]], [params], [0])
    for first in range(0, count, rows):
        batch = replace(tile(one, rows), seed=torch.arange(first, first + rows) + (seed << 32))
        slots = params.max_tokens + draft_len + 2
        run = decode.start(target, drafter, batch, verifier=verifier, slots=slots)
        if drafter.taps:
            decode.admit(run, torch.arange(rows))
        else:
            run.drafter.admit(run.state, run.context, torch.arange(rows))
        while not bool(run.batch.done.all()):
            decode.raise_if_failed(decode.step(run, draft_len if drafter.draft_len else 0))
        parts.append(written(run.batch))
    return torch.cat(parts)


def written(batch: Batch) -> Int[Tensor, "N L"]:
    """The tokens of each row of a batch after its prompt (one length for all)."""
    start = int(batch.prompt_length[0])
    assert bool((batch.prompt_length == start).all())
    index = torch.arange(batch.ids.shape[1])
    ids = torch.where(index < batch.length[:, None], batch.ids, PADDING)
    return ids[:, start : int(batch.params.limit[0])]


def tile(row: Any, rows: int) -> Any:
    """A one-row Batch or Params (or any struct of tensors), repeated `rows` times.

    Much faster than `Batch.of` on 1e5 prompts.
    """
    if isinstance(row, Tensor):
        return row.expand(rows, *row.shape[1:]).clone()
    names = [
        name for name in row.__dataclass_fields__ if isinstance(getattr(row, name), Tensor | Params)
    ]
    return replace(row, **{name: tile(getattr(row, name), rows) for name in names})


def law(target: TableTarget, params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> Law:
    """Every text that the target may write, up to its stop id or max_tokens, with its chance."""
    V = target.info.vocab_size
    options = Params.stack([params], torch.tensor([0]))
    table = probabilities(target.table.view(1, V * V, V), options).view(V, V, V).tolist()
    open_: Law = {(): 1.0}
    ended: Law = {}
    for _ in range(params.max_tokens):
        grown: Law = {}
        for text, chance in open_.items():
            before, anchor = [0, *prompt, *text][-2:]
            for token, p in enumerate(table[before][anchor]):
                if p > 0:
                    longer = ended if token in params.stop_token_ids else grown
                    longer[(*text, token)] = chance * p
        open_ = grown
    return ended | open_


def compare(
    sample: Int[Tensor, "N L"] | Sequence[Sequence[int]], expected: Mapping[tuple[int, ...], float]
) -> float:
    """The p-value of the G-test; 0 if the sample holds a text that cannot occur.

    Texts expected fewer than five times share a cell.
    """
    counts = _count(sample) if isinstance(sample, Tensor) else Counter(map(tuple, sample))
    total = sum(counts.values())
    if not counts.keys() <= expected.keys():
        return 0.0
    cells = [
        (counts[text], total * chance) for text, chance in expected.items() if total * chance >= 5
    ]
    rest = (total - sum(n for n, _ in cells), total - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    observed, expectation = torch.tensor(cells, dtype=torch.float64).T
    # a rest too small for a cell is left out of both
    expectation = expectation * observed.sum() / expectation.sum()
    G = 2 * float(torch.special.xlogy(observed, observed / expectation).sum())
    return _chi_square_tail(G, len(cells) - 1)


def _chi_square_tail(x: float, degrees: int) -> float:
    if degrees == 0:
        return 1.0
    half = torch.tensor([degrees / 2, max(x, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _count(sample: Int[Tensor, "N L"]) -> Counter[tuple[int, ...]]:
    base = int(sample.max()) - PADDING + 1
    place = base ** torch.arange(sample.shape[1])
    codes, counts = torch.unique(((sample - PADDING) * place).sum(1), return_counts=True)
    rows = (codes[:, None] // place % base + PADDING).tolist()
    counter: Counter[tuple[int, ...]] = Counter()
    for row, n in zip(rows, counts.tolist(), strict=True):
        counter[tuple(t for t in row if t != PADDING)] = n
    return counter
