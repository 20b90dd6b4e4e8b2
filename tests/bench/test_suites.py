"""Suites: the packaged prompts, users' files, and mistakes in them."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from specdiff.bench import suites
from specdiff.errors import UsageError


def test_the_packaged_suite_is_large_varied_and_spread() -> None:
    texts = suites.read("embedded")
    tasks = Counter(text.task for text in texts)
    assert set(tasks) == {
        "chat",
        "summarise",
        "story",
        "code",
        "math",
        "rewrite",
        "translate",
        "extract",
    }
    assert min(tasks.values()) >= 8 and len(texts) >= 64
    assert len({text.id for text in texts}) == len(texts)
    words = [frozenset(re.findall(r"\w+", str(text.body).lower())) for text in texts]
    alike = max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i])
    assert alike < 0.5  # no prompt is another one with a word changed
    assert {text.task for text in suites.read("embedded", 8)} == set(tasks)
    assert len(suites.read("embedded", 11)) == 11


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (
            "embeded",
            "unknown suite 'embeded'; known are embedded, paper, "
            "jsonl:FILE, humaneval:FILE, gsm8k:FILE, spec-bench:FILE, cnn-dailymail:FILE",
        ),
        ("jsonl", "unknown suite 'jsonl'"),
        ("jsonl:/nowhere/x.jsonl", "no such file: /nowhere/x.jsonl"),
    ],
)
def test_an_unknown_suite_or_a_missing_file_is_reported_at_once(suite: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        suites.check(suite)


def test_published_files_are_read_as_they_are(tmp_path: Path) -> None:
    code = tmp_path / "HumanEval.jsonl.gz"
    record = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "canonical_solution": "",
        "entry_point": "f",
    }
    code.write_bytes(gzip.compress(json.dumps(record).encode() + b"\n"))
    (text,) = suites.read(f"humaneval:{code}")
    assert text.id == "HumanEval/0" and text.body.endswith("\n\ndef f():\n")
    school = tmp_path / "gsm8k.jsonl"
    school.write_text(json.dumps({"question": "How many?", "answer": "3 #### 3"}) + "\n")
    (text,) = suites.read(f"gsm8k:{school}")
    assert (text.id, text.task, text.body) == ("gsm8k-0", "gsm8k", "How many?")


def test_a_number_of_prompts_of_each_task(tmp_path: Path) -> None:
    """Spec-Bench as published: categories, and several turns of which the first is the prompt."""
    file = tmp_path / "question.jsonl"
    rows = [
        {"question_id": i, "category": "qa" if i % 3 else "rag", "turns": [f"first {i}", "second"]}
        for i in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = suites.read(f"spec-bench:{file}")
    assert Counter(t.task for t in texts) == {"rag": 5, "qa": 5}
    assert (texts[0].id, texts[0].body) == ("0", "first 0")
    assert Counter(t.task for t in suites.read(f"spec-bench:{file}", None, 7)) == {
        "rag": 7,
        "qa": 7,
    }
    assert len(suites.read(f"spec-bench:{file}", 4)) == 4
    messages = {"id": 1, "task": "qa", "messages": [{"role": "user", "content": "hi"}], "turns": []}
    file.write_text(json.dumps(messages) + "\n")
    (text,) = suites.read(f"spec-bench:{file}")
    assert text.body == [{"role": "user", "content": "hi"}] and text.task == "qa"


def test_articles_are_to_be_summarized(tmp_path: Path) -> None:
    file = tmp_path / "cnn.jsonl"
    file.write_text('{"article": "It rained."}\n{"prompt": "Sum it up: it rained."}\n')
    article, prompt = suites.read(f"cnn-dailymail:{file}")
    assert article.body == "Summarize this article in a few sentences.\n\nIt rained."
    assert prompt.body == "Sum it up: it rained." and prompt.task == "cnn-dailymail"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hi"}', "line 2 has none of the fields messages, prompt, but text"),
        ('{"prompt": 3}', "line 2: prompt must be text, not int"),
        ("[1]", "line 2 must be an object"),
        ('{"prompt": ""}', "line 2: prompt is empty"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "line 2: message 1: content must be text, not null",
        ),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' + line + "\n")
    with pytest.raises(UsageError, match=re.escape(message)):
        suites.read(f"jsonl:{file}")


def test_an_empty_file_is_no_suite(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no prompts"):
        suites.read(f"jsonl:{tmp_path / 'p.jsonl'}")
