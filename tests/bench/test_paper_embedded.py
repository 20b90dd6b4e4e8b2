"""The paper suite at the embedded scale: its texts, its tables, and finetuning before it."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny
from specdiff import cli
from specdiff.bench import paper, paper_embedded
from specdiff.bench.settings import BenchSettings
from specdiff.errors import UsageError

SMALL = ["--prompts", "2", "--max-tokens", "6", "--gammas", "2,4", "--steps", "1,2"]
SMALL += ["--batch", "1", "--finetune-steps", "2", "--json"]


def settings(**changes: Any) -> BenchSettings:
    return BenchSettings(suite="paper", model="", scale="embedded", **changes)


def write(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in rows), encoding="utf-8")
    return path


def test_the_packaged_texts() -> None:
    texts = paper_embedded.texts(settings())
    assert list(texts) == list(paper.DATASETS)
    assert min(len(rows) for rows in texts.values()) >= 8
    kinds = {name: {text.document for text in rows} for name, rows in texts.items()}
    assert kinds == {"cnn_dailymail": {False}, "openwebtext": {True}, "lm1b": {True}}
    ids = Counter(text.id for rows in texts.values() for text in rows)
    assert set(ids.values()) == {1}
    short = paper_embedded.parts(settings(max_tokens=256), Path("out"))[2]
    assert (short.name, short.max_tokens, short.prefix) == ("lm1b/smollm2-135m", 100, 16)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("texts", "cnn=./x.jsonl", "--texts takes NAME=FILE with a NAME of cnn_dailymail, "),
        ("finetune", "lm1b=./nowhere.jsonl", "--finetune lm1b: no such file: nowhere.jsonl"),
    ],
)
def test_a_mistake_is_named(option: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        paper_embedded.parts(settings(**{option: (value,)}), Path("out"))


def test_measured_prompts_are_not_learned(tmp_path: Path) -> None:
    measured = write(tmp_path / "measured.jsonl", [[1, 2, 3], [4, 5]])
    training = write(tmp_path / "training.jsonl", [[9, 9], [4, 5]])
    options = settings(texts=(f"lm1b={measured}",), finetune=(f"lm1b={training}",))
    with pytest.raises(UsageError, match=r"training\.jsonl, line 2 is the measured prompt lm1b-1"):
        paper_embedded.finetunings(options, tmp_path)


def test_in_small_with_and_without_finetuning(
    tmp_path: Path,
    target: str,
    drafters: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", tiny.prompts(2))
    training = write(tmp_path / "training.jsonl", [[k, *range(40)] for k in range(40)])
    out = tmp_path / "out"
    arguments = ["--suite", "paper", "--scale", "embedded", "--model", target, "--out", str(out)]
    arguments += ["--drafter", f"sedd={drafters['sedd']}", *SMALL, "-q"]
    arguments += ["--drafter", f"autoregressive={drafters['small']}"]
    for name in paper.DATASETS:
        arguments += ["--texts", f"{name}={prompts}"]
    arguments += ["--finetune", f"lm1b={training}"]

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["specdiff", "bench", *arguments, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert not end.value.code, captured.err
        summary: dict[str, Any] = json.loads(captured.out)
        return summary

    summary = run()
    names = [part["name"] for part in summary["parts"]]
    assert names[2:] == ["lm1b/tiny-llama", "lm1b/tiny-llama finetuned"]
    rows = [row for row in summary["paper"]["table2"] if row["dataset"] == "lm1b"]
    assert [(row["baseline"], row["target"], row["paper"]) for row in rows[4:]] == [
        ("sedd", "gpt2-xl", 2.35),
        ("sedd", "gpt-neo-2.7B", 3.25),
        ("sedd", "tiny-llama", None),
        ("sedd", "tiny-llama finetuned", None),
    ]
    assert all(row["vs_vanilla"] > 0 and not row["why"] for row in rows if row["paper"] is None)
    page = (out / "report.html").read_text()
    assert "Figure 2" in page and "compare the order of the rows" in page
    learned = out / "finetuned" / "lm1b"
    models = {name: (learned / name / "model.safetensors") for name in ("target", "sedd")}
    before = {name: path.stat().st_mtime_ns for name, path in models.items()}
    assert run("--resume")["parts"] == summary["parts"]
    assert {name: path.stat().st_mtime_ns for name, path in models.items()} == before
