"""The flags of structured output on the command line, with a real model of random weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("llguidance", reason="the structured extra is not installed")

from test_cli_edges import answer, folder, here  # noqa: F401
from test_lm import tokenizer  # noqa: F401

Here = Callable[..., tuple[int, str, str]]
SCHEMA = '{"enum": ["rain", "plain"], "x-guidance": {"whitespace_flexible": false}}'
LARK = 'start: ("on" | "the") " " /rain|spain/'


def test_a_regular_expression(answer: Here) -> None:
    code, out, err = answer("hi", "--regex", "(rain|sun){2}", "--max-tokens", "20")
    assert (code, err.count("Traceback")) == (0, 0)
    assert re.fullmatch(r"(rain|sun){2}\n?", out)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_schema_as_text_or_file(answer: Here, tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA)
    schema = str(path) if as_file else SCHEMA
    code, out, _ = answer("hi", "--json-schema", schema, "--max-tokens", "20")
    assert code == 0
    assert json.loads(out) in ("rain", "plain")


def test_a_grammar_from_a_file_and_one_object(answer: Here, tmp_path: Path) -> None:
    path = tmp_path / "weather.lark"
    path.write_text(LARK)
    code, out, _ = answer("hi", "--grammar", str(path), "--max-tokens", "20", "--json")
    record = json.loads(out)
    assert code == 0
    assert re.fullmatch("(on|the) (rain|spain)", record["text"])
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--regex", "["), "regex is not valid"),
        (("--regex", "a", "--json-schema", "{}"), "an answer has one structure"),
        (("--json-schema", "{oops"), "json_schema is not valid JSON"),
        (("--json-schema", "./nowhere.json"), "--json-schema cannot read nowhere.json"),
        (("--grammar", "./nowhere.lark"), "--grammar cannot read nowhere.lark"),
        (("--regex", "a", "--ignore-eos"), "ignore_eos cannot be combined with regex"),
        (("--regex", "a", "--allowed-token-ids", "1"), "allowed_token_ids cannot be combined"),
    ],
)
def test_what_is_refused_in_one_line(
    answer: Here, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = answer("hi", *arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
