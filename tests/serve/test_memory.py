"""Sizes of the cache: as users write them, what one request may take, and refusals before work."""

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
from running import running
from typer.testing import CliRunner

from specdiff import SpeculativeLM
from specdiff.capacity import STEP
from specdiff.cli import app
from specdiff.errors import UsageError
from specdiff.serve import memory
from specdiff.serve.app import build
from specdiff.serve.live import LiveEngine
from specdiff.targets.causal import CausalTarget
from specdiff.verify import token
from test_lm import lm, target, tokenizer  # noqa: F401


@pytest.mark.parametrize(
    "text, count",
    [("1000", 1000), ("4GiB", 4 * 2**30), ("500M", 500 * 2**20), ("2.5GB", 2_500_000_000),
     ("1 kib", 1024)],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert memory.size(text, "--kv-cache-memory") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 gigs", "1e9", "1.GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--kv-cache-memory must be bytes with a suffix"):
        memory.size(text, "--kv-cache-memory")


def test_the_command_line_refuses_before_it_loads_a_model() -> None:
    arguments = ["serve", "--model", "no-such", "--kv-cache-memory", "4 gigs"]
    result = CliRunner().invoke(app, arguments)
    assert "--kv-cache-memory must be bytes" in str(result.exception)


def test_one_request_must_fit(target: CausalTarget) -> None:
    unit = target.position_bytes
    config: Any = target.model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert unit == 2 * 4 * config.num_hidden_layers * width  # keys and values in float32
    assert memory.positions(target, None, 132) is None
    assert memory.positions(target, 3 * STEP * unit, 132) == 3 * STEP
    with pytest.raises(
        UsageError, match=f"at least {(STEP + 1) * unit} bytes, or lower --max-model-len"
    ):
        memory.positions(target, STEP * unit, 132)


def test_the_report(target: CausalTarget) -> None:
    assert memory.report(target, 8, 132, None) == "cache: 256 bytes per token, at most 514.0 KiB"
    line = memory.report(target, 8, 132, 2 * STEP)
    assert "at most 128.0 KiB (all 8 requests of full length would take 514.0 KiB)" in line


def test_what_never_fits_is_refused_before_it_is_tokenized(
    lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("tokenized")

    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=lm.max_len, positions=STEP + 1)
    long = "x" * 100_000
    chat = {"role": "user", "content": [{"type": "text", "text": long}]}
    with running(build(lm, engine, name="tiny")) as url:
        monkeypatch.setattr(lm, "encode", fail)
        monkeypatch.setattr(lm, "render", fail)
        for path, body, field in [
            ("completions", {"prompt": "a", "max_tokens": 128}, "max_tokens"),
            ("completions", {"prompt": long}, "prompt"),
            ("chat/completions", {"messages": [chat], "max_tokens": 1}, "messages"),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}],
                                  "max_completion_tokens": 128}, "max_tokens"),
        ]:  # fmt: skip
            answer = httpx.post(f"{url}/v1/{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_requests_wait_for_room_and_all_are_answered(lm: SpeculativeLM) -> None:
    """One row has room: four requests take turns."""
    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=lm.max_len, positions=STEP + 1)
    with running(build(lm, engine, name="tiny")) as url:
        body = {"prompt": ["the rain", "in spain"], "n": 2, "max_tokens": 9, "seed": 3}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    want = lm.generate("the rain", raw=True, max_tokens=9, seed=3, draft_len=3)
    assert answer["choices"][0]["text"] == want.text
    assert len(answer["choices"]) == 4
