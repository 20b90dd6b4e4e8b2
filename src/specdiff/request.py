"""Requests of the engine, and the rows that hold them."""

from collections.abc import Sequence
from dataclasses import dataclass

from specdiff.grammar import Grammar
from specdiff.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, its sampling parameters, and its 64-bit seed.

    draft_len: the most tokens of this request's drafts, 0 for plain decoding (None: no limit of
        its own).
    with_drafts: report the drafted tokens of each round.
    grammar: of the answer, if it has one.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    draft_len: int | None = None
    with_drafts: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """The request in a row: its index in the stream, and how many prompt tokens the cache held."""

    index: int
    request: Request
    reused: int = 0
