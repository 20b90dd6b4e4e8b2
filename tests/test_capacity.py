"""Rows under a bound on the cache's positions: texts, memory, order."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import tiny
from specdiff import SpeculativeLM, engine
from specdiff.capacity import STEP, Capacity
from specdiff.drafters.base import Drafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.engine import Request
from specdiff.errors import UsageError
from specdiff.models.cache import RaggedCache
from specdiff.noise import row_seed
from specdiff.targets.base import Target, TargetWrapper
from specdiff.targets.causal import CausalTarget
from specdiff.text.options import Options
from specdiff.types import Batch, Draft, SamplingParams, TargetOutput
from specdiff.verify import token
from test_lm import VOCAB, tokenizer  # noqa: F401

POSITIONS = 4 * (STEP + 1)  # four short rows, or one long one


class Measured(TargetWrapper[Any]):
    """Passes everything on, and records the rows and bytes of the cache in each round."""

    def __init__(self, inner: Target[Any]) -> None:
        super().__init__(inner)
        self.shapes: list[tuple[int, int]] = []

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        self.shapes.append((cache.store.rows, cache.store.nbytes))
        return output


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    return tiny.target("llama", positions=1024)


def mixed(count: int) -> list[Request]:
    """Short requests, some of two steps, and long ones: in the prompt, or in the limit."""
    requests = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        size = {2: 700, 3: 300}.get(i % 6, 5 + i)
        prompt = torch.randint(tiny.VOCAB, (size,), generator=generator).tolist()
        stop = () if i % 6 != 5 else tuple(range(0, tiny.VOCAB, 7))
        params = SamplingParams(700 if i % 6 == 5 else 12, stop_token_ids=stop)
        requests.append(Request(prompt, params, row_seed(1, i)))
    return requests


def texts(
    target: Target[Any],
    stream: Sequence[Request] | Iterator[Request | None],
    drafter: Drafter[Any] | None = None,
    **options: Any,
) -> tuple[dict[int, list[int]], list[int]]:
    """The tokens of each request, and the requests in the order of their first round."""
    tokens: dict[int, list[int]] = {}
    drafter = drafter or NGramDrafter(target.info)
    steps = engine.serve(target, drafter, stream, verifier=token, draft_len=3, **options)
    for step in steps:
        for output in step.outputs():
            tokens.setdefault(output.request, []).extend(output.tokens)
    return tokens, [*tokens]


@pytest.mark.parametrize("chunk", [None, 100])
def test_texts_are_those_of_requests_alone_and_memory_is_bounded(
    target: CausalTarget, chunk: int | None
) -> None:
    requests = mixed(12)
    want, _ = texts(target, requests, rows=1)
    measured = Measured(target)
    got, order = texts(
        measured, iter(requests), rows=4, slots=900, positions=POSITIONS, chunk=chunk
    )
    assert got == want
    assert order == sorted(order)  # by arrival
    rows = [shape[0] for shape in measured.shapes]
    assert max(rows) > 1  # short ones run together
    assert rows.index(1) and 1 in rows  # the long ones alone
    assert max(size for _, size in measured.shapes) <= POSITIONS * target.position_bytes


def test_the_cache_is_as_wide_as_the_texts(target: CausalTarget) -> None:
    measured = Measured(target)
    texts(measured, [Request([1, 2, 3], SamplingParams(9), 0)], slots=900)
    assert {size for _, size in measured.shapes} == {(STEP + 1) * target.position_bytes}


def test_a_store_that_grows_keeps_its_entries() -> None:
    cache = RaggedCache(2, 900)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 100, 4, generator=generator) for _ in range(8)]
    for i, part in enumerate(parts):
        at = torch.arange(100 * i, 100 * (i + 1)).expand(2, -1)
        cache.place(at)
        keys, values = cache.update(part, -part, 0)
    assert torch.equal(keys[:, :, :800], torch.cat(parts, dim=2))
    assert torch.equal(values, -keys)
    assert cache.keys[0].shape[2] == 901  # all there are and a spare one: less than a whole step


def test_a_request_that_waits_for_room_may_leave(target: CausalTarget) -> None:
    long = Request([1] * 700, SamplingParams(12), 0)
    short = Request([1, 2], SamplingParams(40), 1)
    last = Request([3], SamplingParams(4), 2)
    seen = set()
    steps = engine.serve(
        target, NGramDrafter(target.info), iter([short, long, last]), verifier=token, draft_len=3,
        rows=4, slots=900, positions=POSITIONS,
    )  # fmt: skip
    for step in steps:
        outputs = step.outputs()
        if not seen:
            step.cancel(1)
        seen |= {output.request for output in outputs}
    assert seen == {0, 2}


def test_a_grammar_moves_with_its_row(tokenizer: Any) -> None:
    """The last of three short requests runs on in the first row, beside one of two steps."""
    pytest.importorskip("llguidance", reason="the structured extra is not installed")
    wide = SpeculativeLM(tiny.target("llama", vocab=VOCAB, positions=1024), "none", tokenizer, 900)
    limits = [(2, 4), (2, 6), (2, 60), (300, 8)]
    words = ["on", "the", "rain", "falls"]
    requests = []
    for i, (size, most) in enumerate(limits):
        options = Options(SamplingParams(most), regex=f"({words[i]}){{30}}")
        requests.append(wide.request([1 + i] * size, options, row_seed(1, i)))
    want, _ = texts(wide.target, requests, rows=1)
    measured = Measured(wide.target)
    got, _ = texts(measured, iter(requests), rows=4, slots=900, positions=POSITIONS)
    assert got == want
    assert [rows for rows, _ in measured.shapes][-1] == 2


@pytest.mark.parametrize("looked_up", [False, True])
def test_a_hot_start_moves_with_its_row(target: CausalTarget, looked_up: bool) -> None:
    """As above, the third request runs on in the first row, and drafts what it would alone."""
    drafter: Drafter[Any] = DenoisingDrafter(tiny.drafter(target.info).denoiser, hot_start=0.9)
    if looked_up:
        drafter = CascadeDrafter(target.info, drafter, shortest=1)
    requests = [
        Request([1 + i] * size, SamplingParams(most), row_seed(1, i))
        for i, (size, most) in enumerate([(2, 4), (2, 6), (2, 60), (300, 8)])
    ]
    want, _ = texts(target, requests, drafter, rows=1)
    got, _ = texts(target, iter(requests), drafter, rows=4, slots=900, positions=POSITIONS)
    assert got == want


@pytest.mark.parametrize("positions", [STEP, 3 * STEP])
def test_a_row_that_never_fits_is_refused(target: CausalTarget, positions: int) -> None:
    with pytest.raises(UsageError, match=f"may take {4 * STEP + 1} positions .* {positions}"):
        texts(target, iter([]), slots=900, positions=positions)


def test_rows_double_as_long_as_they_have_room() -> None:
    room = Capacity(8, 1000, 10 * (STEP + 1))
    assert room.grown(2, 1, STEP) == 4
    assert room.grown(4, 1, 2 * STEP) == 5
    assert room.grown(1, 3, 2 * STEP) == 4
    assert room.holds(8, STEP) and not room.holds(9, STEP)
    assert not room.holds(6, 2 * STEP)
