# ruff: noqa: E402 (imports follow the check that the extra is installed)
"""Tool calls: read, enforced, streamed and given back, with the official client."""

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")
from running import running

import tiny
from specdiff import SpeculativeLM
from specdiff.errors import UsageError
from specdiff.serve.app import build
from specdiff.serve.live import LiveEngine
from specdiff.serve.tool_calls import ToolCall, ToolCallReader, Tools, prepared
from specdiff.verify import token
from test_lm import END, VOCAB, scripted, tokenizer  # noqa: F401

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments.city }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROMPT = "weather time [user] the rain[assistant] "  # what the template makes of the messages
MESSAGES = [{"role": "user", "content": "the rain"}]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object", "properties": properties, "required": [*properties],
        "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", city={"enum": ["Oslo", "Rome"]}), tool("time", hour={"enum": [1, 2]})]


@pytest.fixture(scope="module")
def speller(tokenizer: Any) -> Any:
    one = copy.deepcopy(tokenizer)
    one.chat_template = TEMPLATE
    return one


@contextmanager
def client_of(lm: SpeculativeLM) -> Iterator[Any]:
    engine = LiveEngine(lm.target, lm.drafter, token, lm.drafter.draft_len, max_len=lm.max_len)
    with (
        running(build(lm, engine, name="tiny")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(speller: Any) -> Iterator[Any]:
    with client_of(SpeculativeLM(tiny.target("llama", vocab=VOCAB), "ngram", speller, 256)) as one:
        yield one


def joined(stream: Any) -> tuple[str, list[tuple[str, str]], list[str]]:
    """The content, the calls and the finish reasons of a stream."""
    content = ""
    calls: dict[int, tuple[str, str]] = {}
    reasons = []
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                assert call.index not in calls
                calls[call.index] = (call.function.name, call.function.arguments)
    return content, [calls[i] for i in sorted(calls)], reasons


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        ("no call", "no call", 0),
        (CALL, "", 1),
        (f"Let me see.\n\n{CALL}\n{CALL}\n", "Let me see.", 2),
        (f"a < b <tool {CALL} after", "a < b <tool after", 1),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, 0),
        ('<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', None, 0),
        ('<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>', None, 0),
        ("<tool_call>not JSON</tool_call> end\n", None, 0),
        ("<tool_call>\n{", None, 0),
        ("cut <tool_c", None, 0),
        (CALL[:-3], None, 0),
    ],
)
def test_a_text_is_read_the_same_in_any_pieces(text: str, content: str | None, count: int) -> None:
    chance = random.Random(0)
    for _ in range(50):
        reader = ToolCallReader(["weather"])
        out = ""
        calls: list[ToolCall] = []
        rest = text
        while rest:
            size = chance.randrange(1, 9)
            new, more = reader.add(rest[:size])
            out += new
            calls += more
            rest = rest[size:]
        out += reader.finish()
        assert out == (text if content is None else content)
        assert calls == [ToolCall("weather", '{"city": "Oslo"}')] * count


@pytest.mark.parametrize(
    "answer, content", [(CALL, None), (f"Well.\n{CALL}", "Well."), ("Nothing to call", None)]
)
def test_calls_are_read_from_an_answer(speller: Any, answer: str, content: str | None) -> None:
    prompt = speller(PROMPT)["input_ids"]
    ids = speller(answer)["input_ids"]
    options = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
    with client_of(scripted(speller, prompt, [*ids, END], flaw=5)) as client:
        got = client.chat.completions.create(**options).choices[0]
        stream = joined(client.chat.completions.create(stream=True, **options))
        none = client.chat.completions.create(tool_choice="none", **options).choices[0]
    assert (none.message.content, none.message.tool_calls) == (answer, None)
    assert none.finish_reason == "stop"
    if CALL not in answer:
        assert (got.message.content, got.message.tool_calls) == (answer, None)
        assert stream == (answer, [], ["stop"])
        return
    assert (got.message.content, got.finish_reason) == (content, "tool_calls")
    call = got.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert stream == (content or "", [("weather", call.function.arguments)], ["tool_calls"])


def test_a_call_that_is_cut_stays_text(speller: Any) -> None:
    prompt = speller(PROMPT)["input_ids"]
    ids = speller(CALL)["input_ids"][:20]
    options = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 20}
    with client_of(scripted(speller, prompt, ids)) as client:
        got = client.chat.completions.create(**options).choices[0]
        stream = joined(client.chat.completions.create(stream=True, **options))
    assert got.finish_reason == "length" and got.message.tool_calls is None
    assert got.message.content and CALL.startswith(got.message.content)
    assert stream == (got.message.content, [], ["length"])


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "time"}}], ids=str
)
def test_calls_are_enforced_by_a_grammar(client: Any, choice: Any) -> None:
    """The weights are random: without a grammar there would be no call."""
    pytest.importorskip("llguidance", reason="the structured extra is not installed")
    for seed in range(3):
        options = {
            "model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice,
            "parallel_tool_calls": False, "seed": seed,
        }  # fmt: skip
        got = client.chat.completions.create(**options).choices[0]
        assert (got.message.content, got.finish_reason) == (None, "tool_calls")
        calls = [(c.function.name, c.function.arguments) for c in got.message.tool_calls]
        assert len(calls) == 1
        name, arguments = calls[0]
        assert name in ({"time"} if choice != "required" else {"time", "weather"})
        field, values = ("hour", (1, 2)) if name == "time" else ("city", ("Oslo", "Rome"))
        assert json.loads(arguments)[field] in values
        stream = client.chat.completions.create(stream=True, **options)
        assert joined(stream) == ("", calls, ["tool_calls"])


def test_calls_and_results_go_back_into_the_template(speller: Any, client: Any) -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]  # fmt: skip
    text = f"{PROMPT}weather:Oslo[tool] rain[assistant] "
    options = {"model": "tiny", "max_tokens": 2, "tools": TOOLS}
    got = client.chat.completions.create(messages=messages, **options)
    assert got.usage.prompt_tokens == len(speller(text)["input_ids"])
    call["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="must be a JSON object") as error:
        client.chat.completions.create(messages=messages, **options)
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "weather"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [tool("a b")]}, "tools"),
        ({"tools": [tool("a", x={"type": "no such"})], "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
         "tool_choice"),
    ],
)  # fmt: skip
def test_what_is_refused(client: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=fields)
    assert error.value.param == param


def test_schemas_may_refer_to_their_own_definitions() -> None:
    schema = {"$defs": {"c": {"enum": [1]}}, "properties": {"x": {"$ref": "#/$defs/c"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    grammar = Tools.of(tools, "required", True).grammar()
    assert grammar is not None and '"#/$defs/c"' in grammar
    assert Tools.of(tools, None, True).grammar() is None
    assert Tools.of(None, "auto", True).reader() is None
    with pytest.raises(UsageError, match="must be a list"):
        prepared([{"role": "assistant", "tool_calls": "no"}])
