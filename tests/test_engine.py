"""Rows join and leave: many requests through few rows give what each gives alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from doubles import SICKNESS, Sick, StaleTarget
from specdiff import decode, engine, rows
from specdiff.check.doubles import TableDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.engine import Request, RequestOutput
from specdiff.errors import UsageError
from specdiff.noise import Noise, row_seed
from specdiff.rows import alike
from specdiff.targets.base import Target, TargetWrapper
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, Round, SamplingParams, TargetOutput
from specdiff.verify import VERIFIERS, match

ROWS = 8
MANY = 512


class Watched(TargetWrapper[Any]):
    """Passes everything on, and keeps count of which rows are taken."""

    def __init__(self, inner: Target[Any]) -> None:
        super().__init__(inner)
        self.rows = 0
        self.busy: set[int] = set()
        self.most = 0
        self.admitted: list[list[int]] = []
        self.prefix_lengths: list[int] = []
        self.scored: list[int] = []

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> Any:
        self.rows += rows
        return self.inner.open(rows, slots, taps)

    def admit(
        self, cache: Any, rows: Tensor, prompts: Sequence[Tensor], prefix_lengths: Tensor
    ) -> Tensor | None:
        joining = rows.tolist()
        assert len(joining) == len(set(joining)) == len(prompts)
        assert not self.busy & set(joining), "a row was given away while taken"
        self.busy |= set(joining)
        self.most = max(self.most, len(self.busy))
        self.admitted += [p.tolist() for p in prompts]
        self.prefix_lengths += prefix_lengths.tolist()
        return self.inner.admit(cache, rows, prompts, prefix_lengths)

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        self.scored.append(len(batch.length))
        return self.inner.score(cache, batch, draft)

    def release(self, cache: Any, rows: Tensor) -> None:
        assert set(rows.tolist()) <= self.busy
        self.busy -= set(rows.tolist())
        self.inner.release(cache, rows)


def requests(count: int, vocab: int, stops: bool = True) -> list[Request]:
    """Prompts, budgets and temperatures of all sorts; ids to stop at in every third."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        prompt = torch.randint(vocab, (1 + i % 7,), generator=generator).tolist()
        stop = (i % vocab, 3) if stops and i % 3 == 0 else ()
        params = SamplingParams(
            1 + (i * 5) % 9, (0.0, 0.8, 1.0)[i % 3], top_k=(0, 4)[i % 2], stop_token_ids=stop
        )
        items.append(Request(prompt, params, row_seed(1, i)))
    return items


def collected(
    progress: Iterator[RequestOutput],
) -> tuple[dict[int, list[int]], dict[int, str], list[int]]:
    """Tokens and finish reasons by request, and the requests in order of their first output."""
    tokens: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    for p in progress:
        assert p.request not in ends, "heard of after its end"
        assert p.accepted <= min(p.drafted, len(p.tokens))
        tokens.setdefault(p.request, []).extend(p.tokens)
        if p.finished:
            ends[p.request] = p.finished
    return tokens, ends, list(tokens)


def served(
    target: Target[Any],
    drafter: Drafter[Any],
    queue: Sequence[Request],
    verifier: str = "token",
    **options: Any,
) -> Any:
    return collected(
        engine.run(
            target,
            drafter,
            queue,
            verifier=VERIFIERS[verifier],
            **{"draft_len": 3, "rows": ROWS} | options,
        )
    )


@pytest.fixture(scope="module")
def queue() -> list[Request]:
    return requests(MANY, tiny.VOCAB)


@pytest.fixture(scope="module")
def target() -> Target[Any]:
    return tiny.target("gpt2")


@pytest.fixture(scope="module")
def drafter(target: Target[Any]) -> Drafter[Any]:
    return tiny.drafter(target.info, **tiny.CACHED)


