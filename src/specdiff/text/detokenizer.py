"""Incremental detokenization: the text of a growing token list, up to the first stop string."""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from specdiff.errors import UsageError
from specdiff.unicode import valid

MOST_STOPS = 16
LONGEST_STOP = 256  # characters
UNFINISHED = "\ufffd"  # decoded from the bytes of an incomplete character
FIRST_MARK = 0xD800  # marks are lone surrogates, which no decoded text contains


class StopStrings:
    """Cuts streamed text at the stop string that completes first (the longest, in a tie).

    The cut depends on the text alone, not on how it is split. A possible beginning of a stop string
    is buffered until it is clear whether the stop string follows.

    Text omits special tokens. To match a stop string that contains some, `marks` assigns each of
    them a character that stands for the token in the incoming text; marks are never returned.

    Args:
        stops: one string or several.
        include: end the text with the stop string instead of before it.
        special: the strings of the tokenizer's special tokens.

    Raises UsageError for more than 16 strings, for empty ones and for ones over 256 characters.
    """

    def __init__(
        self,
        stops: str | Sequence[str],
        *,
        include: bool = False,
        special: Collection[str] = (),
    ) -> None:
        self.stops = _checked([stops] if isinstance(stops, str) else [*stops])
        self.include = include
        self.buffer = ""
        self.complete = False
        self.marks: dict[str, str] = {}
        self._patterns = [(stop, stop) for stop in self.stops]
        if special and self.stops:
            names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
            for stop in self.stops:
                pattern = re.sub(names, lambda match: self._mark(match[0]), stop)
                if pattern != stop:
                    self._patterns.append((pattern, stop))

    def _mark(self, name: str) -> str:
        return self.marks.setdefault(name, chr(FIRST_MARK + len(self.marks)))

    def add(self, text: str) -> str:
        """The text that can be returned now; empty once a stop string is `complete`."""
        if self.complete:
            return ""
        text = self.buffer + text
        marks = frozenset(self.marks.values())
        unmarked = [at for at, character in enumerate(text) if character not in marks]
        plain = self._plain(text)
        matches = []
        keep = len(text)
        for pattern, stop in self._patterns:
            marked = not marks.isdisjoint(pattern)
            haystack = text if marked else plain
            index = range(len(text)) if marked else unmarked
            at = haystack.find(pattern)
            if at >= 0:
                matches.append((index[at + len(pattern) - 1] + 1, index[at], stop))
            for size in range(min(len(haystack), len(pattern) - 1), 0, -1):
                if haystack.endswith(pattern[:size]):
                    keep = min(keep, index[len(haystack) - size])
                    break
        if matches:
            _, begin, stop = min(matches)
            self.complete = True
            self.buffer = ""
            return self._plain(text[:begin]) + (stop if self.include else "")
        self.buffer = text[keep:]
        return self._plain(text[:keep])

    def ends(self, text: str) -> bool:
        """Whether `text` would complete a stop string."""
        trial = copy.copy(self)
        trial.add(text)
        return trial.complete

    def finish(self) -> str:
        """The buffered text, which no stop string followed."""
        text = self._plain(self.buffer)
        self.buffer = ""
        return text

    def _plain(self, text: str) -> str:
        """`text` without marks."""
        if not self.marks:
            return text
        return text.translate({ord(mark): None for mark in self.marks.values()})


def _checked(stops: list[str]) -> list[str]:
    if len(stops) > MOST_STOPS:
        raise UsageError(
            f"stop may hold at most {MOST_STOPS} strings, not {len(stops)}", param="stop"
        )
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UsageError(
                f"stop must hold strings of at least one character, not {stop!r}", param="stop"
            )
        if len(stop) > LONGEST_STOP:
            raise UsageError(
                f"stop strings may have at most {LONGEST_STOP} characters, "
                f"not {len(stop)} ({stop[:24]!r}...)",
                param="stop",
            )
    return [valid(stop) for stop in stops]


class Detokenizer:
    """Decodes tokens one at a time, and never returns part of a character.

    Args:
        decode: token ids to text, without special tokens.
        stops: the stop strings that end the text.
        late: return all text from `finish`, decoded once; for answers that are not streamed and
            have no stop strings.
        special: the special tokens that `decode` omits, as id -> string.
        byte_tokens: ids of byte-fallback tokens. One invalid byte changes the text of the whole run
            of them around it, so their text is returned when the run has ended.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: StopStrings | None = None,
        *,
        late: bool = False,
        special: Mapping[int, str] | None = None,
        byte_tokens: Collection[int] = (),
    ) -> None:
        self.decode = decode
        self.stops = stops or StopStrings(())
        self.late = late
        self.special = special or {}
        self.byte_tokens = byte_tokens
        self.ids: list[int] = []
        self.length = 0  # characters decoded so far
        self.open = False  # inside a run of byte tokens
        self.marks: list[tuple[int, str]] = []  # special tokens in the pending text: (place, mark)
        self.start = 0  # decode from this token: context for tokenizers that look left
        self.boundary = 0  # the text of the tokens before it is final
        self.ahead = 0  # characters decoded beyond the boundary

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stops.complete

    def add(self, token: int) -> str:
        """The text that `token` completes."""
        self.ids.append(token)
        if self.late:
            return ""
        if token in self.byte_tokens:
            self.open = True
        elif token not in self.special:
            self.open = False
        old = self.decode(self.ids[self.start : self.boundary])
        new = self.decode(self.ids[self.start :])
        pending = new[len(old) + self.ahead :]
        mark = self.stops.marks.get(self.special.get(token, ""))
        if mark is not None:
            self.marks.append((len(pending), mark))
        if (
            (self.open or mark is not None)
            and self.stops.stops
            and self.stops.ends(self._marked(pending))
        ):
            return self._emit(pending)  # no later token can change it
        whole = "" if self.open else pending.rstrip(UNFINISHED)
        self.ahead += len(whole)
        if len(new) > len(old) and not self.open and not new.endswith(UNFINISHED):
            self.start = self.boundary
            self.boundary = len(self.ids)
            self.ahead = 0
        return self._emit(whole)

    def finish(self) -> str:
        """The remaining text."""
        return self._emit(self.decode(self.ids)[self.length :]) + self.stops.finish()

    def _emit(self, text: str) -> str:
        self.length += len(text)
        marked = self._marked(text)
        self.marks = [(at - len(text), mark) for at, mark in self.marks if at > len(text)]
        return self.stops.add(marked)

    def _marked(self, text: str) -> str:
        """`text` with the marks of the special tokens in it."""
        for at, mark in reversed(self.marks):
            if at <= len(text):
                text = text[:at] + mark + text[at:]
        return text


def hidden_tokens(tokenizer: Any) -> tuple[Mapping[int, str], frozenset[int]]:
    """A tokenizer's special tokens, which text omits, and the ids of its byte-fallback tokens."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token: entry.content for token, entry in added if entry.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return special, frozenset(i for i in ids if i is not None and i != tokenizer.unk_token_id)
