"""Echoed prompts and their log probabilities: over a socket, with a target."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
from running import running
from test_live import WAIT, Inbox

from doubles import SICKNESS, Sick
from specdiff import SpeculativeLM, scoring
from specdiff.drafters.base import NoDrafter
from specdiff.engine import EngineStep, Request
from specdiff.scoring import PromptScore, PromptScoring
from specdiff.serve.app import build
from specdiff.serve.live import Job, LiveEngine
from specdiff.targets.base import TargetWrapper
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Draft, SamplingParams, TargetOutput
from specdiff.verify import token
from test_lm import END, lm, target, tokenizer  # noqa: F401

TEXT = "the rain in spain falls mainly on the plain"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE", 5)


@pytest.fixture(scope="module")
def url(lm: SpeculativeLM) -> Iterator[str]:
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_rows=2, max_len=lm.max_len)
    with running(build(lm, engine, name="tiny")) as address:
        yield address


def post(url: str, **fields: Any) -> Any:
    body = {"prompt": TEXT, "echo": True, "temperature": 0, "max_tokens": 3, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def want(lm: SpeculativeLM, prompt: list[int]) -> torch.Tensor:
    """The log-softmax of one forward of the model over the whole prompt."""
    with torch.no_grad():
        logits: torch.Tensor = lm.target.model(torch.tensor([prompt])).logits[0]  # type: ignore[attr-defined]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_a_prompt_has_the_logprobs_of_one_forward(
    lm: SpeculativeLM, url: str, max_tokens: int
) -> None:
    prompt = lm.encode(TEXT, raw=True)
    got = post(url, logprobs=2, max_tokens=max_tokens).json()
    choice = got["choices"][0]
    lists = choice["logprobs"]
    count = len(prompt)
    assert {len(values) for values in lists.values()} == {count + max_tokens}
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    rows = want(lm, prompt)
    exact = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert lists["token_logprobs"][1:count] == pytest.approx(exact, abs=1e-4)
    spell = lm.tokenizer.decode
    for row, top in zip(rows, lists["top_logprobs"][1:count], strict=False):
        best = row.topk(2)
        pairs = [*zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        named = {spell([one]): value for one, value in reversed(pairs)}
        assert top == pytest.approx(named, abs=1e-4)
    assert choice["text"].startswith(TEXT)
    assert lists["tokens"][:count] == [spell([t]) for t in prompt]
    for text, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        if "\ufffd" not in text:
            assert choice["text"][offset:].startswith(text)
    assert got["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"


def test_a_stream_gives_the_same_and_choices_share_the_scores(url: str) -> None:
    fields = {"logprobs": 1, "n": 2, "prompt": [TEXT, "on the plain"]}
    full = post(url, **fields).json()["choices"]
    lines = post(url, stream=True, **fields).text.split("\n\n")
    texts = [""] * 4
    logprobs: list[list[Any]] = [[] for _ in range(4)]
    for line in lines[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
            logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert texts == [choice["text"] for choice in full]
    for values, choice in zip(logprobs, full, strict=True):
        assert values[0] is None
        assert values[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_a_special_token_has_no_text_in_the_echo(lm: SpeculativeLM, url: str) -> None:
    prompt = [END, *lm.encode(TEXT, raw=True)]
    choice = post(url, prompt=prompt, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == TEXT
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    assert choice["logprobs"]["tokens"][0] == "<|end|>"


def test_an_echo_alone_needs_no_round(url: str) -> None:
    for stream in (False, True):
        answer = post(url, max_tokens=0, stream=stream)
        text = answer.text.removeprefix("data: ").partition("\n\n")[0]
        choice = json.loads(text)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    one = post(url, prompt=[7], max_tokens=0, logprobs=1).json()["choices"][0]
    assert one["logprobs"]["token_logprobs"] == [None]


@pytest.mark.parametrize("fields", [{"echo": False}, {"logprobs": 99}])
def test_what_is_refused(url: str, fields: dict[str, Any]) -> None:
    answer = post(url, max_tokens=0, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == ("logprobs" if "logprobs" in fields else "max_tokens")


def test_logits_that_are_nan_fail_the_scores_alone(lm: SpeculativeLM) -> None:
    sick = Sick(lm.target, SICKNESS["all nan"], first=9, seed=0)
    engine = LiveEngine(sick, lm.drafter, token, 3, max_len=lm.max_len)
    with running(build(lm, engine, name="tiny")) as address:
        answer = post(address, logprobs=1)
        assert answer.status_code == 500
        assert "not finite" in answer.json()["error"]["message"]
        assert post(address, seed=3).status_code == 200


class Full(TargetWrapper[Any]):
    """Has memory for rounds, and none for the pieces of a prompt."""

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        if draft.tokens.shape[1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.score(cache, batch, draft)


def test_a_full_memory_fails_the_scores_alone(lm: SpeculativeLM) -> None:
    engine = LiveEngine(Full(lm.target), lm.drafter, token, 3, max_len=lm.max_len)
    with running(build(lm, engine, name="tiny")) as address:
        answer = post(address, logprobs=1)
        assert answer.status_code == 503
        assert "out of memory" in answer.json()["error"]["message"]
        assert post(address).status_code == 200
        assert engine.healthy and not engine.waiting


def test_rounds_go_on_between_the_pieces_of_a_prompt(lm: SpeculativeLM) -> None:
    """Count rounds, not seconds: each piece of the score has one beside it."""
    scored: list[int] = []
    first = Inbox()
    second = Inbox()
    submitted = threading.Event()

    def observe(step: EngineStep) -> None:
        submitted.wait(WAIT)
        scored.append(0 if engine._scoring is None else engine._scoring.start)

    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=128, observe=observe)
    prompt = [*range(10, 50)]
    engine.submit(Job(Request([1, 2], SamplingParams(max_tokens=100), 0), first.put))
    engine.submit(Job(Request(prompt, SamplingParams(max_tokens=2), 0), second.put, scores=1))
    submitted.set()
    assert isinstance(second.get(timeout=WAIT), PromptScore)
    assert len(second.tokens()) == 2
    assert len(first.tokens()) == 100
    starts = sorted({start for start in scored if start})
    assert starts[:8] == [5, 10, 15, 20, 25, 30, 35, 39]
    assert engine.close(WAIT)


def test_a_canceled_job_is_scored_no_further(lm: SpeculativeLM) -> None:
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=128)
    inbox = Inbox()
    jobs = [
        Job(Request([*range(99)], SamplingParams(max_tokens=2), 0), inbox.put, scores=1)
        for _ in range(3)
    ]
    engine.submit(*jobs)
    for job in jobs:
        engine.cancel(job)
    assert engine.waiting == 0
    assert engine.close(WAIT)


def test_pieces_of_any_size_give_the_same(
    lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = lm.encode(TEXT, raw=True)
    scores = []
    for size in (1, 2, 7, 1000):
        monkeypatch.setattr(scoring, "PIECE", size)
        one = PromptScoring(lm.target, prompt, 1)
        while not one.done:
            one.advance()
        scores.append(one.score.logprobs)
    for values in scores:
        assert values == pytest.approx(scores[0], abs=1e-4)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    """A prompt of several pieces is scored to its end."""
    table = TableTarget.random(6, seed=1)
    engine = LiveEngine(table, NoDrafter(), token, 0, max_len=32)
    inbox = Inbox()
    engine.submit(Job(Request([1, 2, 3] * 4, SamplingParams(max_tokens=2), 0), inbox.put, scores=9))
    score = inbox.get(timeout=WAIT)
    assert isinstance(score, PromptScore)
    assert [len(pairs) for pairs in score.top_logprobs] == [6] * 11
    assert engine.close(WAIT)
