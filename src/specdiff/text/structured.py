"""Structured output: JSON schemas, regular expressions, grammars and choices, compiled for a
tokenizer (llguidance)."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from transformers import PreTrainedTokenizerFast

from specdiff.errors import MissingExtraError, UsageError
from specdiff.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Format = Literal["json_schema", "regex", "grammar", "choice"]  # options, and llguidance's names
T = TypeVar("T")

LONGEST = 1 << 16  # characters of a grammar; the masks of a longer one may take seconds
MESSAGE = 400  # characters of the library's; a fault of its own adds a long backtrace
STACK_BYTES = 512 << 20  # reserved, not used
STACK = threading.Lock()
FORMATS: tuple[Format, ...] = get_args(Format)


class GrammarCompiler:
    """Compiles grammars over the tokens of `tokenizer`.

    Args:
        vocab_size: of the target. Ids that the tokenizer does not have are never allowed.
        end_ids: the tokens that may follow a complete answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_ids = end_ids

    def compile(self, option: Format, source: Any) -> Grammar:
        """The grammar of an option of `FORMATS` and its value, which `Options` has checked.

        Raises UsageError with the library's message, and MissingExtraError.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits, grammar_from
        except ImportError as error:
            raise MissingExtraError(
                f"{option} needs an extra: pip install 'specdiff[structured]'"
            ) from error
        text = _text(option, source)
        tokenizer = self._tokenizer
        limits = LLParserLimits(verbose_errors=False)  # its errors would quote the text so far

        words = -(-tokenizer.vocab_size // 32)

        def build() -> LLMatcher:
            matcher = LLMatcher(tokenizer, grammar_from(option, text), log_level=0, limits=limits)
            if not matcher.is_error():
                _warm(matcher, words)
            return matcher

        try:
            matcher = deep(build)
        except ValueError as error:
            raise UsageError(f"{option} is not valid: {error}", param=option) from None
        if matcher.is_error():
            reason = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
            raise UsageError(f"{option} is not valid: {reason[:MESSAGE]}", param=option)
        return Grammar(matcher, words)

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        """The library's own tokenizer; building it takes about a second."""
        from llguidance import LLTokenizer

        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise UsageError(
                "structured output needs a fast tokenizer (tokenizer.json), "
                f"not {type(self.tokenizer).__name__}"
            )
        if not self.end_ids:
            raise UsageError("structured output needs a model with an end-of-text token")
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        description |= {"padding": None, "truncation": None}
        size = max(self.vocab_size, len(self.tokenizer))
        return LLTokenizer(
            json.dumps(description), n_vocab=size, eos_token=list(dict.fromkeys(self.end_ids))
        )


def _warm(matcher: "LLMatcher", words: int) -> None:
    """Compute a first mask here, not in a round that others share.

    It builds the automata that all copies of the matcher use.
    """
    from llguidance.numpy import fill_next_token_bitmask

    fill_next_token_bitmask(matcher.deep_copy(), np.zeros((1, words), dtype=np.int32), 0)


def deep(call: Callable[[], T]) -> T:
    """Run `call` in a thread whose stack holds a deeply nested grammar of LONGEST characters.

    The library recurses, and the stack of an ordinary thread ends with the process.
    """
    with STACK:  # its size is that of all new threads
        usual = threading.stack_size(STACK_BYTES)
        try:
            pool = ThreadPoolExecutor(1)
            result = pool.submit(call)  # starts the thread
        finally:
            threading.stack_size(usual)
    with pool:
        return result.result()


def _text(option: Format, source: Any) -> str:
    """The source of a grammar as the library reads it. Raises UsageError."""
    try:
        text = source if isinstance(source, str) else json.dumps(source)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{option} is not valid JSON ({error})", param=option) from None
    if len(text) > LONGEST:
        raise UsageError(
            f"{option} has {len(text)} characters; at most {LONGEST} are compiled", param=option
        )
    return text


def structure(options: Mapping[str, Any]) -> tuple[Format, Any] | None:
    """The option that asks for structured output, and its value; None if there is none.

    Raises UsageError for several, and for a value of the wrong kind.
    """
    requested = [name for name in FORMATS if options.get(name) is not None]
    if not requested:
        return None
    if len(requested) > 1:
        raise UsageError(
            f"an answer has one structure, not {' and '.join(requested)}", param=requested[1]
        )
    name = requested[0]
    value = options[name]
    if name == "choice":
        valid = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value)
        if not valid or not all(isinstance(text, str) and text for text in value):
            raise UsageError("choice must be a list of non-empty strings", param=name)
        return name, list(value)
    if name == "json_schema" and isinstance(value, (Mapping, bool)):
        return name, dict(value) if isinstance(value, Mapping) else value
    if not isinstance(value, str):
        kind = "a mapping or JSON text" if name == "json_schema" else "a string"
        raise UsageError(f"{name} must be {kind}, not {type(value).__name__}", param=name)
    if name == "json_schema":
        try:
            return name, json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"json_schema is not valid JSON ({error})", param=name) from None
    return name, value
