"""Repeated calls of the user's own logits processors: different answers reveal a memory.

A draft's positions are processed ahead of time, and again after a rejection. Only functions of
(input_ids, scores) keep their meaning then, so a processor with a memory (a counter, a grammar
matcher that expects consecutive texts) is refused.

Shapes: B rows, W width of the ids that processors see, V vocabulary.
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

TOLERANCE = 1e-4  # a processor that runs a network may round differently
DENSE = 8  # the first rounds, all of which are checked
SPARSE = 16  # after them, one round of this many is checked
Answer = tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]


def own(processor: Any) -> bool:
    """Whether a processor is the user's and may have a memory, or wraps a function that may."""
    library = type(processor).__module__ == logits_process.__name__
    return not library or isinstance(processor, PrefixConstrainedLogitsProcessor)


@dataclass(frozen=True, slots=True)
class Position:
    """A text, and for each of the user's processors its input and output scores there."""

    ids: Int[Tensor, "B W"]
    answers: Sequence[Answer]
    scores: Float[Tensor, "B V"]


class Repeats:
    """The processors of one run. Each method that repeats a call may raise UsageError.

    `begin` calls them for the first positions out of order, `check` for one of a later round, and
    `finish` for an early one once more, when a slow memory has had time to fill. A processor that
    counts its calls is harmless as long as its answers agree: each of them is checked.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors
        self.early: Position | None = None
        self.counting = False
        self.rounds = 0

    def ask(self, ids: Int[Tensor, "B W"], scores: Float[Tensor, "B V"]) -> Position:
        """The output of the whole list, with the input and output of each of the user's own."""
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
        """Call for the first position and two after it, then for the second and the first again.

        Never for a text after its end, or beyond `room`, the most tokens of an answer.
        """
        positions = [self.ask(ids, logits.clone())]
        for _ in range(min(2, room - 1)):
            scores = _without(positions[-1].scores, ends)
            if bool((scores.amax(-1) == -torch.inf).any()):
                break
            longer = torch.cat([positions[-1].ids, scores.argmax(-1, keepdim=True)], dim=1)
            try:
                positions.append(self.ask(longer, logits.clone()))
            except Exception:  # a dead end of the constraint, which the answer may never reach
                break
        self.early = positions[min(1, len(positions) - 1)]
        self._repeat(self.early)
        before = self._numbers()
        self._repeat(positions[0])
        self.counting = self._numbers() != before

    def due(self, positions: int) -> int:
        """The number of this round's positions to repeat."""
        self.rounds += 1
        if self.counting:
            return positions
        return int(self.rounds <= DENSE or self.rounds % SPARSE == 0)

    def check(self, positions: Sequence[Position]) -> None:
        """Repeat the first positions of a round, after all of them, and an early one."""
        for position in positions:
            self._repeat(position)
        self.finish()

    def finish(self) -> None:
        if self.early is not None:
            self._repeat(self.early)

    def _repeat(self, position: Position) -> None:
        processors = [processor for processor in self.processors if own(processor)]
        for processor, (before, after) in zip(processors, position.answers, strict=True):
            try:
                again = _called(processor, position.ids, before.clone())
            except Exception as error:
                reason = f"asked again, it raised {type(error).__name__}: {error}"
                raise UsageError(f"{_refusal(processor)} ({reason})") from error
            if not torch.allclose(again, after, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                raise UsageError(_refusal(processor))

    def _numbers(self) -> list[dict[str, Any]]:
        """The plain attributes of the user's processors: a counter changes at each call."""
        return [_plain(processor) for processor in self.processors if own(processor)]


def _called(
    processor: Any, ids: Int[Tensor, "B W"], scores: Float[Tensor, "B V"]
) -> Float[Tensor, "B V"]:
    # typed for torch.LongTensor, which no operation returns
    processors: Any = LogitsProcessorList([processor])
    answer: Tensor = processors(ids, scores)
    return answer


def _without(scores: Float[Tensor, "B V"], ends: Int[Tensor, "B E"]) -> Float[Tensor, "B V"]:
    """Scores with -inf at the end ids. Ids outside the vocabulary (padding) change nothing."""
    place = torch.arange(scores.shape[1], device=scores.device)
    ended = (place[None, :, None] == ends[:, None]).any(-1)
    return scores.masked_fill(ended, -torch.inf)


def _plain(processor: Any) -> dict[str, Any]:
    attributes: Mapping[str, Any] = getattr(processor, "__dict__", {})
    return {
        name: value for name, value in attributes.items() if isinstance(value, (int, float, str))
    }


def _refusal(processor: Any) -> str:
    name = getattr(processor, "__name__", type(processor).__name__)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        name = "prefix_allowed_tokens_fn"
    return (
        f"{name} answers differently when asked twice about the same text, so it cannot be asked "
        "about the positions of a draft; make it a function of its arguments alone, leave it out, "
        "or use drafter='none'"
    )
