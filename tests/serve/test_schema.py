"""Requests generated from the server's own OpenAPI schema, good and bad: none is a 5xx."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")
import httpx
from test_http import Running, serving

from specdiff import SpeculativeLM
from test_lm import lm, target, tokenizer  # noqa: F401

# Of fields whose bounds the schema does not say: with these, generated requests reach the engine.
NARROW: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 8},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 8},
    "prompt": {"type": "string", "minLength": 1, "maxLength": 40},
    "messages": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {
                "role": {"enum": ["system", "user", "assistant"]},
                "content": {"type": "string", "maxLength": 20},
            },
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    },
    "temperature": {"type": "number", "minimum": 0, "maximum": 3},
    "top_p": {"type": "number", "minimum": 0.01, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 400},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 0.1, "maximum": 3},
    "logprobs": {"enum": [None, False, 0]},
    "top_logprobs": {"enum": [None]},
    "stop": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
    "stop_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 303}},
    "allowed_token_ids": {"enum": [None, [1, 2, 3], [280]]},
    "logit_bias": {"enum": [None, {}, {"5": -100}, {"5": 3.5, "7": 100}]},
    "draft_len": {"type": "integer", "minimum": 0, "maximum": 3},
    "seed": {"type": "integer"},
    "stream_options": {"enum": [None]},
    "response_format": {"enum": [None, {"type": "text"}, {"type": "json_object"}]},
    "structured_outputs": {"enum": [None, {"choice": ["rain", "🦊"]}, {"regex": "r(ai)+n"}]},
    "chat_template_kwargs": {"enum": [None, {}, {"enable_thinking": True}]},
    "tools": {"enum": [None, []]},
    "documents": {"enum": [None, []]},
}


@pytest.fixture(scope="module")
def server(lm: SpeculativeLM) -> Iterator[Running]:
    with serving(lm) as one:
        yield one


def narrowed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the bounds of NARROW, and without unknown fields."""
    for component in schema["components"]["schemas"].values():
        for name in set(component.get("properties", ())) & set(NARROW):
            component["properties"][name] = NARROW[name]
        if "prompt" in component.get("properties", ()) or "messages" in component.get(
            "properties", ()
        ):
            component["additionalProperties"] = False
    return schema


def run(folder: Path, url: str, schema: str, *options: str) -> None:
    """Send generated requests; a 5xx or a slow answer fails. Its cache is written to the folder."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", schema, "--url", url]
    command += ["--checks", "not_a_server_error", "--max-response-time", "10", "--no-color"]
    command += ["--suppress-health-check", "all", "--continue-on-failure", "--seed", "0", *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=folder)
    assert process.returncode == 0, process.stdout + process.stderr


def both(server: Running, folder: Path, *options: str) -> None:
    """The schema as it is, and narrowed so that most requests are good."""
    schema = f"{server.url}/openapi.json"
    run(folder, server.url, schema, *options)
    file = folder / "narrow.json"
    file.write_text(json.dumps(narrowed(httpx.get(schema).json())))
    before = tokens(server)
    run(folder, server.url, str(file), *options, "--mode", "positive", "--phases", "fuzzing")
    assert tokens(server) > before, "no generated request has reached the engine"
    assert server.engine.healthy


def tokens(server: Running) -> float:
    """Tokens that the server has generated."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    name = "specdiff:generation_tokens_total"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_generated_requests_are_no_server_errors(server: Running, tmp_path: Path) -> None:
    both(server, tmp_path, "--phases", "fuzzing", "--max-examples", "4")


@pytest.mark.slow
def test_many_generated_requests_are_no_server_errors(server: Running, tmp_path: Path) -> None:
    both(server, tmp_path, "--phases", "coverage,fuzzing", "--max-examples", "200")
