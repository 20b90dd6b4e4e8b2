"""Structured output with the packaged model: JSON that parses, and the text of plain decoding."""

import json

import pytest

import specdiff
from specdiff.errors import UsageError
from specdiff.text.structured import LONGEST

pytest.importorskip("llguidance", reason="the structured extra is not installed")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "rainy": {"type": "boolean"}},
    "required": ["city", "rainy"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.mark.real
def test_greedy_json_is_that_of_plain_constrained_decoding(lm: specdiff.SpeculativeLM) -> None:
    plain = specdiff.SpeculativeLM(lm.target, "none", lm.tokenizer, 256)
    drafted = specdiff.SpeculativeLM(lm.target, "ngram", lm.tokenizer, 256)
    prompts = ["Describe the weather in Rome.", "Where does it rain?"]
    want = plain.generate(prompts, json_schema=SCHEMA, temperature=0, max_tokens=40)
    got = drafted.generate(prompts, json_schema=SCHEMA, temperature=0, max_tokens=40, draft_len=4)
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    for one in got:
        assert set(json.loads(one.text)) == {"city", "rainy"}
        assert one.finish_reason == "stop"
    cut = drafted.generate(prompts[0], json_schema=SCHEMA, temperature=0, max_tokens=3)
    assert cut.finish_reason == "length"
    assert drafted.generate("Is it?", choice=["yes", "no"], max_tokens=8).text in ("yes", "no")


@pytest.mark.real
@pytest.mark.parametrize(
    "options, param",
    [
        ({"regex": "["}, "regex"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"json_schema": {"type": "object", "if": {}}}, "json_schema"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": {"a": object()}}, "json_schema"),
        ({"grammar": "start: " + "x" * LONGEST}, "grammar"),
        ({"choice": []}, "choice"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    lm: specdiff.SpeculativeLM, options: dict[str, object], param: str
) -> None:
    with pytest.raises(UsageError) as caught:
        lm.generate("the", **options)  # type: ignore[arg-type]
    assert caught.value.param == param


@pytest.mark.real
def test_a_deep_grammar_does_not_overflow_the_stack(lm: specdiff.SpeculativeLM) -> None:
    """Three thousand rules, each of the next one: an ordinary thread ends the process on them."""
    rules = [f"a{i}: a{i + 1}" for i in range(3000)]
    deep = "\n".join(["start: a0", *rules, 'a3000: "x"'])
    assert len(deep) < LONGEST
    assert lm.generate("the", grammar=deep, max_tokens=4).text == "x"
