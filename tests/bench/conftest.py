"""A tiny target in a folder, prompts of token ids in a file, and a benchmark of them that takes a second or two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from specdiff.bench.plan import Entry, Part, Settings
from specdiff.bench.suites import Text

SMALL: dict[str, Any] = {
    "temperatures": (0.0, 1.0), "max_tokens": 8, "batch": (1,), "gammas": (2, 4), "steps": (1,), "contexts": (16,), "widths": (1, 3),
    "sweeps": False, "sample": 2, "tuning_tokens": 4,
}  # fmt: skip


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
def settings(target: str) -> Callable[..., Settings]:
    def of(**changes: Any) -> Settings:
        return Settings(**{"suite": "jsonl:none", "model": target, **SMALL, **changes})

    return of


@pytest.fixture
def part(target: str, drafters: dict[str, str]) -> Callable[..., Part]:
    """Plain decoding both ways and a SEDD drafter, unless `entries` say otherwise."""

    def of(*entries: Entry, **changes: Any) -> Part:
        chosen = entries or (
            Entry("hf", "hf"),
            Entry("ours-vanilla", "ours", "none"),
            Entry("sedd", "ours", drafters["sedd"]),
        )
        texts = tuple(
            Text(f"p{i}", "odd" if i % 2 else "even", ids) for i, ids in enumerate(tiny.prompts(2))
        )
        return Part(
            **{
                "name": "tiny",
                "model": target,
                "suite": "",
                "entries": chosen,
                "max_tokens": 8,
                "texts": texts,
                **changes,
            }
        )

    return of
