"""Text of a growing token list, without ever showing half a character, up to the first stop string."""

from collections.abc import Callable, Sequence

from specdiff.errors import UsageError

MOST_STOPS = 16
LONGEST_STOP = 256  # characters
UNFINISHED = "\ufffd"  # what tokenizers give for the bytes of half a character


class StopStrings:
    """Cuts text, in whatever pieces it comes, at the stop string that is complete first (of several the longest).

    Where that is depends on the text alone, not on the pieces. What could still become a stop string is held back.
    Raises UsageError for more than 16 strings, and for empty ones or such of more than 256 characters.
    """

    def __init__(self, stops: str | Sequence[str], *, include: bool = False) -> None:
        self.stops, self.include, self.held, self.found = [stops] if isinstance(stops, str) else [*stops], include, "", False
        if len(self.stops) > MOST_STOPS:
            raise UsageError(f"stop may hold at most {MOST_STOPS} strings, not {len(self.stops)}")
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise UsageError(f"stop must hold strings of at least one character, not {stop!r}")
            if len(stop) > LONGEST_STOP:
                raise UsageError(f"stop strings may have at most {LONGEST_STOP} characters, not {len(stop)} ({stop[:24]!r}...)")

    def add(self, text: str) -> str:
        """The text that may be shown now; nothing once a stop string was `found`."""
        if self.found:
            return ""
        text = self.held + text
        ends = [(at + len(stop), -len(stop)) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            end, back = min(ends)
            self.found, self.held = True, ""
            return text[: end if self.include else end + back]
        most = min(len(text), max(map(len, self.stops), default=1) - 1)
        keep = next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back for nothing."""
        rest, self.held = self.held, ""
        return rest


class Detokenizer:
    """`add` gives the text a token completes, `finish` what is left; `stopped` once a stop string ended the text.

    late: nobody reads along and nothing stops, so all text comes with `finish`, from one decode.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: StopStrings | None = None, *, late: bool = False) -> None:
        self.decode, self.stops, self.late, self.ids, self.read = decode, stops or StopStrings(()), late, list[int](), ""
        self.start = self.settled = self.ahead = 0  # decode from `start`: some context, for tokenizers that look left

    @property
    def stopped(self) -> bool:
        return self.stops.found

    def add(self, token: int) -> str:
        self.ids.append(token)
        if self.late:
            return ""
        old, new = self.decode(self.ids[self.start : self.settled]), self.decode(self.ids[self.start :])
        whole = new.rstrip(UNFINISHED)
        piece = whole[len(old) + self.ahead :]  # `ahead`: characters shown of tokens that are not settled
        self.ahead += len(piece)
        if whole == new and len(new) > len(old):
            self.start, self.settled, self.ahead = self.settled, len(self.ids), 0
        self.read += piece
        return self.stops.add(piece)

    def finish(self) -> str:
        rest = self.decode(self.ids)[len(self.read) :]
        self.read += rest
        return self.stops.add(rest) + self.stops.finish()
