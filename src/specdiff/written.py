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
from specdiff.stats import Stats
from specdiff.targets.prepared import PreparedCache, shown
from specdiff.types import Batch, Round


class Ending:
    """Where rows end. `limit` and `ids` are for the loop itself; `rest` is asked about every new position: pass `self` as its stop.

    A row that has ended is filled up with pads where there is an end-of-text criterion. Without one transformers lets every row go
    on until all have ended, and so does this. Raises UsageError without a maximum length.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt: Int[Tensor, "B P"], pad: int) -> None:
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        if not limits:
            raise UsageError("nothing bounds the answer; give max_new_tokens")
        self.new = min(limits) - prompt.shape[1]
        ends = {int(i) for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id}
        self.ids = tuple(sorted(i for i in ends if i >= 0))  # -1 is a way to say that no token ends a text
        self.rest = StoppingCriteriaList([c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)])
        self.fills = any(isinstance(c, EosTokenCriteria) for c in criteria)
        self.prompt, self.pad = prompt, pad
        self.at: list[int | None] = [None] * len(prompt)  # where a criterion said stop
        self.bounds = [self.new] * len(prompt)  # most tokens of each row, as far as is known

    def __call__(self, last: Round) -> Bool[Tensor, "B"]:
        """Ask about the round's new positions, and say which rows are over."""
        written = _written(last.batch)
        spans = [(n - new, n) if at is None else (n, n) for n, new, at in zip(written, last.emitted.tolist(), self.at, strict=True)]
        seen = shown(self.prompt, last.batch, self.pad)
        for place in sorted({p for begin, end in spans for p in range(begin + 1, end + 1)}):
            said = self.rest(seen[:, : self.prompt.shape[1] + place], None).tolist()
            for row, (begin, end) in enumerate(spans):
                if said[row] and begin < place <= end and self.at[row] is None:
                    self.at[row] = place
        ends = [n if at is None and n >= self.new else at for n, at in zip(written, self.at, strict=True)]
        longest = self.new if None in ends else max(end for end in ends if end is not None)
        self.bounds = [(self.new if at is None else at) if self.fills else longest for at in self.at]
        return torch.tensor([n >= most for n, most in zip(written, self.bounds, strict=True)], device=last.emitted.device)

    def lengths(self, batch: Batch) -> list[int]:
        """How many tokens each row's answer has so far."""
        return [min(n, most) for n, most in zip(_written(batch), self.bounds, strict=True)]


class Written:
    """Folds rounds into streamed columns, Stats, and the output. `scores`, `logits`: which of the two are kept for it.

    The streamer has the prompts already. A row's scores behind its end are zeros.
    """

    def __init__(self, ending: Ending, streamer: BaseStreamer | None, stats: Stats | None, *, scores: bool, logits: bool) -> None:
        self.ending, self.streamer, self.stats, self.streamed = ending, streamer, stats, 0
        self.scores: list[Tensor] | None = [] if scores else None
        self.logits: list[Tensor] | None = [] if logits else None

    def add(self, last: Round, cache: PreparedCache) -> None:
        """One round, and the scores its tokens came from."""
        written, emitted = _written(last.batch), last.emitted.tolist()
        for kept, scored in ((self.scores, cache.scores), (self.logits, cache.logits)):
            if kept is not None:
                kept += [torch.zeros_like(scored[:, 0]) for _ in range(max(written) - len(kept))]
                for row, (n, new) in enumerate(zip(written, emitted, strict=True)):
                    for k in range(new):
                        kept[n - new + k][row] = scored[row, k]
        if self.stats is not None:
            self._count(self.stats, last, written, emitted)
        running = [n for n, done in zip(written, last.batch.done.tolist(), strict=True) if not done]
        if self.streamer is not None and running and min(running) > self.streamed:
            self._stream(self.streamer, self._rows(last.batch), min(running))

    def finish(self, batch: Batch) -> Int[Tensor, "B P+L"]:
        """The sequences; the rest of them goes to the streamer."""
        lengths = self.ending.lengths(batch)
        answer = self._rows(batch)
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
        kept: list[Any] = [None if steps_of is None else tuple(steps_of[:steps]) for steps_of in (self.scores, self.logits)]
        return GenerateDecoderOnlyOutput(sequences, scores=kept[0], logits=kept[1])

    def _rows(self, batch: Batch) -> Int[Tensor, "B L"]:
        start, lengths = self.ending.prompt.shape[1], self.ending.lengths(batch)
        answer = shown(self.ending.prompt, batch, self.ending.pad)[:, start : start + max(lengths)]
        place = torch.arange(answer.shape[1], device=answer.device)
        return answer.where(place < torch.tensor(lengths, device=answer.device)[:, None], self.ending.pad)

    def _stream(self, streamer: BaseStreamer, answer: Int[Tensor, "B L"], upto: int) -> None:
        for column in answer[:, self.streamed : upto].T.cpu():
            streamer.put(column)
        self.streamed = upto

    def _count(self, stats: Stats, last: Round, written: list[int], emitted: list[int]) -> None:
        """Every running row's round; its seconds, which all rows share, once."""
        sizes = [last.draft.tokens.shape[1]] * len(written) if last.draft.size is None else last.draft.size.tolist()
        seconds = dict(last.seconds)
        for row, accepted in enumerate(last.verification.accepted.tolist()):
            behind = max(0, written[row] - self.ending.bounds[row])
            if emitted[row]:
                stats.add(sizes[row], accepted, emitted[row] - behind, seconds)
                seconds = {}


def _written(batch: Batch) -> list[int]:
    written: list[int] = (batch.length - batch.prompt_length).tolist()
    return written
