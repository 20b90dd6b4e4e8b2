"""Records of rounds in a stream, and draft lengths by request: over a socket, with a target."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
from running import running

from specdiff import SpeculativeLM
from specdiff.serve.app import build
from specdiff.serve.live import LiveEngine
from specdiff.verify import token
from test_lm import lm, target, tokenizer  # noqa: F401

BODY: dict[str, Any] = {"prompt": "the rain", "max_tokens": 24, "seed": 3, "stream": True}
ROUNDS = {"include_rounds": True, "include_usage": True}


@pytest.fixture(scope="module")
def url(lm: SpeculativeLM) -> Iterator[str]:
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=lm.max_len)
    with running(build(lm, engine, name="tiny")) as address:
        yield address


def stream(url: str, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{url}/v1/{path}", json={**BODY, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def records(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for event in events for choice in event["choices"] for one in choice["rounds"]]


def test_the_rounds_add_up_to_the_answer(lm: SpeculativeLM, url: str) -> None:
    want = lm.generate("the rain", raw=True, max_tokens=24, seed=3, draft_len=3)
    events = stream(url, stream_options=ROUNDS)
    rounds = records(events)
    assert [one["id"] for r in rounds for one in r["tokens"]] == want.token_ids
    assert "".join(piece["text"] for r in rounds for piece in r["text"]) == want.text
    for event in events:
        for choice in event["choices"]:
            pieces = [piece["text"] for r in choice["rounds"] for piece in r["text"]]
            assert "".join(pieces) == choice["text"]
    for one in rounds:
        n = one["accepted"]
        assert one["draft"][:n] == one["tokens"][:n]
        assert set(one["seconds"]) == {"draft", "score", "verify", "commit"}
    figures = events[-1]["metrics"]["speculative_decoding"]
    assert figures["num_draft_tokens"] == sum(len(one["draft"]) for one in rounds) > 0
    assert figures["num_accepted_draft_tokens"] == sum(one["accepted"] for one in rounds)
    assert figures["num_spec_steps"] == len(rounds)


def test_chat_has_them_too_and_a_stop_string_cuts_them(url: str) -> None:
    messages = [{"role": "user", "content": "the rain"}]
    chat = {"prompt": None, "messages": messages, "stream_options": ROUNDS}
    events = stream(url, "chat/completions", **chat)
    text = "".join(c["delta"]["content"] for e in events for c in e["choices"])
    assert text == "".join(piece["text"] for r in records(events) for piece in r["text"])
    stop = text[3:5]
    events = stream(url, "chat/completions", stop=stop, **chat)
    rounds = records(events)
    short = "".join(piece["text"] for r in rounds for piece in r["text"])
    assert short == text[: text.index(stop)]
    assert sum(len(r["tokens"]) for r in rounds) == events[-1]["usage"]["completion_tokens"]


def test_there_are_none_without_the_option(url: str) -> None:
    for event in stream(url):
        assert all("rounds" not in choice for choice in event["choices"])


def test_a_draft_length_of_0_is_plain_decoding(lm: SpeculativeLM, url: str) -> None:
    plain = SpeculativeLM(lm.target, "none", lm.tokenizer, max_len=128)
    want = plain.generate("the rain", raw=True, max_tokens=24, seed=3)
    events = stream(url, draft_len=0, stream_options=ROUNDS)
    rounds = records(events)
    assert [one["id"] for r in rounds for one in r["tokens"]] == want.token_ids
    assert all(one["draft"] == [] and len(one["tokens"]) == 1 for one in rounds)
    assert events[-1]["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


def test_a_draft_length_gives_the_tokens_of_the_library(lm: SpeculativeLM, url: str) -> None:
    want = lm.generate("the rain", raw=True, max_tokens=24, seed=3, draft_len=2)
    rounds = records(stream(url, draft_len=2, stream_options=ROUNDS))
    assert [one["id"] for r in rounds for one in r["tokens"]] == want.token_ids
    assert max(len(one["draft"]) for one in rounds) == 2


@pytest.mark.parametrize("length", [-1, 4, "two", 1.5])
def test_a_bad_draft_length_is_refused_by_name(url: str, length: Any) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={**BODY, "draft_len": length})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "draft_len"


def test_rounds_need_a_stream(url: str) -> None:
    body = {**BODY, "stream": False, "stream_options": ROUNDS}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"


def test_the_model_says_what_it_takes(url: str) -> None:
    entry = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert entry["max_draft_len"] == 3
    assert entry["has_chat_template"] is True
    assert entry["sampling_defaults"] == {}
