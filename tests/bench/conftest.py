"""A tiny target in a folder, prompts of token ids in a file, and a benchmark of them that takes a
second or two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from specdiff.bench.settings import Baseline, BenchSettings, Part
from specdiff.bench.suites import PromptText

SMALL: dict[str, Any] = {
    "temperatures": (0.0, 1.0),
    "max_tokens": 8,
    "batch": (1,),
    "gammas": (2, 4),
    "steps": (1,),
    "contexts": (16,),
    "widths": (1, 3),
    "sweeps": False,
    "sample": 2,
    "tuning_tokens": 4,
}


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.model("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A SEDD drafter, a causal LM, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("drafters")
    tiny.sedd(tiny.sedd_config(tiny.VOCAB)).save_pretrained(folder / "sedd")
    tiny.model("llama", seed=1).save_pretrained(folder / "small")
    tiny.model("gpt2", vocab=40).save_pretrained(folder / "foreign")
    return {name: str(folder / name) for name in ("sedd", "small", "foreign")}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"prompt": ids, "task": "odd" if i % 2 else "even"} for i, ids in enumerate(tiny.prompts(2))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def settings(target: str) -> Callable[..., BenchSettings]:
    def of(**changes: Any) -> BenchSettings:
        return BenchSettings(**{"suite": "jsonl:none", "model": target, **SMALL, **changes})

    return of


@pytest.fixture
def part(target: str, drafters: dict[str, str]) -> Callable[..., Part]:
    """Plain decoding both ways and a SEDD drafter, unless `baselines` are given."""

    def of(*baselines: Baseline, **changes: Any) -> Part:
        default = (
            Baseline("hf", "hf"),
            Baseline("ours-vanilla", "ours", "none"),
            Baseline("sedd", "ours", drafters["sedd"]),
        )
        texts = tuple(
            PromptText(f"p{i}", "odd" if i % 2 else "even", ids)
            for i, ids in enumerate(tiny.prompts(2))
        )
        return Part(
            **{
                "name": "tiny",
                "model": target,
                "suite": "",
                "baselines": baselines or default,
                "max_tokens": 8,
                "texts": texts,
                **changes,
            }
        )

    return of
