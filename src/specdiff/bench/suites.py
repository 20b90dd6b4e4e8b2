"""Where prompts come from: the packaged suite, or the user's own files. Read before any model is loaded, so that mistakes show at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from specdiff import files
from specdiff.data.records import SETS, Record, prompt_of, read_dataset, read_jsonl
from specdiff.errors import UsageError
from specdiff.text.lm import SpeculativeLM

EMBEDDED = Path(__file__).parent / "prompts" / "embedded.jsonl"
FILES = {
    "jsonl": ("messages", "prompt"),
    "humaneval": ("prompt",),
    "gsm8k": ("question",),
}  # kind -> fields, most telling first
CODE = "Complete this Python function. Answer with the code only.\n\n{}"
DOCUMENTS = 64  # of a data set, where no number is given
ROOM = 8  # tokens a prompt must leave to be generated


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt before a tokenizer saw it: a user's turn, messages, token ids, or (`document`) a text whose beginning is gone on with."""

    id: str
    task: str
    body: Any
    document: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, ready to be continued."""

    id: str
    task: str
    ids: tuple[int, ...]


def check(suite: str) -> str:
    """Raises UsageError for an unknown suite or a file that is not there. Returns a digest of the suite's file, "" without one."""
    kind, _, path = suite.partition(":")
    if suite == "paper":
        return ""
    if suite != "embedded" and (kind not in FILES or not path):
        known = ("embedded", "paper", *(f"{kind}:FILE" for kind in FILES))
        raise UsageError(f"unknown suite {suite!r}; known are {', '.join(known)}")
    file = EMBEDDED if suite == "embedded" else Path(path).expanduser()
    if file.is_dir():
        raise UsageError(f"{file} is a folder; name a file in it")
    if not file.is_file():
        raise UsageError(f"no such file: {file}")
    return files.digest(file)


def read(suite: str, count: int | None = None) -> list[Text]:
    """A suite's texts, `count` of them spread over its tasks; of "dataset:NAME", documents as they come.

    Raises UsageError naming file and line, or what a data set lacks.
    """
    kind, _, where = suite.partition(":")
    if kind == "dataset":
        field = SETS[where][2]
        rows = islice(read_dataset(where), count or DOCUMENTS)
        return [
            Text(f"{where}-{i}", where, row.value[field], document=True)
            for i, row in enumerate(rows)
        ]
    file, kind = (EMBEDDED, "jsonl") if suite == "embedded" else (Path(where).expanduser(), kind)
    texts = [_text(record, kind, i) for i, record in enumerate(read_jsonl(file))]
    if not texts:
        raise UsageError(f"{file} holds no prompts")
    return spread(texts, count)


def _text(record: Record, kind: str, place: int) -> Text:
    field, body = prompt_of(record, FILES[kind])
    if not body:
        raise UsageError(f"{record.place}: {field} is empty")
    task = str(record.value.get("task", kind))
    name = record.value.get("id", record.value.get("task_id", f"{task}-{place}"))
    return Text(str(name), task, CODE.format(body) if kind == "humaneval" else body)


def spread(texts: Sequence[Text], count: int | None) -> list[Text]:
    """`count` of them, one of each task in turn; all of them, in their order, where `count` is None or larger."""
    if count is None or count >= len(texts):
        return list(texts)
    tasks: dict[str, list[Text]] = {}
    for text in texts:
        tasks.setdefault(text.task, []).append(text)
    turns: Iterable[Text | None] = (text for turn in zip_longest(*tasks.values()) for text in turn)
    return [text for text in turns if text is not None][:count]


def encode(texts: Sequence[Text], lm: SpeculativeLM, prefix: int) -> tuple[list[Prompt], list[str]]:
    """The prompts that leave room for an answer, and a note on each that does not. Documents are cut to their first `prefix` tokens."""
    prompts, notes = [], []
    for text in texts:
        ids = _ids(text, lm, prefix)
        if 0 < len(ids) <= lm.max_len - ROOM:
            prompts.append(Prompt(text.id, text.task, tuple(ids)))
        else:
            notes.append(
                f"prompt {text.id} has {len(ids)} tokens of the {lm.max_len} there is room for: left out"
            )
    return prompts, notes


def _ids(text: Text, lm: SpeculativeLM, prefix: int) -> list[int]:
    if isinstance(text.body, str):
        if lm.tokenizer is None:
            raise UsageError(
                f'prompt {text.id} is text, and this model has no tokenizer; give token ids: {{"prompt": [1, 2, 3]}}'
            )
        if text.document:
            return lm.raw_ids(text.body)[:prefix]
        if getattr(lm.tokenizer, "chat_template", None):
            return lm.render([{"role": "user", "content": text.body}])
        return lm.raw_ids(text.body)
    if all(isinstance(m, Mapping) for m in text.body):
        return lm.render(text.body)
    return lm.encode(text.body[:prefix] if text.document else text.body)
