"""Streams of a fixed number of tokens in each event: the pattern of acceptance does not show."""

import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
from running import running
from typer.testing import CliRunner

from specdiff import SpeculativeLM
from specdiff.cli import app
from specdiff.serve.app import build
from specdiff.serve.choices import Pieces
from specdiff.serve.live import LiveEngine
from specdiff.text.generation import Chunk, Generation
from specdiff.verify import token
from test_lm import END, scripted, tokenizer  # noqa: F401

ANSWER = "the rain in spain falls mainly on the plain 🦊 日本, naïve"
BODY: dict[str, Any] = {"prompt": "the", "stream": True, "temperature": 0, "logprobs": 0}


def events(lm: SpeculativeLM, chunk: int | None, **fields: Any) -> list[dict[str, Any]]:
    engine = LiveEngine(lm.target, lm.drafter, token, lm.drafter.draft_len, max_len=lm.max_len)
    with running(build(lm, engine, name="tiny", stream_chunk=chunk)) as url:
        answer = httpx.post(f"{url}/v1/completions", json={**BODY, **fields}, timeout=60)
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


def sizes(entries: list[dict[str, Any]]) -> list[int]:
    return [len(entry["logprobs"]["tokens"]) for entry in entries]


def test_events_have_the_same_tokens_whatever_is_accepted(tokenizer: Any) -> None:
    prompt = tokenizer("the")["input_ids"]
    ids = [*tokenizer(ANSWER)["input_ids"], END]
    lms = [scripted(tokenizer, prompt, ids, flaw) for flaw in (2, 3, 1000)]
    by_round = [events(lm, None, max_tokens=200) for lm in lms]
    assert sizes(by_round[0]) != sizes(by_round[2])  # it shows
    fixed = [events(lm, 4, max_tokens=200) for lm in lms]
    assert fixed[0] == fixed[1] == fixed[2]
    for entries in fixed:
        assert "".join(entry["text"] for entry in entries) == ANSWER
        assert [e["finish_reason"] for e in entries] == [None] * (len(entries) - 1) + ["stop"]
        assert sum(sizes(entries)) == len(ids)
        assert max(sizes(entries)) <= 4 + 4  # an event without text joins the next one


def test_a_stop_string_ends_a_chunk_too(tokenizer: Any) -> None:
    prompt = tokenizer("the")["input_ids"]
    lm = scripted(tokenizer, prompt, tokenizer(ANSWER)["input_ids"], 3)
    entries = events(lm, 4, max_tokens=40, stop="mainly")
    assert "".join(entry["text"] for entry in entries) == ANSWER[: ANSWER.index("mainly")]
    assert entries[-1]["finish_reason"] == "stop"


def test_records_of_rounds_are_refused(tokenizer: Any) -> None:
    lm = scripted(tokenizer, [1], [2, 3])
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=lm.max_len)
    with running(build(lm, engine, name="tiny", stream_chunk=4)) as url:
        body = {**BODY, "stream_options": {"include_rounds": True}}
        answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7])
def test_pieces(size: int | None) -> None:
    """Chunks of several rounds; the text of token 3 comes with token 4."""
    rounds = [[("a", 1), ("b", 2)], [("d", 4)], [("e", 5), ("f", 6), ("g", 7), ("", 7)]]
    pieces = Pieces(size)
    out = []
    for chunks, count in zip(rounds, (3, 4, 7), strict=True):
        parts = [Chunk(text, False, Generation(), at) for text, at in chunks]
        out += [*pieces.add(parts, count, ended=count == 7)]
    assert "".join(piece.text for piece in out) == "abdefg"
    assert [piece.last for piece in out] == [False] * (len(out) - 1) + [True]
    if size is not None:
        assert [p.tokens for p in out] == [*range(size, 8, size), 7]
    else:
        assert [p.tokens for p in out] == [3, 4, 7]


def test_the_command_line_wants_one_token_at_least() -> None:
    result = CliRunner().invoke(app, ["serve", "--stream-chunk", "0"])
    assert "--stream-chunk must be at least 1, not 0" in str(result.exception)
