"""The load script measures a real server, and counts what fails."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
from test_http import serving

from specdiff import SpeculativeLM
from test_lm import lm, target, tokenizer  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "scripts" / "serve_load.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_server_is_measured(
    script: ModuleType, lm: SpeculativeLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = SpeculativeLM(lm.target, lm.drafter, lm.tokenizer, max_len=250)
    file = tmp_path / "load.json"
    sizes = ["--clients", "1", "2", "--requests", "2", "--max-tokens", "6"]
    with serving(lm) as server:
        script.main([f"{server.url}/v1", *sizes, "--json", str(file)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| server |")]
    loads = json.loads(file.read_text())["loads"]
    assert len(rows) == 1 + len(loads)
    assert [load["requests"] for load in loads] == [2, 4]
    for load in loads:
        good = load["requests"] - load["failed"]
        assert 0 < load["tokens"] <= 6 * good
        assert math.isclose(load["throughput"], load["tokens"] / load["seconds"])
        assert 0 < load["ttft_p50"] <= load["ttft_p99"] <= 1000 * load["seconds"]
        assert load["tpot_p50"] <= load["tpot_p99"]


def test_failures_are_counted_and_named(
    script: ModuleType, lm: SpeculativeLM, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lm, api_key="secret") as server:
        script.main([f"{server.url}/v1", "--clients", "1", "--requests", "1"])
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("1 of 1 |")
    assert "401" in err
    with pytest.raises(SystemExit):
        script.main([])


def test_ranks(script: ModuleType) -> None:
    values = [float(n) for n in range(101)]
    assert [script.percentile(values, share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 100]
    assert math.isnan(script.percentile([], 0.5))
