"""Prompt suites: the packaged prompts, or the user's own files.

They are read before any model is loaded, so that mistakes show at once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from specdiff import files
from specdiff.data.records import SETS, Record, prompt_of, read_dataset, read_jsonl
from specdiff.errors import UsageError
from specdiff.text.lm import SpeculativeLM

EMBEDDED = Path(__file__).parent / "prompts" / "embedded.jsonl"
FILES = {  # kind -> fields of a prompt, by preference
    "jsonl": ("messages", "prompt"),
    "humaneval": ("prompt",),
    "gsm8k": ("question",),
    "spec-bench": ("messages", "prompt", "turns"),
    "cnn-dailymail": ("messages", "prompt", "article"),
}
TASKS = ("task", "category")  # fields that name the task of a prompt
NAMES = ("id", "task_id", "question_id")
PER_TASK = {"spec-bench": 5}  # prompts of each task, unless a number is given
CODE = "Complete this Python function. Answer with the code only.\n\n{}"
SUMMARY = "Summarize this article in a few sentences.\n\n{}"
DOCUMENTS = 64  # of a data set, unless a number is given
ROOM = 8  # tokens that a prompt must leave for the answer


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt before tokenization: a user's turn, messages or token ids.

    document: the body is a text whose beginning is continued.
    """

    id: str
    task: str
    body: Any
    document: bool = False


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids, ready to be continued."""

    id: str
    task: str
    ids: tuple[int, ...]


def check(suite: str) -> str:
    """Digest of the suite's file, "" if it has none.

    Raises UsageError for an unknown suite or a missing file.
    """
    kind, _, path = suite.partition(":")
    if suite == "paper":
        return ""
    if suite != "embedded" and (kind not in FILES or not path):
        names = ("embedded", "paper", *(f"{kind}:FILE" for kind in FILES))
        raise UsageError(f"unknown suite {suite!r}; known are {', '.join(names)}")
    file = EMBEDDED if suite == "embedded" else Path(path).expanduser()
    if file.is_dir():
        raise UsageError(f"{file} is a folder; name a file in it")
    if not file.is_file():
        raise UsageError(f"no such file: {file}")
    return files.digest(file)


def read(suite: str, count: int | None = None, per_task: int | None = None) -> list[PromptText]:
    """`count` texts of a suite, spread over its tasks, or the first `per_task` of each task; of
    "dataset:NAME", documents in order.

    Raises UsageError naming file and line, or what a data set lacks.
    """
    kind, _, source = suite.partition(":")
    if kind == "dataset":
        field = SETS[source][2]
        rows = islice(read_dataset(source), count or DOCUMENTS)
        return [
            PromptText(f"{source}-{i}", source, row.value[field], document=True)
            for i, row in enumerate(rows)
        ]
    if suite == "embedded":
        file = EMBEDDED
        kind = "jsonl"
    else:
        file = Path(source).expanduser()
    texts = [_text(record, kind, i) for i, record in enumerate(read_jsonl(file))]
    if not texts:
        raise UsageError(f"{file} holds no prompts")
    if per_task is None and count is None:
        per_task = PER_TASK.get(kind)
    return spread(texts if per_task is None else first_of_each(texts, per_task), count)


def _text(record: Record, kind: str, index: int) -> PromptText:
    field, body = prompt_of(_first_turn(record), FILES[kind])
    if not body:
        raise UsageError(f"{record.place}: {field} is empty")
    task = str(_first(record.value, TASKS, kind))
    name = str(_first(record.value, NAMES, f"{task}-{index}"))
    if kind == "humaneval":
        body = CODE.format(body)
    if field == "article":
        body = SUMMARY.format(body)
    return PromptText(name, task, body)


def _first(value: Mapping[str, Any], names: Sequence[str], default: str) -> Any:
    return next((value[name] for name in names if name in value), default)


def _first_turn(record: Record) -> Record:
    """A record of several user turns as one of the first turn."""
    turns = record.value.get("turns") if isinstance(record.value, Mapping) else None
    if not isinstance(turns, list) or not turns:
        return record
    return Record(record.place, {**record.value, "turns": turns[0]})


def first_of_each(texts: Sequence[PromptText], count: int) -> list[PromptText]:
    """The first `count` texts of each task, in order."""
    sizes: Counter[str] = Counter()
    few = []
    for text in texts:
        sizes[text.task] += 1
        if sizes[text.task] <= count:
            few.append(text)
    return few


def spread(texts: Sequence[PromptText], count: int | None) -> list[PromptText]:
    """`count` of the texts, one of each task in turn; all in order if `count` is None or larger."""
    if count is None or count >= len(texts):
        return list(texts)
    tasks: dict[str, list[PromptText]] = {}
    for text in texts:
        tasks.setdefault(text.task, []).append(text)
    ordered: list[PromptText] = []
    for turn in zip_longest(*tasks.values()):
        ordered += [text for text in turn if text is not None]
    return ordered[:count]


def encode(
    texts: Sequence[PromptText], lm: SpeculativeLM, prefix: int
) -> tuple[list[EncodedPrompt], list[str]]:
    """The prompts that leave room for an answer, and a note on each that does not.

    Documents are cut to their first `prefix` tokens.
    """
    prompts = []
    notes = []
    for text in texts:
        ids = _ids(text, lm, prefix)
        if 0 < len(ids) <= lm.max_len - ROOM:
            prompts.append(EncodedPrompt(text.id, text.task, tuple(ids)))
        else:
            notes.append(
                f"prompt {text.id} was left out: "
                f"it has {len(ids)} tokens, and the model has room for {lm.max_len}"
            )
    return prompts, notes


def _ids(text: PromptText, lm: SpeculativeLM, prefix: int) -> list[int]:
    if isinstance(text.body, str):
        if lm.tokenizer is None:
            raise UsageError(
                f"prompt {text.id} is text, and this model has no tokenizer; "
                'give token ids: {"prompt": [1, 2, 3]}'
            )
        if text.document:
            return lm.raw_ids(text.body)[:prefix]
        if getattr(lm.tokenizer, "chat_template", None):
            return lm.render([{"role": "user", "content": text.body}])
        return lm.raw_ids(text.body)
    if all(isinstance(message, Mapping) for message in text.body):
        return lm.render(text.body)
    return lm.encode(text.body[:prefix] if text.document else text.body)
