"""Streams hold the text of the whole answer, in whole characters, whatever the tokens split."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_http import serving
from torch import Tensor

from specdiff import SpeculativeLM
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, TargetInfo, TargetOutput
from test_lm import END, VOCAB, tokenizer  # noqa: F401

MAX_LEN = 512
PIECES = (
    "🦊",
    "👩‍👩‍👧",
    "日本語",
    "naïve",
    "é",
    "e\u0301",
    "👍🏽",
    "🇩🇪",
    "​",
    " ",
    "\n",
    "the rain",
    "\ufeff",
    "ﷺ",
)


class Parrot(Target[None]):
    """A target that answers with its prompt."""

    info = TargetInfo("parrot", VOCAB, 1, 1, 10_000, torch.float32, torch.device("cpu"))

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> None:
        return None

    def admit(
        self, cache: None, rows: Tensor, prompts: Sequence[Tensor], prefix_lengths: Tensor
    ) -> None:
        return None

    def score(self, cache: None, batch: Batch, draft: Draft) -> TargetOutput:
        position = batch.length[:, None] + torch.arange(draft.tokens.shape[1] + 1)
        source = position - batch.prompt_length[:, None]
        tokens = batch.ids.gather(1, source.clamp(max=batch.ids.shape[1] - 1))
        tokens = torch.where(source < batch.prompt_length[:, None], tokens, END)
        return TargetOutput(100.0 * torch.nn.functional.one_hot(tokens, VOCAB))


@pytest.fixture(scope="module")
def client(tokenizer: Any) -> Iterator[httpx.Client]:
    lm = SpeculativeLM(Parrot(), "ngram", tokenizer, MAX_LEN)
    with serving(lm) as server, httpx.Client(base_url=server.url, timeout=60) as one:
        yield one


texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(pieces=["👩‍👩‍👧"] * 6, cut=(3, 4))
@example(pieces=["日本語", "🦊"], cut=None)
@given(
    pieces=texts,
    cut=st.none() | st.tuples(st.integers(0, 30), st.integers(1, 6)),
)
def test_the_pieces_of_a_stream_are_its_text(
    client: httpx.Client, pieces: list[str], cut: tuple[int, int] | None
) -> None:
    text = "".join(pieces)
    if not text or len(text.encode()) > MAX_LEN // 2 - 1:
        return
    stop = None if cut is None else text[cut[0] : sum(cut)] or None
    body: dict[str, Any] = {"prompt": text, "max_tokens": 255, "stop": stop}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    stream = client.post("/v1/completions", json={**body, "stream": True})
    events = [line.removeprefix("data: ") for line in stream.content.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    choices = [json.loads(event)["choices"][0] for event in events[:-2]]
    for choice in choices:
        assert "\ufffd" not in choice["text"] or "\ufffd" in text
        choice["text"].encode()  # no half of a pair
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert whole["text"] == (text if stop is None else text[: text.index(stop)])
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert reasons == [whole["finish_reason"]] == ["stop"]
