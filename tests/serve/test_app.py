# ruff: noqa: E402 (imports follow the check that the extra is installed)
"""The HTTP API, over a socket, with a real target: the official client drives it unmodified."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")
import httpx
import uvicorn
from running import running

from specdiff import SpeculativeLM
from specdiff.drafters.ngram import NGramDrafter
from specdiff.serve.app import build
from specdiff.serve.guard import MAX_BODY
from specdiff.serve.live import LiveEngine
from specdiff.verify import token
from test_lm import lm, target, tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def url(lm: SpeculativeLM) -> Iterator[str]:
    engine = LiveEngine(lm.target, lm.drafter, token, lm.drafter.draft_len, max_len=lm.max_len)
    app = build(lm, engine, name="tiny")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(60)
    assert not engine.healthy


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one:
        yield one


OPTIONS: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "seed": 3}


def test_the_tokens_of_generate(lm: SpeculativeLM, client: Any) -> None:
    want = lm.generate("the rain", raw=True, max_tokens=12, seed=3)
    got = client.completions.create(prompt="the rain", **OPTIONS)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.metrics["speculative_decoding"]["num_draft_tokens"] == want.stats.drafted
    parts = list(client.completions.create(prompt="the rain", stream=True, **OPTIONS))
    assert "".join(part.choices[0].text for part in parts) == want.text


def test_chat_with_choices_logprobs_and_usage(lm: SpeculativeLM, client: Any) -> None:
    messages = [{"role": "user", "content": "the rain <|end|>"}]
    options = {"logprobs": True, "top_logprobs": 2, "n": 2, **OPTIONS}
    got = client.chat.completions.create(messages=messages, **options)
    assert got.choices[0].message.content == lm.chat(messages, max_tokens=12, seed=3).text
    assert len(got.choices) == 2
    assert len(got.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **options
    )
    texts = ["", ""]
    for part in stream:
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in got.choices]
    usages = [u.model_dump(exclude={"prompt_tokens_details"}) for u in (part.usage, got.usage)]
    assert usages[0] == usages[1]  # but for the cached tokens


def test_cached_tokens_are_those_of_an_earlier_request(lm: SpeculativeLM) -> None:
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_rows=2, max_len=lm.max_len)
    prompt = lm.encode("the rain in spain falls mainly", raw=True)
    options = {"stream_options": {"include_usage": True}, **OPTIONS}
    with (
        running(build(lm, engine, name="tiny")) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        usages = [client.completions.create(prompt=prompt, n=2, **OPTIONS).usage for _ in range(2)]
        longer = [*prompt, *lm.encode(" on the plain", raw=True)]
        stream = client.completions.create(prompt=longer, stream=True, **options)
        usages += [part.usage for part in stream if part.usage]
        usages.append(client.completions.create(prompt=[prompt, [7, 8]], **OPTIONS).usage)
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached[:3] == [0, len(prompt) - 1, len(prompt)]
    assert cached[3] == len(prompt) - 1
    assert usages[3].prompt_tokens == len(prompt) + 2


def test_a_stop_string_ends_the_text(lm: SpeculativeLM, client: Any) -> None:
    text = lm.generate("the rain", raw=True, max_tokens=12, seed=3).text
    stop = text[1]
    got = client.completions.create(prompt="the rain", stop=stop, **OPTIONS)
    want = lm.generate("the rain", raw=True, max_tokens=12, seed=3, stop=stop)
    assert got.choices[0].text == want.text == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_structured_output(client: Any) -> None:
    pytest.importorskip("llguidance", reason="the structured extra is not installed")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    messages = [{"role": "user", "content": "the rain"}]
    got = client.chat.completions.create(messages=messages, response_format=form, **OPTIONS)
    assert json.loads(got.choices[0].message.content)["a"] in (1, 2)
    assert got.choices[0].finish_reason == "stop"
    for extra in ({"structured_outputs": {"regex": "r(ai)+n"}}, {"guided_regex": "r(ai)+n"}):
        text = client.completions.create(prompt="the", extra_body=extra, **OPTIONS).choices[0].text
        assert text.startswith("rai")
    with pytest.raises(openai.BadRequestError, match="unclosed"):
        extra = {"structured_outputs": {"regex": "["}}
        client.completions.create(prompt="the", extra_body=extra, **OPTIONS)


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -1), ("top_p", 2), ("n", 0), ("best_of", 3), ("logprobs", 99), ("suffix", "x"),
     ("max_tokens", 0), ("response_format", {"type": "xml"}), ("stop", ["a"] * 5)],
)  # fmt: skip
def test_bad_input_names_its_field(url: str, field: str, value: Any) -> None:
    body = {"prompt": "the", "max_tokens": 4, field: value}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_a_body_that_is_not_json_is_one_clear_error(url: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content='{"prompt": the}', headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "the body is not valid JSON (at character 11)"
    assert error["param"] is None


def test_a_key_is_required_and_large_bodies_are_refused(lm: SpeculativeLM) -> None:
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_rows=1, max_queue=1, max_len=128)
    transport = httpx.ASGITransport(build(lm, engine, name="tiny", api_key="secret"))

    async def codes() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as one:
            right = {"authorization": "Bearer secret"}
            wrong = {"authorization": "Bearer other"}
            large = b" " * (MAX_BODY + 1)
            answers = [
                await one.get("/v1/models"),
                await one.get("/v1/models", headers=wrong),
                await one.get("/v1/models", headers=right),
                await one.get("/health"),
                await one.post("/v1/completions", headers=right, content=large),
            ]
            return [answer.status_code for answer in answers]

    try:
        assert asyncio.run(codes()) == [401, 401, 200, 200, 413]
    finally:
        assert engine.close(60)


def test_the_other_endpoints(url: str, client: Any) -> None:
    assert client.models.list().data[0].id == "tiny"
    ids = httpx.post(f"{url}/tokenize", json={"prompt": "the rain"}).json()["tokens"]
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"] == "the rain"
    assert httpx.get(f"{url}/health").status_code == 200
    assert "specdiff:generation_tokens_total" in httpx.get(f"{url}/metrics").text
    assert "/v1/completions" in json.dumps(httpx.get(f"{url}/openapi.json").json())


def test_more_answers_than_ever_fit_are_refused_for_good(lm: SpeculativeLM) -> None:
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_rows=1, max_queue=1, max_len=128)
    transport = httpx.ASGITransport(build(lm, engine, name="tiny"))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as one:
            return await one.post("/v1/completions", json={"prompt": "the", "n": 3})

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"
    assert engine.close(60)


def test_no_seed_with_a_drafter_that_remembers(lm: SpeculativeLM) -> None:
    """What a request drew with a seed is no independent draft for another one with that seed."""
    drafter = NGramDrafter(lm.target.info, memory=1000)
    engine = LiveEngine(lm.target, drafter, token, 3, max_rows=1, max_len=128)
    transport = httpx.ASGITransport(build(lm, engine, name="tiny"))

    async def codes() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as one:
            answers = [
                await one.post("/v1/completions", json={"prompt": "the", "max_tokens": 2, **more})
                for more in ({"seed": 3}, {"seed": 3, "temperature": 0}, {})
            ]
            assert answers[0].json()["error"]["param"] == "seed"
            return [answer.status_code for answer in answers]

    try:
        assert asyncio.run(codes()) == [400, 200, 200]
    finally:
        assert engine.close(60)