def test_many_requests_through_few_rows(
    target: Target[Any], drafter: Drafter[Any], queue: list[Request]
) -> None:
    watched = Watched(target)
    tokens, ends, order = served(watched, drafter, queue)
    assert watched.admitted == [list(r.prompt) for r in queue]  # in order of arrival
    assert watched.rows == watched.most == ROWS
    assert set(watched.scored) == {ROWS}
    assert not watched.busy
    assert order[:ROWS] == list(range(ROWS)) and sorted(order) == list(range(MANY))
    assert sorted(ends) == list(range(MANY))
    for i, request in enumerate(queue):
        stops = request.params.stop_token_ids
        assert not set(tokens[i][:-1]) & set(stops)
        assert ends[i] == ("stop" if tokens[i][-1] in stops else "length")
        assert len(tokens[i]) == request.params.max_tokens or ends[i] == "stop"
    assert set(ends.values()) == {"stop", "length"}
    for i in range(0, MANY, 11):  # each alone gives the same
        alone, end, _ = served(target, drafter, queue[i : i + 1])
        assert (alone[0], end[0]) == (tokens[i], ends[i]), i


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_all_equal_one_by_one_on_an_exact_target(verifier: str) -> None:
    table = TableTarget.random(5, seed=3)
    queue = requests(96, 5)
    drafter = tiny.drafter(table.info, steps=2, n_blocks=1)
    tokens, ends, _ = served(table, drafter, queue, verifier)
    for i, request in enumerate(queue):
        alone, end, _ = served(table, drafter, [request], verifier)
        assert (alone[0], end[0]) == (tokens[i], ends[i]), i


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_any_number_of_rows_gives_the_same(rows: int) -> None:
    table, queue = TableTarget.random(5, seed=3), requests(40, 5)
    drafter = tiny.drafter(table.info, n_blocks=1)
    assert served(table, drafter, queue, rows=rows)[:2] == served(table, drafter, queue)[:2]


def test_the_order_of_arrival_changes_nothing() -> None:
    table, queue = TableTarget.random(5, seed=3), requests(40, 5)
    drafter = tiny.drafter(table.info, n_blocks=1)
    forth, back = served(table, drafter, queue), served(table, drafter, queue[::-1])
    assert [forth[0][i] for i in range(40)] == [back[0][39 - i] for i in range(40)]


def test_fewer_requests_than_rows_open_fewer(
    target: Target[Any], drafter: Drafter[Any], queue: list[Request]
) -> None:
    watched = Watched(target)
    served(watched, drafter, queue[:3])
    assert watched.rows == 3


def test_no_requests_open_nothing(target: Target[Any], drafter: Drafter[Any]) -> None:
    watched = Watched(target)
    assert served(watched, drafter, []) == ({}, {}, [])
    assert watched.rows == 0


def test_a_free_row_is_refilled_at_once() -> None:
    """A long answer holds one row; the short ones pass by on the other."""
    table = TableTarget.random(5, seed=3)
    queue = [
        Request([1], SamplingParams(max_tokens=60), 0),
        *[Request([2], SamplingParams(max_tokens=2), i) for i in range(9)],
    ]
    progress = list(
        engine.run(table, NoDrafter(), queue, verifier=VERIFIERS["token"], draft_len=0, rows=2)
    )
    ends = [p.request for p in progress if p.finished]
    assert ends == [*range(1, 10), 0]
    assert len(progress) == 60 + 9 * 2


def test_a_row_may_draft_anything_while_others_are_done() -> None:
    """The last long request runs with idle rows, which have no output."""
    table = TableTarget.random(5, seed=3)
    queue = [
        Request([1], SamplingParams(max_tokens=1), 0),
        Request([1, 2], SamplingParams(max_tokens=30), 1),
    ]
    drafter = tiny.drafter(table.info, n_blocks=1)
    tokens, ends, _ = served(table, drafter, queue, rows=2)
    assert [len(tokens[0]), len(tokens[1])] == [1, 30]
    assert tokens[1] == served(table, drafter, queue[1:])[0][0]
    assert ends == {0: "length", 1: "length"}


