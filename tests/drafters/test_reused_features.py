"""A drafter that keeps features: a prompt that shares a prefix is read from there on."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tiny
from doubles import PointMasses
from specdiff import engine
from specdiff.drafters.base import NoDrafter
from specdiff.drafters.block import BlockDrafter, BlockState
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.engine import Request
from specdiff.noise import Noise
from specdiff.targets.base import TargetWrapper
from specdiff.types import Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

Record = dict[tuple[int, int], Draft]  # by seed and length of the text
PARAMS = SamplingParams(max_tokens=14)


class Counting(TargetWrapper[Any]):
    """Counts the prompt tokens that are read."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.read: list[int] = []

    def admit(self, cache: Any, rows: Any, prompts: Any, prefix_lengths: Any) -> Any:
        pairs = zip(prompts, prefix_lengths.tolist(), strict=True)
        self.read += [len(prompt) - 1 - k for prompt, k in pairs]
        return self.inner.admit(cache, rows, prompts, prefix_lengths)


class Recording(BlockDrafter):
    drafts: Record

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        for row in (~context.batch.done).nonzero()[:, 0].tolist():
            key = int(context.batch.seed[row]), int(context.batch.length[row])
            assert draft.probs is not None
            one = slice(row, row + 1)
            self.drafts[key] = Draft(draft.tokens[one], draft.probs[one], draft.sizes[one])
        return draft


class Rereading(Recording):
    """The same drafter, reading every prompt whole."""

    keeps_features = False


class Forgetful(Recording):
    """BUG: loses what the row's earlier request left in the cache."""

    def admit(self, state: BlockState, context: Context, rows: torch.Tensor) -> None:
        super().admit(state, context, rows)
        for store in (*state.cache.keys.values(), *state.cache.values.values()):
            store[rows] = 0


def conversations(
    kind: type[Recording],
    lengths: Any = 3,
    rows: int = 1,
    cascade: bool = False,
    chunk: int | None = None,
) -> tuple[list[list[int]], Counting, Record]:
    """Turns of `rows` conversations, each the last text and three more tokens."""
    target = Counting(tiny.target("llama"))
    drafter = kind(tiny.block(), target.info)
    drafter.drafts = {}
    texts: list[list[int]] = []
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [5, 5, 6]][:rows]
    queue = [Request(prompt, PARAMS, seed) for seed, prompt in enumerate(prompts)]

    def stream() -> Iterator[Request | None]:
        while queue or len(texts) < 4 * rows:
            yield queue.pop(0) if queue else None

    used: Any = CascadeDrafter(target.info, drafter, shortest=1) if cascade else drafter
    for step in engine.serve(
        target,
        used,
        stream(),
        verifier=VERIFIERS["match"],
        draft_len=lengths,
        rows=rows,
        slots=150,
        chunk=chunk,
    ):
        for index, ids, _ in step.finished():
            texts.append(ids.tolist())
            if len(texts) <= 3 * rows:
                queue.append(Request([*ids.tolist(), 7, 8, 9], PARAMS, index + rows))
    return texts, target, drafter.drafts


def agreement(one: Record, two: Record) -> float:
    """The largest difference of the drafts that both recorded."""
    keys = one.keys() & two.keys()
    assert len(keys) > 5
    worst = 0.0
    for key in keys:
        p, q = one[key].probs, two[key].probs
        assert p is not None and q is not None
        worst = max(worst, float((p[:, 0] - q[:, 0]).abs().max()))
    return worst


def some_plain(last: Any) -> int:
    """Every other round drafts nothing, so features wait when a request ends."""
    return 0 if last is None or int(last.batch.round.max()) % 2 else 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lengths", [3, some_plain])
def test_a_later_turn_reads_only_its_new_tokens_and_drafts_as_if_cold(
    rows: int, lengths: Any
) -> None:
    texts, target, drafts = conversations(Recording, lengths, rows)
    again, whole, cold = conversations(Rereading, lengths, rows)
    assert texts == again
    # the last token of an answer was never scored, and three are new; the anchor is not read
    assert target.read[rows:] == [3] * 3 * rows
    assert min(whole.read[rows:]) > 15
    assert agreement(drafts, cold) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("lengths", [3, some_plain])
def test_a_prompt_read_in_chunks_is_drafted_as_if_read_at_once(lengths: Any, chunk: int) -> None:
    texts, target, drafts = conversations(Recording, lengths, 1, chunk=chunk)
    again, whole, cold = conversations(Rereading, lengths, 1)
    assert texts == again
    assert sum(target.read) < sum(whole.read)
    assert drafts.keys() == cold.keys()
    assert agreement(drafts, cold) < 1e-5


