"""What the target's corpus starts from: its own empty user turn, or prompts and documents someone has.

A source gives numbered prompts: the number is the text's key, so it must mean the same prompt in every run.
"""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from specdiff.errors import UsageError
from specdiff.lm import SpeculativeLM
from specdiff.records import FIELDS, read_dataset, read_jsonl, read_texts

TOO_LONG, EMPTY = "prompt-too-long", "prompt-empty"
QUESTION_TOKENS = 128  # longer questions of a small model are mostly rambling
OPENING_TOKENS = 8  # without a template, this many tokens sampled at temperature 1 keep greedy texts apart


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens a text begins with. `cut`: a document's first tokens only. `refused`: why it cannot be used, else empty."""

    key: int
    ids: tuple[int, ...]
    cut: bool = False
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Opening:
    """How the target continues a prompt by itself before its answer counts: at temperature 1 up to `limit` tokens.

    With `ends` it must reach one of them, and `header` follows; without, it must fill the limit.
    """

    limit: int
    ends: tuple[int, ...] = ()
    header: tuple[int, ...] = ()


class Source(Protocol):
    """`about` goes to the manifest; no text is longer than `longest` tokens when its answer begins."""

    about: dict[str, Any]
    longest: int
    opening: Opening | None

    def prompts(self, known: Container[int]) -> Iterator[Prompt]:
        """The prompts whose keys are not known, in order."""
        ...


class SelfSource:
    """The target's own empty user turn: it writes the question too. Without a chat template: its BOS (or EOS) token."""

    def __init__(self, lm: SpeculativeLM, question_tokens: int = QUESTION_TOKENS) -> None:
        if getattr(lm.tokenizer, "chat_template", None):
            self.prefix, suffix = turn(lm)
            self.opening: Opening | None = Opening(question_tokens, suffix[:1], suffix[1:])
        else:
            self.prefix, self.opening = (start_token(lm),), Opening(OPENING_TOKENS)
        self.longest = len(self.prefix) + self.opening.limit + len(self.opening.header)
        self.about: dict[str, Any] = {"kind": "self", "opening_tokens": self.opening.limit}

    def prompts(self, known: Container[int]) -> Iterator[Prompt]:
        return (Prompt(key, self.prefix) for key in count() if key not in known)