def test_options_of_requests_that_ended_cost_nothing(target: Target[Any]) -> None:
    """Long greedy rows need no distribution once the short sampled one between them has ended."""
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    sampled = SamplingParams(max_tokens=2, temperature=0.8, top_k=5, logprobs=2)
    queue = [Request([3, 1, i], p, i) for i, p in enumerate((greedy, sampled, greedy))]
    seen = []

    class Noted(TargetWrapper[Any]):
        def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
            seen.append(batch.params)
            return self.inner.score(cache, batch, draft)

    tokens, *_ = served(Noted(target), NoDrafter(), queue, draft_len=0, rows=3)
    assert [p.all_greedy for p in seen] == [False] * 2 + [True] * 10
    assert [p.logprobs for p in seen] == [2] * 2 + [None] * 10
    assert all(("top_k" in p.active) is (i < 2) for i, p in enumerate(seen))
    for i, request in enumerate(queue):
        alone, *_ = served(target, NoDrafter(), [request], draft_len=0, rows=1)
        assert tokens[i] == alone[0]


def test_the_draft_length_may_change_between_rounds() -> None:
    """Under `match` a rule that switches drafting off and on leaves the text alone."""
    table, queue = TableTarget.random(5, seed=3), requests(40, 5)
    drafter = tiny.drafter(table.info, n_blocks=1)
    heard: list[Round | None] = []

    def rule(last: Round | None) -> int:
        heard.append(last)
        return (0, 3, 8, 1)[len(heard) % 4]

    assert (
        served(table, drafter, queue, "match", draft_len=rule)[:2]
        == served(table, NoDrafter(), queue, "match", draft_len=0)[:2]
    )
    assert heard[0] is None
    assert all(isinstance(r, Round) for r in heard[1:])


