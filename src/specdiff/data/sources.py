"""Sources of a corpus: the target's own empty user turn, or existing prompts and documents.

A source numbers its prompts. The number is the key of the text, so it must stand for the same
prompt in every run.
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

TOO_LONG = "prompt-too-long"
EMPTY = "prompt-empty"
REFUSED = "template-refused"
UNKNOWN_ID = "token-id-unknown"
QUESTION_TOKENS = 128  # longer questions of a small model mostly ramble
OPENING_TOKENS = 8  # without a template, sampled at temperature 1 so that greedy texts differ


@dataclass(frozen=True, slots=True)
class SourcePrompt:
    """The tokens a text begins with. `cut`: only the first tokens of a document.

    `reason`: why the prompt is unusable, else empty; `detail` explains it and names the record.
    """

    key: int
    ids: tuple[int, ...]
    cut: bool = False
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole text, numbered by its record. `reason` and `detail` as in SourcePrompt."""

    key: int
    ids: tuple[int, ...]
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Opening:
    """The part of a prompt that the target writes itself: up to `limit` tokens at temperature 1.

    With `ends` it must end in one of these tokens, and `header` follows; without, it must have
    `limit` tokens.
    """

    limit: int
    ends: tuple[int, ...] = ()
    header: tuple[int, ...] = ()


class Source(Protocol):
    """Numbered prompts of at most `longest` tokens, opening included.

    `about` describes the source in the manifest.
    """

    about: dict[str, Any]
    longest: int
    opening: Opening | None

    def prompts(self, skip: Container[int]) -> Iterator[SourcePrompt]:
        """The prompts in order, without those whose keys are in `skip`."""
        ...


class SelfSource:
    """The target's empty user turn: it writes the question too.

    Without a chat template: its BOS (or EOS) token.
    """

    def __init__(self, lm: SpeculativeLM, question_tokens: int = QUESTION_TOKENS) -> None:
        if getattr(lm.tokenizer, "chat_template", None):
            self.prefix, suffix = user_turn(lm)
            self.opening: Opening | None = Opening(question_tokens, suffix[:1], suffix[1:])
        else:
            self.prefix = (start_token(lm),)
            self.opening = Opening(OPENING_TOKENS)
        self.longest = len(self.prefix) + self.opening.limit + len(self.opening.header)
        self.about: dict[str, Any] = {"kind": "self", "opening_tokens": self.opening.limit}

    def prompts(self, skip: Container[int]) -> Iterator[SourcePrompt]:
        return (SourcePrompt(key, self.prefix) for key in count() if key not in skip)


def first_prompt(source: Source) -> SourcePrompt:
    """The first usable prompt. Raises UsageError if there is none, with the reason."""
    why = ""
    for prompt in source.prompts(()):
        if not prompt.reason:
            return prompt
        why = why or f" (the first: {prompt.detail or prompt.reason})"
    raise UsageError(f"the source holds no usable prompt{why}")


def user_turn(lm: SpeculativeLM) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The chat template's tokens before a user's content, and from its end to the answer."""
    contents = ("Apples", "7 dogs?", "(why", "über alles!")
    rows = [lm.render([{"role": "user", "content": content}]) for content in contents]
    prefix = _common(rows)
    suffix = _common([row[::-1] for row in rows])[::-1]
    if not prefix or not suffix:
        raise UsageError(
            "the chat template puts nothing before or after the user's content; "
            "give prompts with --source jsonl or text"
        )
    return prefix, suffix


def start_token(lm: SpeculativeLM) -> int:
    """BOS of the tokenizer or model, else an EOS."""
    config = getattr(getattr(lm.target, "model", None), "config", None)
    starts = [getattr(owner, "bos_token_id", None) for owner in (lm.tokenizer, config)]
    for start in (*starts, *lm.end_ids):
        if isinstance(start, int):
            return start
    raise UsageError(
        "this model has neither a chat template nor a BOS or EOS token to start from; "
        "give prompts with --source jsonl or text"
    )


def _common(rows: list[list[int]]) -> tuple[int, ...]:
    """The longest common prefix."""
    shared = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return tuple(shared)


class RecordSource:
    """Records with "messages", "prompt" (a user's turn, or token ids) or "text" (a document).

    Of a document the first `text_tokens` tokens become the prompt. An unusable record gives a
    prompt with a reason; with `strict` it raises RecordError.
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

    def prompts(self, skip: Container[int]) -> Iterator[SourcePrompt]:
        empty = True
        for key, record in enumerate(self.records()):
            empty = False
            if key not in skip:
                yield self._prompt(key, record)
        if empty:
            raise UsageError(f"{self.about.get('input')} holds no prompts")

    def documents(self) -> Iterator[Document]:
        """Every record as a whole text."""
        for key, record in enumerate(self.records()):
            try:
                yield Document(key, self._tokens(record, whole=True)[1])
            except RecordError as error:
                if self.strict:
                    raise
                yield Document(key, (), error.kind, str(error))

    def _prompt(self, key: int, record: Record) -> SourcePrompt:
        try:
            field, ids = self._tokens(record)
        except RecordError as error:
            if self.strict:
                raise
            return SourcePrompt(key, (), reason=error.kind, detail=str(error))
        if field in ("text", "article") and len(ids) > self.text_tokens:
            return SourcePrompt(key, ids[: self.text_tokens], cut=True)
        if not ids:
            return SourcePrompt(key, (), reason=EMPTY)
        return SourcePrompt(key, ids, reason=TOO_LONG if len(ids) > self.longest else "")

    def _tokens(self, record: Record, whole: bool = False) -> tuple[str, tuple[int, ...]]:
        """The record's field and its tokens.

        Raises RecordError, or UsageError if the model cannot read such records at all.
        """
        field, body = prompt_of(record, FIELDS)
        if isinstance(body, list) and isinstance(body[0], int):
            return field, self._ids(body, record.place)
        if self.lm.tokenizer is None:
            raise UsageError(
                "the model has no tokenizer, which text needs; "
                'give token ids instead: {"prompt": [1, 2, 3]}'
            )
        if isinstance(body, list):
            return field, self._rendered(body, record.place, whole)
        if not body.strip():
            return field, ()
        if field == "prompt" and getattr(self.lm.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": body}]
            return field, self._rendered(messages, record.place, whole=False)
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
        """`whole`: including the final answer, if there is one; else up to its beginning."""
        if not getattr(self.lm.tokenizer, "chat_template", None):
            raise UsageError(
                "this model has no chat template, which messages need; "
                'give the text as {"prompt": ...}'
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
    """The source named `kind` (self, jsonl, text), or a data set.

    Raises UsageError for an unknown kind or a missing input.
    """
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
            f"unknown source {kind!r}; known are self, {', '.join(readers)} "
            f"(or a data set with --dataset)"
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
    """SHA-256 of the input: a key means nothing once its record has changed."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        digest.update(bytes.fromhex(files.digest(file)))
    return digest.hexdigest()
