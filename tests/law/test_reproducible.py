"""L4: the same seed gives the same tokens, bit for bit, whatever shares the batch.

Under `match` they are the same for every drafter.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from samples import PAIRS, causal_drafter

from doubles import AnyOrder, PointMasses, StaleTarget, ToyDenoiser, ToyScorer
from specdiff import decode, engine
from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.engine import Request
from specdiff.noise import Noise, row_seed
from specdiff.targets.base import Target
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, SamplingParams
from specdiff.verify import VERIFIERS

V = 6
TARGET = TableTarget.random(V, seed=1)
DENOISER = ToyDenoiser(V, seed=2)
DRAFTERS: dict[str, Drafter[Any]] = {
    "none": NoDrafter(),
    "one-shot": DenoisingDrafter(DENOISER),
    "left-to-right": DenoisingDrafter(DENOISER, steps=2),
    "point": PointMasses(V),
    "autoregressive": causal_drafter(TARGET.info, seed=3),
    "ngram": NGramDrafter(TARGET.info, longest=2),
    "hot": DenoisingDrafter(DENOISER, steps=2, hot_start=0.5),
    "hot canvas": DenoisingDrafter(DENOISER, steps=2, hot_start="canvas"),
    "any": AnyOrderDrafter(ToyScorer(Absorbing(V), Loglinear(), seed=7), steps=2),
    "any of the uniform process": AnyOrderDrafter(
        ToyScorer(Uniform(V), Geometric(1e-3, 5.0), seed=8), steps=2, sampler="euler"
    ),
}
ASKED = [
    SamplingParams(max_tokens=9),
    SamplingParams(max_tokens=17, temperature=0.7, stop_token_ids=(3,)),
    SamplingParams(max_tokens=6, top_k=2),
    SamplingParams(max_tokens=13, top_p=0.7, stop_token_ids=(0, 5)),
    SamplingParams(max_tokens=1, min_p=0.2),
    SamplingParams(max_tokens=11, temperature=0),
    SamplingParams(max_tokens=20, temperature=1.3, top_k=4, top_p=0.9, min_p=0.05),
    SamplingParams(
        max_tokens=14,
        repetition_penalty=1.7,
        frequency_penalty=0.8,
        logit_bias=((2, 1.0),),
        allowed_token_ids=(0, 1, 2, 4),
    ),
]
PROMPTS = [[1], [2, 4], [0, 0, 5], [3, 1, 4, 1, 5]]
REQUESTS = [Request(PROMPTS[i % 4], ASKED[i % len(ASKED)], row_seed(11, i)) for i in range(21)]
Texts = list[list[int]]
pairs = pytest.mark.parametrize(("drafter", "verifier"), PAIRS)


def decoded(
    requests: Sequence[Request],
    drafter: Drafter[Any],
    verifier: str,
    draft_len: int | None = None,
    target: Target[Any] = TARGET,
) -> Texts:
    """The texts of one batch through `decode`."""
    batch = Batch.of(
        [r.prompt for r in requests], [r.params for r in requests], [r.seed for r in requests]
    )
    for last in decode.decode(
        target, drafter, batch, verifier=VERIFIERS[verifier], draft_len=draft_len
    ):
        batch = last.batch
    return [
        batch.ids[r, batch.prompt_length[r] : batch.length[r]].tolist()
        for r in range(len(requests))
    ]


def served(
    requests: Sequence[Request],
    drafter: Drafter[Any],
    verifier: str,
    rows: int,
    target: Target[Any] = TARGET,
) -> Texts:
    """The texts put together from the engine's stream."""
    answers = defaultdict(list)
    for progress in engine.run(
        target,
        drafter,
        requests,
        verifier=VERIFIERS[verifier],
        draft_len=drafter.draft_len,
        rows=rows,
    ):
        answers[progress.request] += progress.tokens
    return [answers[i] for i in range(len(requests))]


@cache
def alone(drafter: str, verifier: str) -> Texts:
    """Each request in a batch of its own."""
    return [decoded([request], DRAFTERS[drafter], verifier)[0] for request in REQUESTS]


@pairs
def test_in_one_batch(drafter: str, verifier: str) -> None:
    assert decoded(REQUESTS, DRAFTERS[drafter], verifier) == alone(drafter, verifier)


@pairs
def test_in_another_order(drafter: str, verifier: str) -> None:
    order = torch.randperm(len(REQUESTS), generator=torch.Generator().manual_seed(0)).tolist()
    answers = decoded([REQUESTS[i] for i in order], DRAFTERS[drafter], verifier)
    assert answers == [alone(drafter, verifier)[i] for i in order]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pairs
def test_through_the_engine(drafter: str, verifier: str, rows: int) -> None:
    assert served(REQUESTS, DRAFTERS[drafter], verifier, rows) == alone(drafter, verifier)


