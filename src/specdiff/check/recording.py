"""Runs of the real loop: their requests, texts, and every draft as it was proposed.

Shapes: B rows, K drafted tokens, V target vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff import engine
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.engine import Request
from specdiff.errors import TargetError
from specdiff.noise import Noise, row_seed
from specdiff.targets.base import Target
from specdiff.types import Context, Draft, SamplingParams
from specdiff.verify import Verifier, match

Look = Callable[[Context, Noise, Draft], None]
PARAMS = (
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=9, temperature=0.6),
    SamplingParams(max_tokens=12, temperature=1.3, top_k=3),
    SamplingParams(max_tokens=7, temperature=0),
    SamplingParams(max_tokens=10, top_p=0.8),
)


class WatchedDrafter(DrafterWrapper[Any]):
    """`inner`, with every draft passed to `look` as it came; collects the exceptions it raised."""

    def __init__(self, inner: Drafter[Any], look: Look) -> None:
        super().__init__(inner)
        self.look = look
        self.errors: list[Exception] = []

    def open(self, rows: int, slots: int) -> Any:
        return self._watch(self.inner.open, rows, slots)

    def admit(self, state: Any, context: Context, rows: Int[Tensor, "R"]) -> None:
        self._watch(self.inner.admit, state, context, rows)

    def release(self, state: Any, rows: Int[Tensor, "R"]) -> None:
        self._watch(self.inner.release, state, rows)

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft: Draft = self._watch(self.inner.propose, context, state, noise, draft_len)
        self._watch(self.look, context, noise, draft)
        return draft

    def _watch(self, role: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return role(*arguments)
        except Exception as error:
            self.errors.append(error)
            raise


def requests(
    target: Target[Any], count: int, params: Sequence[SamplingParams] = PARAMS, seed: int = 5
) -> list[Request]:
    """Prompts of one to nine random tokens."""
    generator = torch.Generator().manual_seed(7)
    V = target.info.vocab_size
    prompts = [
        torch.randint(V, (1 + 4 * i % 9,), generator=generator).tolist() for i in range(count)
    ]
    return [Request(p, params[i % len(params)], row_seed(seed, i)) for i, p in enumerate(prompts)]


@dataclass(frozen=True, slots=True)
class Drafted:
    """One row's draft in one round: the tokens that count, their laws (None: point masses), and the
    text it continues."""

    text: tuple[int, ...]
    tokens: list[int]
    probs: Tensor | None
    columns: list[int] | None


Record = dict[tuple[int, int], Drafted]  # by (seed, round)


def drafts(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Sequence[Request],
    *,
    draft_len: int,
    rows: int,
    verifier: Verifier = match,
) -> Record:
    """Every draft of the requests, `rows` at a time through the engine.

    Under `match` the texts do not depend on the drafter, so the drafts of two runs continue the
    same texts. Raises what the drafter raises.
    """
    record: Record = {}

    def look(context: Context, noise: Noise, draft: Draft) -> None:
        batch = context.batch
        for row in (~batch.done).nonzero()[:, 0].tolist():
            text = batch.ids[row, : batch.length[row]].tolist()
            record[int(batch.seed[row]), int(batch.round[row])] = row_of(draft, row, text)

    run(target, drafter, requests, look, draft_len=draft_len, rows=rows, verifier=verifier)
    return record


def row_of(draft: Draft, row: int, text: Sequence[int]) -> Drafted:
    """One row of a draft that continues `text`, on the CPU."""
    size = int(draft.sizes[row])
    probs = None if draft.probs is None else draft.probs[row, :size].double().cpu()
    columns = None if draft.columns is None else draft.columns.tolist()
    return Drafted(tuple(text), draft.tokens[row, :size].tolist(), probs, columns)


def run(
    target: Target[Any],
    drafter: Drafter[Any],
    requests: Sequence[Request],
    look: Look,
    *,
    draft_len: int,
    rows: int,
    verifier: Verifier = match,
) -> None:
    """Serve the requests and pass every draft to `look`.

    Raises the first exception of drafter or look, which the loop would survive, and TargetError if
    the target failed.
    """
    watched = WatchedDrafter(drafter, look)
    steps = engine.serve(
        target, watched, requests, verifier=verifier, draft_len=draft_len, rows=rows
    )
    with warnings.catch_warnings():
        # the loop's own warning about a faulty drafter
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in steps:
            if watched.errors:
                raise watched.errors[0]
            for message in step.errors().values():
                raise TargetError(message)


def written(
    target: Target[Any], drafter: Drafter[Any], queue: Sequence[Request], verifier: Verifier
) -> dict[int, list[int]]:
    """The engine's texts, two rows at a time, at the drafter's own draft length.

    Raises TargetError if the target failed.
    """
    results: dict[int, list[int]] = {}
    steps = engine.serve(
        target, drafter, queue, verifier=verifier, draft_len=drafter.draft_len, rows=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in steps:
            for message in step.errors().values():
                raise TargetError(message)
            results |= {request: ids.tolist() for request, ids, _ in step.finished()}
    return results


def differing(one: Record, two: Record) -> float:
    """The share of drafts that continue the same text but differ, in tokens or by 1e-3 in a law."""
    keys = one.keys() & two.keys()
    pairs = [(one[key], two[key]) for key in keys if one[key].text == two[key].text]
    return sum(not _alike(a, b) for a, b in pairs) / max(len(pairs), 1)


def _alike(a: Drafted, b: Drafted) -> bool:
    if a.tokens != b.tokens:
        return False
    if a.probs is None or b.probs is None:
        return _certain(a) and _certain(b)
    return a.columns == b.columns and torch.allclose(a.probs, b.probs, rtol=0, atol=1e-3)


def _certain(drafted: Drafted) -> bool:
    """Whether its tokens are point masses, also such as are written as probabilities.

    A greedy row needs none in a batch of greedy rows.
    """
    if drafted.probs is None:
        return True
    best = drafted.probs.max(-1)
    ids = best.indices.tolist()
    if drafted.columns is not None:
        ids = [drafted.columns[index] for index in ids]
    return ids == drafted.tokens and bool((best.values >= 1 - 1e-3).all())
