"""Text of a growing token list, without ever showing half a character, up to the first stop string."""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from specdiff.errors import UsageError
from specdiff.unicode import valid

MOST_STOPS = 16
LONGEST_STOP = 256  # characters
UNFINISHED = "\ufffd"  # what tokenizers give for the bytes of half a character
FIRST_MARK = 0xD800  # marks are lone surrogates: no decoded text holds one


class StopStrings:
    """Cuts text, in whatever pieces it comes, at the stop string that is complete first (of several the longest).

    Where that is depends on the text alone, not on the pieces. What could still become a stop string is held back.

    Text leaves special tokens out. So that a stop string with special tokens can be met, `marks` gives each of them a
    character that stands for the token in the text that comes in; marks are never shown.

    Args:
        stops: a string, or several.
        include: the text ends with the stop string, not before it.
        special: the strings of the tokenizer's special tokens.

    Raises UsageError for more than 16 strings, and for empty ones or such of more than 256 characters.
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
        self.held = ""
        self.found = False
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
        """The text that may be shown now; nothing once a stop string was `found`."""
        if self.found:
            return ""
        text = self.held + text
        marks = frozenset(self.marks.values())
        places = (
            [at for at, character in enumerate(text) if character not in marks]
            if marks
            else range(len(text))
        )
        shown = self._shown(text)
        matches = []
        keep = len(text)
        for pattern, stop in self._patterns:
            marked = not marks.isdisjoint(pattern)
            where = text if marked else shown
            index = range(len(text)) if marked else places
            at = where.find(pattern)
            if at >= 0:
                matches.append((index[at + len(pattern) - 1] + 1, index[at], stop))
            for size in range(min(len(where), len(pattern) - 1), 0, -1):
                if where.endswith(pattern[:size]):
                    keep = min(keep, index[len(where) - size])
                    break
        if matches:
            _, begin, stop = min(matches)
            self.found = True
            self.held = ""
            return self._shown(text[:begin]) + (stop if self.include else "")
        self.held = text[keep:]
        return self._shown(text[:keep])

    def ends(self, text: str) -> bool:
        """Whether a stop string would be complete with `text`."""
        trial = copy.copy(self)
        trial.add(text)
        return trial.found

    def finish(self) -> str:
        """What was held back for nothing."""
        rest = self._shown(self.held)
        self.held = ""
        return rest

    def _shown(self, text: str) -> str:
        return (
            text.translate({ord(mark): None for mark in self.marks.values()})
            if self.marks
            else text
        )


def _checked(stops: list[str]) -> list[str]:
    if len(stops) > MOST_STOPS:
        raise UsageError(f"stop may hold at most {MOST_STOPS} strings, not {len(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"stop must hold strings of at least one character, not {stop!r}")
        if len(stop) > LONGEST_STOP:
            raise UsageError(
                f"stop strings may have at most {LONGEST_STOP} characters, not {len(stop)} ({stop[:24]!r}...)"
            )
    return [valid(stop) for stop in stops]


class Detokenizer:
    """`add` gives the text a token completes, `finish` what is left; `stopped` once a stop string ended the text.

    Args:
        decode: token ids to text, without special tokens.
        stops: where the text ends.
        late: nobody reads along and nothing stops, so all text comes with `finish`, from one decode.
        special: the special tokens that `decode` leaves out, as id -> string.
        byte_tokens: ids of byte-fallback tokens. One bad byte spoils the whole run of them it stands in, so their text is
            shown when the run has ended.
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
        self.read = ""
        self.open = False  # a run of byte tokens has not ended
        self.marks: list[
            tuple[int, str]
        ] = []  # special tokens among text not shown yet, and where in it
        self.start = 0  # decode from here: some context, for tokenizers that look left
        self.settled = 0
        self.ahead = 0  # characters shown of tokens that are not settled

    @property
    def stopped(self) -> bool:
        return self.stops.found

    def add(self, token: int) -> str:
        self.ids.append(token)
        if self.late:
            return ""
        if token in self.byte_tokens:
            self.open = True
        elif token not in self.special:
            self.open = False
        old = self.decode(self.ids[self.start : self.settled])
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
            return self._show(pending)  # nothing comes after this that could change it
        whole = "" if self.open else pending.rstrip(UNFINISHED)
        self.ahead += len(whole)
        if len(new) > len(old) and not self.open and not new.endswith(UNFINISHED):
            self.start = self.settled
            self.settled = len(self.ids)
            self.ahead = 0
        return self._show(whole)

    def finish(self) -> str:
        return self._show(self.decode(self.ids)[len(self.read) :]) + self.stops.finish()

    def _show(self, text: str) -> str:
        self.read += text
        marked = self._marked(text)
        self.marks = [(at - len(text), mark) for at, mark in self.marks if at > len(text)]
        return self.stops.add(marked)

    def _marked(self, text: str) -> str:
        """`text` with the marks of the special tokens that stand in it."""
        for at, mark in reversed(self.marks):
            if at <= len(text):
                text = text[:at] + mark + text[at:]
        return text
