"""Text of a growing token list, without ever showing half a character."""

from collections.abc import Callable, Sequence


class Detokenizer:
    """`add` gives the text a token completes (held back while it ends inside a character), `finish` what is left."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.ids, self.shown = decode, list[int](), ""
        self.start = self.settled = 0  # decode from `start`: a few tokens of context, for tokenizers that look left

    def add(self, token: int) -> str:
        self.ids.append(token)
        old, new = self.decode(self.ids[self.start : self.settled]), self.decode(self.ids[self.start :])
        if new.endswith("\ufffd") or len(new) <= len(old):
            return ""
        self.start, self.settled = self.settled, len(self.ids)
        self.shown += new[len(old) :]
        return new[len(old) :]

    def finish(self) -> str:
        rest = self.decode(self.ids)[len(self.shown) :]
        self.shown += rest
        return rest