def test_rows_that_run_do_not_hurt_one_that_is_read() -> None:
    """Rounds of others go on between its chunks; prefixes of earlier requests are shared."""
    target = Counting(tiny.target("llama"))
    long = [*range(12)]
    first = Request(long, SamplingParams(max_tokens=8), 5)
    alone = engine.run(target, NoDrafter(), [first], verifier=VERIFIERS["match"], draft_len=0)
    text = [*long, *[token for output in alone for token in output.tokens]]
    queue = [
        Request([1, 2], SamplingParams(max_tokens=90), 3),
        first,
        Request([*text[:17], 1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=40), 6),
    ]

    def seldom(last: Any) -> int:
        """No drafts while the first request runs: its features wait when it ends."""
        seeds = set() if last is None else set(last.batch.seed.tolist())
        return 0 if 5 in seeds and 6 not in seeds else 3

    records = []
    for kind, chunk in ((Recording, 1), (Rereading, None)):
        drafter = kind(tiny.block(), target.info)
        drafter.drafts = {}
        texts: dict[int, list[int]] = {}
        joined: dict[int, int] = {}
        steps = engine.serve(
            target, drafter, iter(queue), verifier=VERIFIERS["match"], draft_len=seldom, rows=2,
            slots=150, chunk=chunk,
        )  # fmt: skip
        for count, step in enumerate(steps):
            for output in step.outputs():
                texts.setdefault(output.request, []).extend(output.tokens)
                joined.setdefault(output.request, count)
        records.append((texts, joined, drafter.drafts))
    (texts, joined, drafts), (again, at_once, cold) = records
    assert texts == again
    assert joined[1] - joined[0] >= 11 > at_once[1] - at_once[0]
    assert agreement(drafts, cold) < 1e-5
    assert any(seed == 6 for seed, _ in drafts.keys() & cold.keys())


def test_a_prompt_that_is_given_up_leaves_nothing_to_share() -> None:
    """The drafter was not given the features of what the target has read."""
    target = Counting(tiny.target("llama"))
    long = [*range(12)]
    same = Request([*long, 5, 5], SamplingParams(max_tokens=12), 6)
    queue = [
        Request([1, 2], SamplingParams(max_tokens=60), 3),
        Request(long, PARAMS, 5),
        None,
        same,
    ]
    drafts: list[Record] = []
    for requests in (iter(queue), iter([same])):
        drafter = Recording(tiny.block(), target.info)
        drafter.drafts = {}
        steps = engine.serve(
            target, drafter, requests, verifier=VERIFIERS["match"], draft_len=3, rows=2,
            slots=150, chunk=2,
        )  # fmt: skip
        for count, step in enumerate(steps):
            if count == 3:
                step.cancel(1)
        drafts.append({key: draft for key, draft in drafter.drafts.items() if key[0] == 6})
    assert drafts[0].keys() == drafts[1].keys()
    assert agreement(*drafts) < 1e-5


def test_lost_features_would_show() -> None:
    """Planted: the drafter forgets what it is not given again."""
    _, _, drafts = conversations(Forgetful)
    _, _, cold = conversations(Rereading)
    assert agreement(drafts, cold) > 1e-3


def test_under_a_cascade_that_skips_it() -> None:
    """Features of the rounds without it arrive later, also across requests."""
    _, target, drafts = conversations(Recording, 3, 1, cascade=True)
    _, _, cold = conversations(Rereading, 3, 1)
    assert target.read[1:] == [3] * 3
    assert len(drafts) < len(cold) and agreement(drafts, cold) < 1e-5


def test_the_same_prompt_again_reads_one_token() -> None:
    """The feature before the anchor; not with a drafter whose features do not stay."""
    target = Counting(tiny.target("llama"))
    drafter = BlockDrafter(tiny.block(), target.info)
    requests = [Request([3, 1, 4, 1, 5, 9], PARAMS, seed) for seed in (4, 4)]
    verifier = VERIFIERS["token"]
    texts: list[list[int]] = [[], []]
    for output in engine.run(target, drafter, requests, verifier=verifier, draft_len=3, rows=1):
        texts[output.request] += output.tokens
    assert texts[0] == texts[1] and target.read == [5, 1]
    target.read.clear()
    list(engine.run(target, PointMasses(48), requests, verifier=verifier, draft_len=3, rows=1))
    assert target.read == [5, 0]
