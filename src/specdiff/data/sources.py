"""What the target's corpus starts from: its own empty user turn, or prompts and documents someone has.

A source gives numbered prompts: the number is the text's key, so it must mean the same prompt in every run.
"""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from specdiff import files
from specdiff.data.records import (
    FIELDS,
    Record,
    RecordError,
    prompt_of,
    read_dataset,
    read_jsonl,
    read_texts,
)
from specdiff.errors import UsageError
from specdiff.text.lm import SpeculativeLM

TOO_LONG, EMPTY = "prompt-too-long", "prompt-empty"
REFUSED, UNKNOWN_ID = "template-refused", "token-id-unknown"
QUESTION_TOKENS = 128  # longer questions of a small model are mostly rambling
OPENING_TOKENS = (
    8  # without a template, this many tokens sampled at temperature 1 keep greedy texts apart
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens a text begins with. `cut`: a document's first tokens only.

    `refused`: why it cannot be used, else empty; `detail` says it of this record, by name.
    """

    key: int
    ids: tuple[int, ...]
    cut: bool = False
    refused: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole text, numbered by its record. `refused` and `detail` as in Prompt."""

    key: int
    ids: tuple[int, ...]
    refused: str = ""
    detail: str = ""


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
    rendered = [
        lm.render([{"role": "user", "content": content}])
        for content in ("Apples", "7 dogs?", "(why", "über alles!")
    ]
    prefix, suffix = _common(rendered), _common([r[::-1] for r in rendered])[::-1]
    if not prefix or not suffix:
        raise UsageError(
            "the chat template puts nothing before or behind the user's words; give prompts with --source jsonl or text"
        )
    return prefix, suffix


def start_token(lm: SpeculativeLM) -> int:
    """BOS of tokenizer or model, else an EOS."""
    config = getattr(getattr(lm.target, "model", None), "config", None)
    for start in (
        getattr(lm.tokenizer, "bos_token_id", None),
        getattr(config, "bos_token_id", None),
        *lm.end_ids,
    ):
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
    """Records with "messages", "prompt" (a user's turn, or token ids) or "text" (a document: its first tokens), one key each.

    A record that cannot be used is a refused prompt; with `strict` it is a RecordError.
    """

    opening: Opening | None = None

    def __init__(
        self,
        lm: SpeculativeLM,
        records: Callable[[], Iterable[Record]],
        about: dict[str, Any],
        *,
        longest: int,
        text_tokens: int = 64,
        strict: bool = False,
    ) -> None:
        if longest < 1 or text_tokens < 1:
            raise UsageError(
                "no room is left for prompts: raise --max-model-len, or lower --max-tokens"
            )
        self.lm = lm
        self.records = records
        self.longest = longest
        self.text_tokens = min(text_tokens, longest)
        self.strict = strict
        self.about = about | {"text_tokens": self.text_tokens, "longest_prompt": longest}

    def prompts(self, known: Container[int]) -> Iterator[Prompt]:
        count = 0
        for key, record in enumerate(self.records()):
            count += 1
            if key not in known:
                yield self._prompt(key, record)
        if not count:
            raise UsageError(f"{self.about.get('input')} holds no prompts")

    def documents(self) -> Iterator[Document]:
        """Every record as it stands, whole: for learning from texts themselves."""
        for key, record in enumerate(self.records()):
            try:
                yield Document(key, self._tokens(record, whole=True)[1])
            except RecordError as error:
                if self.strict:
                    raise
                yield Document(key, (), error.kind, str(error))

    def _prompt(self, key: int, record: Record) -> Prompt:
        try:
            field, ids = self._tokens(record)
        except RecordError as error:
            if self.strict:
                raise
            return Prompt(key, (), refused=error.kind, detail=str(error))
        if field in ("text", "article") and len(ids) > self.text_tokens:
            return Prompt(key, ids[: self.text_tokens], cut=True)
        if not ids:
            return Prompt(key, (), refused=EMPTY)
        return Prompt(key, ids, refused=TOO_LONG if len(ids) > self.longest else "")

    def _tokens(self, record: Record, whole: bool = False) -> tuple[str, tuple[int, ...]]:
        """The record's field, and the tokens of what stands there. Raises RecordError; UsageError if the model cannot read any."""
        field, body = prompt_of(record, FIELDS)
        if isinstance(body, list) and isinstance(body[0], int):
            return field, self._ids(body, record.place)
        if self.lm.tokenizer is None:
            raise UsageError(
                'the model has no tokenizer, which text needs; give token ids instead: {"prompt": [1, 2, 3]}'
            )
        if isinstance(body, list):
            return field, self._rendered(body, record.place, whole)
        if not body.strip():
            return field, ()
        if field == "prompt" and getattr(self.lm.tokenizer, "chat_template", None):
            return field, self._rendered(
                [{"role": "user", "content": body}], record.place, whole=False
            )
        return field, tuple(self.lm.raw_ids(body))

    def _ids(self, ids: list[Any], place: str) -> tuple[int, ...]:
        size = self.lm.target.info.vocab_size
        outside = next((i for i in ids if not 0 <= i < size), None)
        if outside is not None:
            raise RecordError(
                UNKNOWN_ID,
                f"{place}: token id {outside} is outside the target's vocabulary of {size}",
            )
        return tuple(ids)

    def _rendered(self, messages: list[Any], place: str, whole: bool) -> tuple[int, ...]:
        """`whole`: with the last answer, if there is one; else up to where it would begin."""
        if not getattr(self.lm.tokenizer, "chat_template", None):
            raise UsageError(
                'this model has no chat template, which messages need; give the text as {"prompt": ...}'
            )
        answered = messages[-1]["role"] == "assistant"
        try:
            if whole and answered:
                return tuple(self.lm.render(messages, answered=True))
            return tuple(self.lm.render(messages[:-1] if answered else messages))
        except UsageError as error:
            raise RecordError(REFUSED, f"{place}: {error}") from error


def source(
    lm: SpeculativeLM,
    kind: str,
    path: Path | None = None,
    dataset: str | None = None,
    *,
    longest: int,
    text_tokens: int = 64,
    strict: bool = False,
) -> Source:
    """The source called `kind` (self, jsonl, text), or a data set. Raises UsageError for what is missing."""
    if dataset is not None:
        about = {"kind": "dataset", "input": dataset}
        return RecordSource(
            lm,
            lambda: read_dataset(dataset),
            about,
            longest=longest,
            text_tokens=text_tokens,
            strict=strict,
        )
    if kind == "self":
        return SelfSource(lm, min(QUESTION_TOKENS, longest))
    readers = {"jsonl": read_jsonl, "text": read_texts}
    if kind not in readers:
        raise UsageError(
            f"unknown source {kind!r}; known are self, {', '.join(readers)} (or a data set with --dataset)"
        )
    if path is None:
        raise UsageError(f"--source {kind} needs --input PATH")
    if not path.exists():
        raise UsageError(f"no such file: {path}")
    if path.is_dir() and kind == "jsonl":
        raise UsageError(f"{path} is a folder; name a file in it")
    about = {"kind": kind, "input": path.name, "input_sha256": _content(path)}
    return RecordSource(
        lm,
        lambda: readers[kind](path),
        about,
        longest=longest,
        text_tokens=text_tokens,
        strict=strict,
    )


def _content(path: Path) -> str:
    """Of the input itself: a key means nothing once its record is another."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        digest.update(bytes.fromhex(files.digest(file)))
    return digest.hexdigest()
