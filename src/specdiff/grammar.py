"""Grammars of llguidance: which tokens may follow an answer, as packed masks.

Shapes: R matchers, N positions, W 32-bit words of a mask (bit i of word w is token 32 w + i).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

ALL = -1  # a word whose 32 tokens are all allowed


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar. `start` is its matcher before any token, which is never advanced."""

    start: "LLMatcher"
    words: int

    def matcher(self, tokens: Sequence[int] = ()) -> "LLMatcher":
        """A matcher of its own after `tokens`."""
        matcher = self.start.deep_copy()
        if tokens:
            matcher.consume_tokens(list(tokens))
        return matcher


class Matcher:
    """Where one answer stands in its grammar. `tokens` are those committed so far.

    `error`: why the grammar has no mask at some position of the last draft (None: it has all).
    """

    def __init__(self, grammar: Grammar, tokens: Sequence[int] = ()) -> None:
        self.grammar = grammar
        self.tokens = list(tokens)
        self.inner = grammar.matcher(tokens)
        self.error: str | None = None

    def advance(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        if tokens:
            self.tokens += tokens
            self.inner.consume_tokens(list(tokens))

    def recover(self, draft: Sequence[int], out: NDArray[np.int32]) -> None:
        """Write the masks once more, after a failure at some position of the draft.

        A matcher that fails stays so, and its last mask says that the text may end: a wrong answer.
        Here the positions before the failure get their masks, the others allow nothing.
        """
        from llguidance.numpy import fill_next_token_bitmask

        matcher = self.grammar.matcher(self.tokens)
        out[:] = ALL
        for k in range(len(out)):
            fill_next_token_bitmask(matcher, out, k)
            if matcher.is_error():
                out[k:] = 0
                self.error = matcher.get_error().partition("\n")[0]
                break
            if k == len(draft) or not matcher.try_consume_tokens([draft[k]]):
                break
        self.inner = self.grammar.matcher(self.tokens)


def fill_masks(
    matchers: Sequence[Matcher], drafts: Sequence[Sequence[int]], executor: "LLExecutor"
) -> NDArray[np.int32]:
    """The masks [R, N, W] before the draft tokens of each matcher and after the last one.

    Mask k is the grammar's after the draft's first k tokens. It allows everything after a token
    that mask k - 1 forbids, or that ends the text: no answer gets there. The matchers end where
    they began. All drafts have the same length.
    """
    from llguidance.numpy import (
        fill_next_token_bitmask_par,
        fill_next_token_bitmask_par_with_draft_tokens,
    )

    N = len(drafts[0]) + 1
    words = matchers[0].grammar.words
    out = np.full((len(matchers), N, words), ALL, dtype=np.int32)
    flat = out.reshape(-1, words)
    if N == 1:
        fill_next_token_bitmask_par(executor, [(m.inner, i) for i, m in enumerate(matchers)], flat)
    else:
        walks = [
            (m.inner, i * N, list(draft))
            for i, (m, draft) in enumerate(zip(matchers, drafts, strict=True))
        ]
        fill_next_token_bitmask_par_with_draft_tokens(executor, walks, flat)
    for matcher, draft, masks in zip(matchers, drafts, out, strict=True):
        matcher.error = None
        if matcher.inner.is_error():
            matcher.recover(draft, masks)
    return out