def turn(lm: SpeculativeLM) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of the chat template before a user's content, and those between its end and the answer's beginning."""
    rendered = [lm.render([{"role": "user", "content": content}]) for content in ("Apples", "7 dogs?", "(why", "über alles!")]
    prefix, suffix = _common(rendered), _common([r[::-1] for r in rendered])[::-1]
    if not prefix or not suffix:
        raise UsageError("the chat template puts nothing before or behind the user's words; give prompts with --source jsonl or text")
    return prefix, suffix


def start_token(lm: SpeculativeLM) -> int:
    """BOS of tokenizer or model, else an EOS."""
    config = getattr(getattr(lm.target, "model", None), "config", None)
    for start in (getattr(lm.tokenizer, "bos_token_id", None), getattr(config, "bos_token_id", None), *lm.end_ids):
        if isinstance(start, int):
            return start
    raise UsageError(
        "this model has neither a chat template nor a BOS or EOS token to start from; give prompts with --source jsonl or text"
    )


def _common(rows: list[list[int]]) -> tuple[int, ...]:
    shared = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return tuple(shared)


class RecordSource:
    """Records with "messages", "prompt" (a user's turn, or token ids) or "text" (a document: its first tokens), one key each."""

    opening: Opening | None = None

    def __init__(
        self,
        lm: SpeculativeLM,
        records: Callable[[], Iterable[Mapping[str, Any]]],
        about: dict[str, Any],
        *,
        longest: int,
        text_tokens: int = 64,
    ) -> None:
        if longest < 1 or text_tokens < 1:
            raise UsageError("no room is left for prompts: raise --max-model-len, or lower --max-tokens")
        self.lm, self.records, self.longest, self.text_tokens = lm, records, longest, min(text_tokens, longest)
        self.about = about | {"text_tokens": self.text_tokens, "longest_prompt": longest}

    def prompts(self, known: Container[int]) -> Iterator[Prompt]:
        found = 0
        for found, record in enumerate(self.records(), 1):
            if found - 1 not in known:
                yield self._prompt(found - 1, record)
        if not found:
            raise UsageError(f"{self.about.get('input')} holds no prompts")

    def documents(self) -> Iterator[tuple[int, ...]]:
        """Every record as it stands, whole: for learning from texts themselves."""
        for key, record in enumerate(self.records()):
            field = self._field(key, record)
            yield self._tokens(record[field], field, key, whole=True)

    def _field(self, key: int, record: Mapping[str, Any]) -> str:
        field = next((f for f in FIELDS if record.get(f) is not None), None)
        if field is None:
            raise UsageError(
                f"record {key} of {self.about.get('input')} has none of the fields {', '.join(FIELDS)}, but {', '.join(record) or 'none'}"
            )
        return field

    def _prompt(self, key: int, record: Mapping[str, Any]) -> Prompt:
        field = self._field(key, record)
        value = record[field]
        document = field in ("text", "article")
        ids = self._tokens(value, field, key)
        if document and len(ids) > self.text_tokens:
            return Prompt(key, ids[: self.text_tokens], cut=True)
        return Prompt(key, ids, refused=EMPTY if not ids else TOO_LONG if len(ids) > self.longest else "")

    def _tokens(self, value: Any, field: str, key: int, whole: bool = False) -> tuple[int, ...]:
        if field == "prompt" and isinstance(value, list) and all(isinstance(i, int) for i in value):
            outside = next((i for i in value if not 0 <= i < self.lm.target.info.vocab_size), None)
            if outside is not None:
                raise UsageError(f"record {key}: token id {outside} is outside the target's vocabulary of {self.lm.target.info.vocab_size}")
            return tuple(value)
        if self.lm.tokenizer is None:
            raise UsageError('the model has no tokenizer, which text needs; give token ids instead: {"prompt": [1, 2, 3]}')
        if field == "messages":
            answered = value and isinstance(value, list) and isinstance(value[-1], Mapping) and value[-1].get("role") == "assistant"
            if whole and answered:
                return tuple(self.lm.render(value, answered=True))
            return tuple(self.lm.render(value[:-1] if answered else value))
        if not isinstance(value, str):
            raise UsageError(f"record {key} of {self.about.get('input')}: {field} must be text, not {type(value).__name__}")
        if not value.strip():
            return ()
        if field == "prompt" and getattr(self.lm.tokenizer, "chat_template", None):
            return tuple(self.lm.render([{"role": "user", "content": value}]))
        return tuple(int(i) for i in self.lm.tokenizer(value, verbose=False)["input_ids"])


def source(
    lm: SpeculativeLM, kind: str, path: Path | None = None, dataset: str | None = None, *, longest: int, text_tokens: int = 64
) -> Source:
    """The source called `kind` (self, jsonl, text), or a data set. Raises UsageError for what is missing."""
    if dataset is not None:
        return RecordSource(
            lm, lambda: read_dataset(dataset), {"kind": "dataset", "input": dataset}, longest=longest, text_tokens=text_tokens
        )
    if kind == "self":
        return SelfSource(lm, min(QUESTION_TOKENS, longest))
    readers = {"jsonl": read_jsonl, "text": read_texts}
    if kind not in readers:
        raise UsageError(f"unknown source {kind!r}; known are self, {', '.join(readers)} (or a data set with --dataset)")
    if path is None:
        raise UsageError(f"--source {kind} needs --input PATH")
    if not path.exists():
        raise UsageError(f"no such file: {path}")
    about = {"kind": kind, "input": path.name, "input_sha256": _content(path)}
    return RecordSource(lm, lambda: readers[kind](path), about, longest=longest, text_tokens=text_tokens)


def _content(path: Path) -> str:
    """Of the input itself: a key means nothing once its record is another."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
