"""Logits processors of the caller's own, asked again: one that answers differently about the same text has a memory.

A draft's positions are processed ahead of time, and again where a draft was rejected. Only functions of (input_ids, scores)
keep their meaning then, so a processor with a memory (a counter, a grammar matcher that expects consecutive texts) is refused.

Shapes: B rows, W shown width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.generation import logits_process

from specdiff.errors import UsageError

TOLERANCE = 1e-4  # a processor that runs a network need not repeat itself to the last bit
DENSE, SPARSE = 8, 16  # the first rounds are checked one by one, from then on every so many
Answer = tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]


def own(processor: Any) -> bool:
    """Whether a processor may have a memory: it is not transformers' own, or wraps a function."""
    library = type(processor).__module__ == logits_process.__name__
    return not library or isinstance(processor, PrefixConstrainedLogitsProcessor)


@dataclass(frozen=True, slots=True)
class Position:
    """A text, and of each own processor the scores it was given there and those it returned."""

    ids: Int[Tensor, "B W"]
    answers: Sequence[Answer]
    scores: Float[Tensor, "B V"]


class Repeats:
    """The processors of one run. Each method that asks again raises UsageError naming the processor.

    `begin` asks about the first positions out of order, `check` about one of a later round, and
    `finish` about an early one once more, when a slow memory has had time to fill. A processor that
    counts its calls is harmless as long as its answers agree: each of them is checked.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors
        self.early: Position | None = None
        self.counting = False
        self.rounds = 0

    def ask(self, ids: Int[Tensor, "B W"], scores: Float[Tensor, "B V"]) -> Position:
        """What the whole list makes of `scores`, with what each own processor made of its part."""
        answers = []
        for processor in self.processors:
            before = scores.clone()  # some work in place
            scores = _called(processor, ids, scores)
            if own(processor):
                answers.append((before, scores.clone()))
        return Position(ids.clone(), answers, scores)

    def begin(
        self,
        ids: Int[Tensor, "B W"],
        logits: Float[Tensor, "B V"],
        ends: Int[Tensor, "B E"],
        room: int,
    ) -> None:
        """Ask about the first position and two after it, then about the second and the first again.

        Never about a text behind an end, or beyond the `room` most tokens of an answer.
        """
        positions = [self.ask(ids, logits.clone())]
        for _ in range(min(2, room - 1)):
            scores = _without(positions[-1].scores, ends)
            if bool((scores.amax(-1) == -torch.inf).any()):
                break
            longer = torch.cat([positions[-1].ids, scores.argmax(-1, keepdim=True)], dim=1)
            try:
                positions.append(self.ask(longer, logits.clone()))
            except Exception:  # a dead end of the constraint, which the answer may never come to
                break
        self.early = positions[min(1, len(positions) - 1)]
        self._repeat(self.early)
        before = self._numbers()
        self._repeat(positions[0])
        self.counting = self._numbers() != before

    def due(self, positions: int) -> int:
        """About how many of this round's positions to ask again."""
        self.rounds += 1
        if self.counting:
            return positions
        return int(self.rounds <= DENSE or self.rounds % SPARSE == 0)

    def check(self, positions: Sequence[Position]) -> None:
        """Ask again about the first positions of a round, after all of them, and about an early one."""
        for position in positions:
            self._repeat(position)
        self.finish()

    def finish(self) -> None:
        if self.early is not None:
            self._repeat(self.early)

    def _repeat(self, position: Position) -> None:
        mine = [processor for processor in self.processors if own(processor)]
        for processor, (before, after) in zip(mine, position.answers, strict=True):
            try:
                again = _called(processor, position.ids, before.clone())
            except Exception as error:
                raise UsageError(
                    f"{_refusal(processor)} (asked again, it raised {type(error).__name__}: {error})"
                ) from error
            if not torch.allclose(again, after, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                raise UsageError(_refusal(processor))

    def _numbers(self) -> list[dict[str, Any]]:
        """Every own processor's plain attributes: a counter is one that changes at each call."""
        return [_plain(processor) for processor in self.processors if own(processor)]


def _called(
    processor: Any, ids: Int[Tensor, "B W"], scores: Float[Tensor, "B V"]
) -> Float[Tensor, "B V"]:
    scores_of: Any = LogitsProcessorList(
        [processor]
    )  # typed for torch.LongTensor, which no operation's result is
    answer: Tensor = scores_of(ids, scores)
    return answer


def _without(scores: Float[Tensor, "B V"], ends: Int[Tensor, "B E"]) -> Float[Tensor, "B V"]:
    """No chance for the end ids; those no token has, as the padding of their table, change nothing."""
    place = torch.arange(scores.shape[1], device=scores.device)
    ended = (place[None, :, None] == ends[:, None]).any(-1)
    return scores.masked_fill(ended, -torch.inf)


def _plain(processor: Any) -> dict[str, Any]:
    attributes: Mapping[str, Any] = getattr(processor, "__dict__", {})
    return {
        name: value for name, value in attributes.items() if isinstance(value, (int, float, str))
    }


def _refusal(processor: Any) -> str:
    wraps = isinstance(processor, PrefixConstrainedLogitsProcessor)
    name = (
        "prefix_allowed_tokens_fn"
        if wraps
        else getattr(processor, "__name__", type(processor).__name__)
    )
    return (
        f"{name} answers differently when asked twice about the same text, so it cannot be asked about the positions of a "
        f"draft; make it a function of its arguments alone, leave it out, or use drafter='none'"
    )
