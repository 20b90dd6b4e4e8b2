"""What transformers gets back: where each row ends, and the rows in the shape `generate` gives them, as they grow.

Shapes: B rows, P prompt width with its padding, V vocabulary, L columns of the longest answer.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from specdiff.errors import UsageError
from specdiff.hf.processed_target import ProcessedCache, shown
from specdiff.stats import Stats
from specdiff.types import Batch, Round


class Ending:
    """Where rows end. `new` and `ids` are for the loop itself; `rest` is asked about every new position:
    pass `self` as its stop.

    The rest is asked as transformers asks it, about all rows at once and each width once, in order:
    a criterion may have a memory. A row that is ahead of the others runs on until they are as long,
    which costs no round, and is cut where it was told to stop.

    A row that has ended is filled up with pads where there is an end-of-text criterion. Without one transformers lets every row go
    on until all have ended, and so does this. Raises UsageError without a maximum length.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, prompt: Int[Tensor, "B P"], pad: int
    ) -> None:
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        if not limits:
            raise UsageError("nothing bounds the answer; give max_new_tokens")
        self.new = min(limits) - prompt.shape[1]
        ends = {int(i) for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id}
        self.ids = tuple(sorted(i for i in ends if i >= 0))  # -1: no token ends a text
        self.rest = StoppingCriteriaList(
            [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        )
        self.fills = any(isinstance(c, EosTokenCriteria) for c in criteria)
        self.prompt, self.pad = prompt, pad
        self.at: list[int | None] = [None] * len(prompt)  # where a criterion said stop
        self.bounds = [self.new] * len(prompt)  # most tokens of each row, as far as is known
        self.place = 0  # how far the rest was asked

    def __call__(self, last: Round) -> Bool[Tensor, "B"]:
        """Ask about the positions that all running rows have reached, and say which rows are over."""
        written, done = _written(last.batch), last.batch.done.tolist()
        while self.place < self._common(written, done):
            self.place += 1
            seen = torch.cat([self.prompt, self.rows(last.batch, self.place)], dim=1)
            stops = self.rest(seen, None).tolist()
            for row, stop in enumerate(stops):
                if stop and self.at[row] is None:
                    self.at[row] = self.place
            self._bound(written)
        self._bound(written)
        over = [n >= most for n, most in zip(written, self.bounds, strict=True)]
        return torch.tensor(over, device=last.emitted.device)

    def rows(self, batch: Batch, width: int | None = None) -> Int[Tensor, "B L"]:
        """The answers up to where they end, then pads; of `width` tokens, or as many as the longest has."""
        start, lengths = self.prompt.shape[1], self.lengths(batch)
        stop = start + (max(lengths) if width is None else width)
        answer = shown(self.prompt, batch, self.pad)[:, start:stop]
        place = torch.arange(answer.shape[1], device=answer.device)
        ends = torch.tensor(lengths, device=answer.device)[:, None]
        return answer.where(place < ends, self.pad)

    def _common(self, written: list[int], done: list[bool]) -> int:
        """The most tokens that every running row has; of all rows where none runs."""
        if not self.fills and None not in self.at:
            return self.place
        over = [
            end or (self.fills and at is not None) for end, at in zip(done, self.at, strict=True)
        ]
        running = [n for n, end in zip(written, over, strict=True) if not end]
        return min(running) if running else max(written)

    def _bound(self, written: list[int]) -> None:
        ends = [
            n if at is None and n >= self.new else at
            for n, at in zip(written, self.at, strict=True)
        ]
        longest = self.new if None in ends else max(end for end in ends if end is not None)
        self.bounds = [
            (self.new if at is None else at) if self.fills else longest for at in self.at
        ]

    def lengths(self, batch: Batch) -> list[int]:
        """How many tokens each row's answer has so far."""
        return [min(n, most) for n, most in zip(_written(batch), self.bounds, strict=True)]


class Written:
    """Folds rounds into streamed columns, Stats, and the output. `scores`, `logits`: which of the two are kept for it.

    The streamer has the prompts already. A row's scores behind its end are zeros.
    """

    def __init__(
        self,
        ending: Ending,
        streamer: BaseStreamer | None,
        stats: Stats | None,
        *,
        scores: bool,
        logits: bool,
    ) -> None:
        self.ending, self.streamer, self.stats, self.streamed = ending, streamer, stats, 0
        self.scores: list[Tensor] | None = [] if scores else None
        self.logits: list[Tensor] | None = [] if logits else None
        self.counted = [0] * len(ending.prompt)  # tokens of each row that are in the Stats

    def add(self, last: Round, cache: ProcessedCache) -> None:
        """One round, and the scores its tokens came from."""
        written, emitted = _written(last.batch), last.emitted.tolist()
        for kept, scored in ((self.scores, cache.scores), (self.logits, cache.logits)):
            if kept is not None:
                kept += [torch.zeros_like(scored[:, 0]) for _ in range(max(written) - len(kept))]
                for row, (n, new) in enumerate(zip(written, emitted, strict=True)):
                    for k in range(new):
                        kept[n - new + k][row] = scored[row, k]
        if self.stats is not None:
            self._count(self.stats, last, emitted)
        running = [n for n, done in zip(written, last.batch.done.tolist(), strict=True) if not done]
        if self.streamer is not None and running and min(running) > self.streamed:
            self._stream(self.streamer, self.ending.rows(last.batch), min(running))

    def finish(self, batch: Batch) -> Int[Tensor, "B P+L"]:
        """The sequences; the rest of them goes to the streamer."""
        lengths = self.ending.lengths(batch)
        answer = self.ending.rows(batch)
        if self.streamer is not None:
            self._stream(self.streamer, answer, max(lengths))
            self.streamer.end()
        for kept in (self.scores, self.logits):
            for place, step in enumerate(kept or ()):
                step[[n <= place for n in lengths]] = 0
        return torch.cat([self.ending.prompt, answer], dim=1)

    def output(self, batch: Batch) -> GenerateDecoderOnlyOutput:
        """`finish`, and what was kept, as transformers returns it for return_dict_in_generate."""
        sequences: Any = self.finish(batch)
        steps = sequences.shape[1] - self.ending.prompt.shape[1]
        kept: list[Any] = [
            None if steps_of is None else tuple(steps_of[:steps])
            for steps_of in (self.scores, self.logits)
        ]
        return GenerateDecoderOnlyOutput(sequences, scores=kept[0], logits=kept[1])

    def _stream(self, streamer: BaseStreamer, answer: Int[Tensor, "B L"], upto: int) -> None:
        for column in answer[:, self.streamed : upto].T.cpu():
            streamer.put(column)
        self.streamed = upto

    def _count(self, stats: Stats, last: Round, emitted: list[int]) -> None:
        """Every running row's round; its seconds, which all rows share, once."""
        sizes = last.draft.sizes.tolist()
        seconds = dict(last.seconds)
        lengths = self.ending.lengths(last.batch)
        for row, accepted in enumerate(last.verification.accepted.tolist()):
            new = lengths[row] - self.counted[row]  # below 0 where a row that ran ahead is cut
            self.counted[row] = lengths[row]
            stats.tokens += min(0, new)
            if emitted[row]:
                stats.add(sizes[row], accepted, max(0, new), seconds)
                seconds = {}


def _written(batch: Batch) -> list[int]:
    written: list[int] = (batch.length - batch.prompt_length).tolist()
    return written