def arriving() -> Iterator[Request | None]:
    """The first runs long; a few come with it, then one a round, while there are free rows."""
    yield Request([2], SamplingParams(max_tokens=120), 77)
    yield from REQUESTS[:3]
    for request in REQUESTS[3:]:
        yield from (None, request)


@pairs
def test_while_others_leave_early_and_join_late(drafter: str, verifier: str) -> None:
    """Every fourth request is cancelled after its second round.

    Its tokens so far are unchanged, and so are those of all others.
    """
    answers = defaultdict[int, list[int]](list)
    rounds = defaultdict[int, int](int)
    inner = DRAFTERS[drafter]
    for turn in engine.serve(
        TARGET,
        inner,
        arriving(),
        verifier=VERIFIERS[verifier],
        draft_len=inner.draft_len,
        rows=4,
        slots=122,
    ):
        for progress in turn.outputs():
            answers[progress.request - 1] += progress.tokens
            rounds[progress.request] += 1
            if progress.request % 4 == 2 and rounds[progress.request] == 2:
                turn.cancel(progress.request)
    whole = alone(drafter, verifier)
    assert any(len(answers[i]) < len(text) for i, text in enumerate(whole))
    for i, text in enumerate(whole):
        assert answers[i] == (text[: len(answers[i])] if i % 4 == 1 else text), i


SUMS = StaleTarget(TARGET.table, sums=True)  # every slot of its cache matters


@cache
def continued(drafter: str, verifier: str, rows: int) -> tuple[list[Request], Texts]:
    """`rows` requests, then as many whose prompts begin with most of their texts, and so on.

    They come in the order in which those end. Also all texts, each from a batch of its own.
    """
    requests = []
    texts = []
    for first in range(0, 6, rows):
        group = sorted(REQUESTS[first : first + rows], key=lambda r: r.params.max_tokens)
        wholes = [
            [*r.prompt, *decoded([r], DRAFTERS[drafter], verifier, target=SUMS)[0]] for r in group
        ]
        later = [
            replace(r, prompt=[*w[: len(w) - i], i], seed=r.seed + 1)
            for i, (r, w) in enumerate(zip(group, wholes, strict=True))
        ]
        requests += [*group, *later]
        texts += [whole[len(r.prompt) :] for r, whole in zip(group, wholes, strict=True)]
        texts += [
            decoded([request], DRAFTERS[drafter], verifier, target=SUMS)[0] for request in later
        ]
    return requests, texts


@pytest.mark.parametrize("rows", [1, 3])
@pairs
def test_prompts_taken_from_what_a_row_held(drafter: str, verifier: str, rows: int) -> None:
    requests, texts = continued(drafter, verifier, rows)
    assert served(requests, DRAFTERS[drafter], verifier, rows, SUMS) == texts


@pytest.mark.parametrize("rows", [1, 3])
def test_a_position_too_many_would_show(rows: int) -> None:
    """Planted: a joining row takes over one more than it held."""
    requests, texts = continued("one-shot", "block", rows)
    assert (
        served(
            requests,
            DRAFTERS["one-shot"],
            "block",
            rows,
            StaleTarget(TARGET.table, sums=True, beyond=1),
        )
        != texts
    )


@pairs
def test_by_hand_without_admission(drafter: str, verifier: str) -> None:
    """One-token prompts leave nothing to admit: the Monte Carlo shortcut changes no token."""
    requests = [replace(request, prompt=[i % V]) for i, request in enumerate(REQUESTS)]
    batch = Batch.of(
        [r.prompt for r in requests], [r.params for r in requests], [r.seed for r in requests]
    )
    run = decode.start(TARGET, DRAFTERS[drafter], batch, verifier=VERIFIERS[verifier])
    while not bool(run.batch.done.all()):
        decode.step(run, DRAFTERS[drafter].draft_len)
    answers = [run.batch.ids[r, 1 : run.batch.length[r]].tolist() for r in range(len(requests))]
    assert answers == decoded(requests, DRAFTERS[drafter], verifier)


@pairs
def test_streamed_round_by_round(drafter: str, verifier: str) -> None:
    """The rounds' emitted tokens in order are the text; what was committed never changes."""
    batch = Batch.of(
        [r.prompt for r in REQUESTS], [r.params for r in REQUESTS], [r.seed for r in REQUESTS]
    )
    streamed: Texts = [[] for _ in REQUESTS]
    for done in decode.decode(TARGET, DRAFTERS[drafter], batch, verifier=VERIFIERS[verifier]):
        settled = torch.arange(batch.ids.shape[1]) < batch.length[:, None]
        assert torch.equal(done.batch.ids[settled], batch.ids[settled])
        assert torch.equal(done.batch.length - batch.length, done.emitted)
        batch = done.batch
        for text, tokens, emitted in zip(
            streamed, done.verification.tokens.tolist(), done.emitted.tolist(), strict=True
        ):
            text += tokens[:emitted]
    assert streamed == alone(drafter, verifier)