def test_a_prompt_without_tokens_is_refused() -> None:
    queue = [Request([1], SamplingParams(), 0), Request([], SamplingParams(), 0)]
    with pytest.raises(UsageError, match="prompt 1 holds no tokens"):
        served(TableTarget.random(5), NoDrafter(), queue, draft_len=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("sickness", SICKNESS)
def test_a_request_whose_logits_are_not_finite_fails_alone(
    sickness: str, verifier: str, temperature: float
) -> None:
    """Many requests through two rows: a failing request changes none of the others."""
    table, drafter = TableTarget.random(5, seed=3), TableDrafter(5)
    queue = [
        Request([i % 5] * (1 + i), SamplingParams(max_tokens=8, temperature=temperature), 10 + i)
        for i in range(7)
    ]
    sick = Sick(table, SICKNESS[sickness], 6, seed=12)
    tokens, ends, _ = served(table, drafter, queue, verifier, rows=2)
    progress = list(
        engine.run(sick, drafter, queue, verifier=VERIFIERS[verifier], draft_len=3, rows=2)
    )
    after, afterwards, _ = collected(iter(progress))
    assert {i: after[i] for i in after if i != 2} == {i: tokens[i] for i in tokens if i != 2}
    assert afterwards == ends | {2: "error"}
    assert after.get(2, []) == tokens[2][: len(after.get(2, []))] and len(after.get(2, [])) <= 3
    (message,) = {p.error for p in progress if p.error}
    assert message.startswith("request 2: the target's logits at position 6 are not finite")
    assert [p.request for p in progress if p.error] == [2]


def test_a_failed_request_is_not_handed_over_as_a_text() -> None:
    sick = Sick(TableTarget.random(5, seed=3), SICKNESS["all nan"], 4, seed=11)
    queue = [Request([1, 2], SamplingParams(max_tokens=6), 10 + i) for i in range(3)]
    texts, errors = {}, {}
    for turn in engine.serve(
        sick, TableDrafter(5), queue, verifier=VERIFIERS["token"], draft_len=3, rows=3
    ):
        texts |= {request: ids.tolist() for request, ids, _ in turn.finished()}
        errors |= turn.errors()
    assert sorted(texts) == [0, 2] and list(errors) == [1]


def arriving(waves: Sequence[Sequence[Request]], pause: int = 1) -> Iterator[Request | None]:
    """Waves of requests with nothing for some rounds in between."""
    for wave in waves:
        yield from wave
        yield from [None] * pause


class Entered(Drafter[Any]):
    """Drafts from `inner`; checks that its features are those of the newly cached tokens."""

    taps = (0,)
    draft_len = 3

    def __init__(self, inner: Drafter[Any]) -> None:
        self.inner = inner

    def open(self, rows: int, slots: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.long)

    def admit(self, state: Tensor, context: Context, rows: Tensor) -> None:
        state[rows] = 0

    def propose(self, context: Context, state: Tensor, noise: Noise, draft_len: int) -> Draft:
        assert context.features is not None and context.feature_size is not None
        batch = context.batch
        for row in (~batch.done).nonzero()[:, 0].tolist():
            entered = batch.ids[row, state[row] : batch.length[row] - 1]
            assert int(context.feature_size[row]) == len(entered)
            assert torch.equal(context.features[row, : len(entered)].argmax(-1), entered)
            if batch.round[row]:
                assert context.previous is not None and int(
                    context.previous.batch.length[row]
                ) == int(batch.length[row])
        state.copy_(torch.where(batch.done, state, batch.length - 1))
        return self.inner.propose(context, None, noise, draft_len)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("waves", [(1, 7), (1, 1, 1, 5), (2, 9), (1, 8, 8)])
def test_rows_open_as_requests_come(waves: tuple[int, ...], verifier: str) -> None:
    table, queue = TableTarget.random(5, seed=3), requests(sum(waves), 5)
    queue = [
        Request(r.prompt, replace(r.params, max_tokens=6 + r.params.max_tokens), r.seed)
        for r in queue
    ]
    parts, rest = [], list(queue)
    for n in waves:
        parts.append([rest.pop(0) for _ in range(n)])
    watched = Watched(table)
    drafter = Entered(TableDrafter(5))
    options: dict[str, Any] = {
        "verifier": VERIFIERS[verifier],
        "draft_len": 3,
        "rows": 8,
        "slots": 40,
    }
    texts = {}
    for turn in engine.serve(watched, drafter, arriving(parts), **options):
        texts |= {request: ids[prompt:].tolist() for request, ids, prompt in turn.finished()}
    assert watched.most > waves[0] and watched.most <= 8 and not watched.busy
    assert texts == served(table, TableDrafter(5), queue, verifier, rows=1)[0]


def test_a_stream_that_begins_with_one_request_is_not_served_one_at_a_time() -> None:
    """One, nothing yet, and seven more: all of them run together from then on."""
    table = TableTarget.random(5, seed=3)
    queue = [Request([i % 5], SamplingParams(max_tokens=6), i) for i in range(8)]
    turns = list(
        engine.serve(
            table,
            NoDrafter(),
            arriving([queue[:1], queue[1:]]),
            verifier=VERIFIERS["match"],
            draft_len=0,
            slots=7,
        )
    )
    assert len(turns) == 1 + 6


def test_a_burst_after_the_last_row_ended_opens_rows_too() -> None:
    table = TableTarget.random(5, seed=3)
    queue = [Request([i % 5], SamplingParams(max_tokens=2), i) for i in range(8)]
    options: dict[str, Any] = {"verifier": VERIFIERS["match"], "draft_len": 0, "slots": 7}
    assert (
        len(list(engine.serve(table, NoDrafter(), arriving([queue[:1], queue[1:]], 2), **options)))
        == 2 + 2
    )
    # nothing runs and nothing waits: the stream is over, as it says
    assert (
        len(list(engine.serve(table, NoDrafter(), arriving([queue[:1], queue[1:]], 3), **options)))
        == 2
    )


class Failing(Drafter[None]):
    """Raises for the rows of seed 0; counts how often it is called."""

    draft_len = 3

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        self.calls += 1
        if bool(((context.batch.seed == 0) & ~context.batch.done).any()):
            raise ValueError("no")
        return TableDrafter(5).propose(context, None, noise, draft_len)


def test_a_drafter_that_broke_stays_disabled_when_rows_are_opened() -> None:
    table, drafter = TableTarget.random(5, seed=3), Failing()
    queue = [Request([i % 5], SamplingParams(max_tokens=6), i) for i in range(2)]
    with pytest.warns(RuntimeWarning, match="the drafter Failing raised ValueError") as caught:
        turns = list(
            engine.serve(
                table,
                drafter,
                arriving([queue[:1], queue[1:]]),
                verifier=VERIFIERS["match"],
                draft_len=3,
                slots=7,
            )
        )
    assert len(caught) == 1 and all(turn.round.disabled[0] for turn in turns)


class Released(Watched):
    """Raises after `rounds` rounds."""

    def __init__(self, inner: Target[Any], rounds: int = 10**6) -> None:
        super().__init__(inner)
        self.rounds = rounds

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        if len(self.scored) == self.rounds:
            raise torch.OutOfMemoryError("the device is full")
        return super().score(cache, batch, draft)


class Counting(TableDrafter):
    """Knows which rows it serves."""

    def __init__(self) -> None:
        super().__init__(5)
        self.held: set[int] = set()

    def admit(self, state: None, context: Context, rows: Tensor) -> None:
        self.held |= set(rows.tolist())

    def release(self, state: None, rows: Tensor) -> None:
        self.held -= set(rows.tolist())


@pytest.mark.parametrize("end", ["abandoned", "raises", "thrown"])
def test_rows_are_released_whatever_ends_the_stream(end: str) -> None:
    target = Released(TableTarget.random(5, seed=3), 2 if end == "raises" else 10**6)
    drafter, queue = Counting(), requests(6, 5)
    turns = engine.serve(target, drafter, queue, verifier=VERIFIERS["token"], draft_len=3, rows=3)
    next(turns)
    assert target.busy and drafter.held == target.busy
    if end == "abandoned":
        turns.close()  # type: ignore[attr-defined]
    elif end == "raises":
        with pytest.raises(torch.OutOfMemoryError):
            list(turns)
    else:
        with pytest.raises(KeyError):
            turns.throw(KeyError("the reader's own"))  # type: ignore[attr-defined]
    assert not target.busy and not drafter.held


@pytest.mark.parametrize("end", ["abandoned", "raises", "read"])
def test_decode_releases_its_rows_too(end: str) -> None:
    target = Released(TableTarget.random(5, seed=3), 2 if end == "raises" else 10**6)
    drafter = Counting()
    rounds = decode.decode(target, drafter, tiny.batch_of([[1], [2, 3]]), draft_len=3)
    next(rounds)
    assert target.busy == drafter.held == {0, 1}
    if end == "abandoned":
        rounds.close()  # type: ignore[attr-defined]
    elif end == "raises":
        with pytest.raises(torch.OutOfMemoryError):
            list(rounds)
    else:
        list(rounds)
    assert not target.busy and not drafter.held


def test_a_request_past_the_targets_positions_is_refused(drafter: Drafter[Any]) -> None:
    """Its tokens would be scored at positions that are not theirs."""
    target = tiny.target("gpt2", positions=32)
    fits, long = (
        Request([1] * 20, SamplingParams(max_tokens=12), 0),
        Request([1] * 20, SamplingParams(max_tokens=13), 0),
    )
    assert len(served(target, NoDrafter(), [fits], draft_len=0)[0][0]) == 12
    with pytest.raises(
        UsageError, match=r"request 1 may reach 20 \+ 13 tokens, but the target has 32 positions"
    ):
        served(target, NoDrafter(), [fits, long], draft_len=0)
    with pytest.raises(UsageError, match=r"request 0 may reach 20 \+ 13 tokens"):
        list(
            engine.serve(
                target,
                NoDrafter(),
                iter([long]),
                verifier=VERIFIERS["token"],
                draft_len=0,
                slots=64,
            )
        )
    batch = Batch.of([long.prompt], [long.params], [0])
    with pytest.raises(
        UsageError, match="a row may reach 33 tokens, but the target has 32 positions"
    ):
        list(decode.decode(target, NoDrafter(), batch))
    with pytest.raises(UsageError, match="a row may reach 33 tokens"):
        decode.start(target, NoDrafter(), batch, slots=64)


def test_a_row_that_was_opened_late_holds_nothing_that_a_prompt_could_take_over() -> None:
    """Every position counts in this target's logits; the new prompt begins as a running text."""
    target = StaleTarget(TableTarget.random(5, seed=3).table, sums=True)
    first = [
        Request([1, 2], SamplingParams(max_tokens=20), 0),
        Request([3, 4, 2, 2, 1], SamplingParams(max_tokens=20), 1),
    ]
    late = Request([3, 4, 2, 2, 1, 0], SamplingParams(max_tokens=9), 2)
    options: dict[str, Any] = {
        "verifier": VERIFIERS["match"],
        "draft_len": 3,
        "rows": 8,
        "slots": 40,
    }
    texts, reused = {}, []
    for turn in engine.serve(target, TableDrafter(5), arriving([first, [late]]), **options):
        texts |= {request: ids[prompt:].tolist() for request, ids, prompt in turn.finished()}
        reused += [slot.reused for slot in turn.slots if slot is not None]
    assert texts == served(target, TableDrafter(5), [*first, late], "match", rows=1)[0]
    assert reused and not any(reused)


def test_a_drafter_that_reads_features_gets_those_of_the_whole_prompt(target: Target[Any]) -> None:
    """A row that holds the beginning of a prompt is not taken over: its features are gone."""
    shared = [5, 6, 7, 8, 9, 10]
    queue = [Request([*shared, i], SamplingParams(max_tokens=4), i) for i in range(6)]
    plain, tapped = Watched(target), Watched(target)
    texts = served(plain, TableDrafter(tiny.VOCAB), queue, "match", rows=1)[0]
    assert sum(plain.prefix_lengths) > 0  # so there is something to take over
    drafter = Sized(TableDrafter(tiny.VOCAB))
    assert served(tapped, drafter, queue, "match", rows=1)[0] == texts
    assert tapped.prefix_lengths == [0] * 6
    assert drafter.sizes == [len(shared)] * 6


class Sized(Drafter[None]):
    """`inner`, and how many features it got as each request joined."""

    taps = (0,)
    draft_len = 3

    def __init__(self, inner: Drafter[Any]) -> None:
        self.inner = inner
        self.sizes: list[int] = []

    def admit(self, state: None, context: Context, rows: Tensor) -> None:
        assert context.features is not None and context.features.shape[1] >= int(
            context.feature_size[rows].max()
        )
        self.sizes += context.feature_size[rows].tolist()

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return self.inner.propose(context, None, noise, draft_len)


def test_steps_are_snapshots() -> None:
    """They can be read after later steps have moved the rows on."""
    table = TableTarget.random(5, seed=3)
    queue = requests(7, 5)
    options: dict[str, Any] = {"verifier": VERIFIERS["match"], "draft_len": 3, "rows": 2}
    steps = engine.serve(table, TableDrafter(5), queue, **options)
    live = [(step.outputs(), [r for r, _, _ in step.finished()]) for step in steps]
    steps = list(engine.serve(table, TableDrafter(5), queue, **options))
    late = [(step.outputs(), [r for r, _, _ in step.finished()]) for step in steps]

    def plain(outputs: list[RequestOutput]) -> list[RequestOutput]:
        return [replace(output, seconds={}) for output in outputs]

    assert [(plain(o), f) for o, f in live] == [(plain(o), f) for o, f in late]
    assert {slot.index for step in steps for slot in step.slots if slot} == set(range(7))


def test_a_sequence_is_checked_before_it_is_served() -> None:
    table = TableTarget.random(5, seed=3)
    options: dict[str, Any] = {"verifier": VERIFIERS["match"], "draft_len": 0}
    with pytest.raises(UsageError, match="prompt 1 holds no tokens") as caught:
        engine.serve(
            table, NoDrafter(), [*requests(1, 5), Request([], SamplingParams(), 0)], **options
        )
    assert caught.value.param == "prompt"


def test_prompts_of_like_length_are_read_together() -> None:
    assert list(alike([5, 3, 4], 20)) == [[0, 1, 2]]
    assert list(alike([3, 90, 4, 2], 12)) == [[0, 2, 3], [1]]
    assert list(alike([7, 7, 7], 14)) == [[0, 1], [2]]
    assert list(alike([], 8)) == []


def test_reading_prompts_in_several_passes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny.target("llama")
    prompts = [list(range(1, 2 + 5 * i)) for i in range(6)]
    requests = [Request(p, SamplingParams(max_tokens=8), i) for i, p in enumerate(prompts)]

    def answers() -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        steps = engine.run(
            target, NGramDrafter(target.info), requests, verifier=match, draft_len=2, rows=4
        )
        for output in steps:
            tokens.setdefault(output.request, []).extend(output.tokens)
        return tokens

    together = answers()
    monkeypatch.setattr(rows, "PASS_TOKENS", 8)
    assert answers() == together
