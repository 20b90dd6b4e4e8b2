"""Measurements of a run, and transformers samples the same distribution as our engine."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny
from specdiff import decode, stats
from specdiff.bench.baselines import OurDecoder, TransformersDecoder
from specdiff.bench.settings import Cell
from specdiff.bench.timing import RoundTimer, Workload
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.types import Batch, SamplingParams


def workload(
    prompts: list[list[int]], limit: int, temperature: float = 0.0, stops: tuple[int, ...] = ()
) -> Workload:
    rows = tuple(tuple(p) for p in prompts)
    return Workload(rows, (limit,) * len(rows), temperature, stops, tuple(range(len(rows))))


def cell(
    baseline: str, draft_len: int | None = None, temperature: float = 0.0, batch: int = 1
) -> Cell:
    return Cell("main", baseline, draft_len, None, "token", temperature, batch)


def hinted(target: Any, prompts: list[list[int]], new: int) -> Drafter[Any]:
    return tiny.Hinted([tiny.plain(tiny.model("llama"), p, new) for p in prompts], tiny.VOCAB)


def test_a_run_is_the_fold_of_its_rounds() -> None:
    target, prompts = tiny.target("llama"), tiny.prompts(3)
    drafter = hinted(target, prompts, 24)
    run = OurDecoder(target, lambda options: drafter).run(
        cell("x", 4, batch=3), workload(prompts, 24)
    )
    params = [SamplingParams(max_tokens=24, temperature=0)] * 3
    rounds = list(decode.decode(target, drafter, Batch.of(prompts, params, range(3)), draft_len=4))
    assert [p + t for p, t in zip(prompts, run.tokens, strict=True)] == tiny.rows_of(
        rounds[-1].batch
    )
    rows = stats.fold(rounds)
    assert run.counts is not None and run.from_draft is not None
    for name in ("rounds", "tokens", "drafted", "accepted"):
        assert getattr(run.counts, name) == sum(getattr(r, name) for r in rows), name
    assert run.counts.reached == [sum(n) for n in zip(*(r.reached for r in rows), strict=True)]
    assert [sum(row) for row in run.from_draft] == [r.accepted for r in rows] and sum(
        r.accepted for r in rows
    ) > 20
    assert run.first_tokens == int(rounds[0].emitted.sum()) and run.size == 72
    seconds = run.counts.seconds
    assert sum(seconds.values()) == pytest.approx(run.seconds) and min(seconds.values()) >= 0
    assert run.medians is not None and run.medians.draft_round and run.medians.plain_round is None


def test_rounds_in_a_loop_are_not_fresh() -> None:
    """A target that repeats one token forever: the first repeated 8-gram is complete with its ninth
    token."""
    target = tiny.target("llama")
    head = target.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()  # all logits equal: greedy takes the first id each time
    watch = RoundTimer(torch.device("cpu"))
    params = [SamplingParams(max_tokens=20, temperature=0)]
    for r in decode.decode(
        target,
        tiny.Hinted([[0] * 40], tiny.VOCAB, flaw=99),
        Batch.of([[0, 0]], params, [0]),
        draft_len=2,
    ):
        watch.add(r)
    run = watch.measurement(1)
    assert run.tokens == [[0] * 20]
    assert (run.fresh_tokens, run.fresh_rounds) == (
        6,
        2,
    )  # rounds of three; the third one ends after the eighth token


def test_transformers_samples_the_whole_distribution_whatever_the_models_defaults() -> None:
    model = tiny.model("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.1, min_p=0.9, repetition_penalty=50.0
    )
    theirs = TransformersDecoder(model, "hf")
    drawn = theirs.run(
        cell("hf", temperature=100.0, batch=300), workload([[1, 2, 3]] * 300, 1, temperature=100.0)
    )
    assert len({row[0] for row in drawn.tokens}) > 40  # of 48, all but equally likely
    prompts = tiny.prompts(2)
    greedy = theirs.run(cell("hf", batch=2), workload(prompts, 12))
    plain = OurDecoder(tiny.target("llama"), lambda options: NoDrafter()).run(
        cell("ours-vanilla", batch=2), workload(prompts, 12)
    )
    assert greedy.tokens == plain.tokens


@pytest.mark.parametrize(
    ("kind", "draft_len"), [("hf", None), ("hf-prompt-lookup", 3), ("hf-assisted", None)]
)
def test_transformers_ways_end_where_ours_does_and_report_their_first_token(
    kind: str, draft_len: int | None
) -> None:
    (prompt,) = tiny.prompts(1)
    known = tiny.plain(tiny.model("llama"), prompt, 16)[len(prompt) :]
    stop = known[7]
    end = known.index(stop) + 1
    theirs = TransformersDecoder(
        tiny.model("llama"), kind, tiny.model("llama", seed=1) if kind == "hf-assisted" else None
    )
    run = theirs.run(cell(kind, draft_len), workload([prompt], 16, stops=(stop,)))
    assert run.tokens == [known[:end]]
    assert 0 < run.first_seconds < run.seconds and 1 <= run.first_tokens < end
