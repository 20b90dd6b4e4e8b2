"""Stop rules and output of a `generate` call, in the shapes that transformers gives them.

Shapes: B rows, P prompt width with its padding, N scored positions, V vocabulary, L columns of the
longest answer.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from specdiff.errors import UsageError
from specdiff.hf.processed_target import ProcessedCache, padded_rows
from specdiff.stats import Stats
from specdiff.types import Batch, Round


class StopRules:
    """Where rows end. `max_new` and `end_ids` are for the loop; its stop, `self`, adds `criteria`.

    The criteria are called as transformers calls them, with all rows at once and each width once,
    in order: a criterion may have a memory. A row that is ahead of the others continues until they
    are as long, which costs no round, and is cut where a criterion stopped it.

    With an end-of-text criterion, an ended row is filled with pads. Without one transformers lets
    every row continue until all have ended, and so does this. Raises UsageError without a maximum
    length.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, prompt: Int[Tensor, "B P"], pad: int
    ) -> None:
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        if not limits:
            raise UsageError("nothing bounds the answer; give max_new_tokens")
        self.max_new = min(limits) - prompt.shape[1]
        ends: set[int] = set()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                ends.update(int(i) for i in criterion.eos_token_id)
        self.end_ids = tuple(sorted(i for i in ends if i >= 0))  # -1: no token ends a text
        self.criteria = StoppingCriteriaList(
            [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        )
        self.fills = any(isinstance(c, EosTokenCriteria) for c in criteria)
        self.prompt = prompt
        self.pad = pad
        self.stops: list[int | None] = [None] * len(prompt)  # where a criterion stopped each row
        self.bounds = [self.max_new] * len(prompt)  # most tokens of each row, as known so far
        self.place = 0  # positions for which the criteria were called

    def __call__(self, last: Round) -> Bool[Tensor, "B"]:
        """Whether each row is over, by the criteria at the positions that all running rows have."""
        sizes = _sizes(last.batch)
        done = last.batch.done.tolist()
        while self.place < self._common(sizes, done):
            self.place += 1
            ids = torch.cat([self.prompt, self.rows(last.batch, self.place)], dim=1)
            stops = self.criteria(ids, None).tolist()
            for row, stop in enumerate(stops):
                if stop and self.stops[row] is None:
                    self.stops[row] = self.place
            self._bound(sizes)
        self._bound(sizes)
        over = [n >= most for n, most in zip(sizes, self.bounds, strict=True)]
        return torch.tensor(over, device=last.emitted.device)

    def rows(self, batch: Batch, width: int | None = None) -> Int[Tensor, "B L"]:
        """The answers up to their ends, then pads. `width` defaults to the longest answer's."""
        start = self.prompt.shape[1]
        lengths = self.lengths(batch)
        stop = start + (max(lengths) if width is None else width)
        answer = padded_rows(self.prompt, batch, self.pad)[:, start:stop]
        place = torch.arange(answer.shape[1], device=answer.device)
        ends = torch.tensor(lengths, device=answer.device)[:, None]
        return answer.where(place < ends, self.pad)

    def _common(self, sizes: list[int], done: list[bool]) -> int:
        """The most tokens that every running row has; of all rows if none runs."""
        if not self.fills and None not in self.stops:
            return self.place
        running = []
        for size, end, stop in zip(sizes, done, self.stops, strict=True):
            if not end and not (self.fills and stop is not None):
                running.append(size)
        return min(running) if running else max(sizes)

    def _bound(self, sizes: list[int]) -> None:
        if self.fills:
            self.bounds = [self.max_new if stop is None else stop for stop in self.stops]
            return
        ends = [
            size if stop is None and size >= self.max_new else stop
            for size, stop in zip(sizes, self.stops, strict=True)
        ]
        running = None in ends
        longest = self.max_new if running else max(end for end in ends if end is not None)
        self.bounds = [longest] * len(ends)

    def lengths(self, batch: Batch) -> list[int]:
        """How many tokens each row's answer has so far."""
        return [min(n, most) for n, most in zip(_sizes(batch), self.bounds, strict=True)]


class OutputWriter:
    """Folds rounds into streamed columns, Stats, and the output.

    `scores` and `logits` select what the output holds besides the sequences; after a row's end they
    are zeros. The streamer has the prompts already.
    """

    def __init__(
        self,
        rules: StopRules,
        streamer: BaseStreamer | None,
        stats: Stats | None,
        *,
        scores: bool,
        logits: bool,
    ) -> None:
        self.rules = rules
        self.streamer = streamer
        self.stats = stats
        self.streamed = 0
        self.scores: list[Tensor] | None = [] if scores else None
        self.logits: list[Tensor] | None = [] if logits else None
        self.counted = [0] * len(rules.prompt)  # tokens of each row that are in the Stats

    def add(self, last: Round, cache: ProcessedCache) -> None:
        """Add one round, and the scores its tokens came from."""
        sizes = _sizes(last.batch)
        emitted = last.emitted.tolist()
        for steps, scored in ((self.scores, cache.scores), (self.logits, cache.logits)):
            if steps is not None:
                _append(steps, scored, sizes, emitted)
        if self.stats is not None:
            self._count(self.stats, last, emitted)
        running = [n for n, done in zip(sizes, last.batch.done.tolist(), strict=True) if not done]
        if self.streamer is not None and running and min(running) > self.streamed:
            self._stream(self.streamer, self.rules.rows(last.batch), min(running))

    def finish(self, batch: Batch) -> Int[Tensor, "B P+L"]:
        """The sequences; the streamer gets the columns that it lacks, and the end."""
        lengths = self.rules.lengths(batch)
        answer = self.rules.rows(batch)
        if self.streamer is not None:
            self._stream(self.streamer, answer, max(lengths))
            self.streamer.end()
        for steps in (self.scores, self.logits):
            for place, step in enumerate(steps or ()):
                step[[n <= place for n in lengths]] = 0
        return torch.cat([self.rules.prompt, answer], dim=1)

    def output(self, batch: Batch) -> GenerateDecoderOnlyOutput:
        """`finish`, with scores and logits, as transformers' return_dict_in_generate."""
        sequences: Any = self.finish(batch)
        width = sequences.shape[1] - self.rules.prompt.shape[1]
        scores: Any = None if self.scores is None else tuple(self.scores[:width])
        logits: Any = None if self.logits is None else tuple(self.logits[:width])
        return GenerateDecoderOnlyOutput(sequences, scores=scores, logits=logits)

    def _stream(self, streamer: BaseStreamer, answer: Int[Tensor, "B L"], upto: int) -> None:
        for column in answer[:, self.streamed : upto].T.cpu():
            streamer.put(column)
        self.streamed = upto

    def _count(self, stats: Stats, last: Round, emitted: list[int]) -> None:
        """Every running row's round; its seconds, which all rows share, once."""
        sizes = last.draft.sizes.tolist()
        seconds = dict(last.seconds)
        lengths = self.rules.lengths(last.batch)
        for row, accepted in enumerate(last.verification.accepted.tolist()):
            new = lengths[row] - self.counted[row]  # below 0 where a row that ran ahead is cut
            self.counted[row] = lengths[row]
            stats.tokens += min(0, new)
            if emitted[row]:
                stats.add(sizes[row], accepted, max(0, new), seconds)
                seconds = {}


def _append(
    steps: list[Tensor], scored: Float[Tensor, "B N V"], sizes: list[int], emitted: list[int]
) -> None:
    """Write the scores of each row's new tokens into `steps`, one [B, V] for each position."""
    steps += [torch.zeros_like(scored[:, 0]) for _ in range(max(sizes) - len(steps))]
    for row, (size, new) in enumerate(zip(sizes, emitted, strict=True)):
        for k in range(new):
            steps[size - new + k][row] = scored[row, k]


def _sizes(batch: Batch) -> list[int]:
    """Tokens of each row's answer, those after a stop included."""
    sizes: list[int] = (batch.length - batch.prompt_length).tolist()
    return sizes