@pytest.mark.parametrize("verifier", ["match", "match-gumbel"])
def test_matching_gives_one_text_whatever_drafts(verifier: str) -> None:
    expected = alone("none", verifier)
    for drafter in [
        *DRAFTERS.values(),
        AnyOrder(DENOISER),
        DenoisingDrafter(DENOISER, steps=3, draft_temperature=0),
    ]:
        if drafter.draft_len:
            for draft_len in (1, 2, 3, 5):
                assert decoded(REQUESTS, drafter, verifier, draft_len) == expected


@pytest.mark.parametrize("verifier", ["match", "match-gumbel"])
def test_matching_gives_one_text_whatever_the_draft_length_of_each_round(verifier: str) -> None:
    lengths = cycle([2, 0, 4, 1])
    batch = Batch.of(
        [r.prompt for r in REQUESTS], [r.params for r in REQUESTS], [r.seed for r in REQUESTS]
    )
    for done in decode.decode(
        TARGET,
        DRAFTERS["one-shot"],
        batch,
        verifier=VERIFIERS[verifier],
        draft_len=lambda _: next(lengths),
    ):
        batch = done.batch
    texts = [
        batch.ids[r, batch.prompt_length[r] : batch.length[r]].tolist()
        for r in range(len(REQUESTS))
    ]
    assert texts == alone("none", verifier)


def test_the_ratio_tests_promise_no_such_thing() -> None:
    """So the two tests above say something."""
    for verifier in ("token", "block"):
        assert alone("one-shot", verifier) != alone("none", verifier)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_greedy_is_one_text_under_every_verifier(verifier: str) -> None:
    requests = [
        replace(request, params=SamplingParams(max_tokens=15, temperature=0))
        for request in REQUESTS
    ]
    expected = decoded(requests, NoDrafter(), "token")
    assert [decoded(requests, drafter, verifier) for drafter in DRAFTERS.values()] == [
        expected
    ] * len(DRAFTERS)


@pairs
def test_another_seed_gives_another_text(drafter: str, verifier: str) -> None:
    requests = [
        Request([1], SamplingParams(max_tokens=30), seed)
        for seed in (0, 1, -1, 1 << 63, (1 << 64) - 2, 1 << 32)
    ]
    texts = decoded(requests, DRAFTERS[drafter], verifier)
    assert len({tuple(text) for text in texts}) == len(requests)


def test_a_seed_is_its_64_bits() -> None:
    pairs_ = [(0, 1 << 64), (-1, (1 << 64) - 1), (1 << 63, -(1 << 63))]
    for one, two in pairs_:
        texts = [
            decoded(
                [Request([1], SamplingParams(max_tokens=30), seed)], DRAFTERS["one-shot"], "block"
            )
            for seed in (one, two)
        ]
        assert texts[0] == texts[1]


def test_randomness_that_depends_on_the_row_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: noise keyed by the row's place in the batch as well."""

    def of(batch: Batch) -> Noise:
        return Noise(batch.seed + torch.arange(len(batch.seed)), batch.round, batch.length)

    expected = alone("one-shot", "block")
    monkeypatch.setattr(Noise, "of", of)
    assert decoded(REQUESTS, DRAFTERS["one-shot"], "block") != expected
    assert served(REQUESTS, DRAFTERS["one-shot"], "block", rows=3) != expected


def test_matching_with_draws_keyed_by_round_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the target's own draws depend on the round, so the text depends on who drafts."""
    expected = alone("none", "match")

    def of(batch: Batch) -> Noise:
        return Noise(batch.seed + batch.round, batch.round, batch.length)

    monkeypatch.setattr(Noise, "of", of)
    assert decoded(REQUESTS, DRAFTERS["one-shot"], "match") != decoded(
        REQUESTS, NoDrafter(), "match"
    )
    monkeypatch.undo()
    assert decoded(REQUESTS, DRAFTERS["one-shot"], "match") == expected


def test_ties_under_top_p_do_not_feel_the_neighbours() -> None:
    """A flat row in the batch sends every row through the exact fallback.

    Equal tokens must not swap because of that.
    """
    logits = torch.zeros(7, 7, 7, dtype=torch.float64)
    logits[..., 2] = 2
    logits[:, 0] = 0  # after token 0 the law is flat
    target = TableTarget(logits)
    params = SamplingParams(max_tokens=1, top_p=0.7)
    seeds = range(40)

    def first(prompts: list[list[int]]) -> list[int]:
        batch = Batch.of(prompts, [params] * len(prompts), [*seeds, 0][: len(prompts)])
        (done,) = decode.decode(target, NoDrafter(), batch)
        return done.batch.ids[:, 1][:40].tolist()

    assert first([[1]] * 40) == first([[1]] * 40 + [[0]])
