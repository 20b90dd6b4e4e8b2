"""A target under transformers' logits processors.

Processors are functions of all rows' token ids, left-padded to one width, and of one row of logits
each. Here rows advance unevenly and every round scores several positions, so they are called once
for each width at which some row is scored.

Shapes: B rows, P prompt width with its padding, K drafted tokens, N = K + 1 scored positions,
V vocabulary, W width of the ids that processors see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from specdiff.errors import UsageError
from specdiff.hf.repeats import Position, Repeats, own
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, Round, TargetOutput, Verification

STATEFUL = (  # each remembers its last call, or expects other rows than the batch's own
    logits_process.AlternatingCodebooksLogitsProcessor,
    logits_process.ClassifierFreeGuidanceLogitsProcessor,
    logits_process.DiaClassifierFreeGuidanceLogitsProcessor,
    logits_process.DiaEOSChannelFilterLogitsProcessor,
    logits_process.DiaEOSDelayPatternLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.WhisperNoSpeechDetection,
)


@dataclass(slots=True)
class ProcessedCache:
    """The inner target's cache, and the last scored round: raw logits, and processed scores.

    `repeats` calls the user's own processors again; None if there are none, or nothing is drafted.
    """

    inner: Any
    logits: Float[Tensor, "B N V"]
    scores: Float[Tensor, "B N V"]
    repeats: Repeats | None = None


class ProcessedTarget(Target[ProcessedCache]):
    """`inner` under `processors`.

    They see each row as `prompt` [B, P] (padded on the left), its answer, and the draft before the
    scored position. Chains only.

    They are never called for a position after an end id that only the draft holds. A position after
    a draft token that they forbid cannot be reached either; if other rows need a call there, that
    token is replaced by the most likely one, so that they never see a text they would not have
    allowed. A row that is not scored at the width of a call has its known tokens, then `pad`; its
    result is not used.

    Args:
        drafted: whether there will be drafts. Without drafts every processor is called once a step,
            in order, as in transformers, so one of the user's own may have a memory.

    Raises UsageError for processors that cannot be called twice for one position.
    """

    def __init__(
        self,
        inner: Target[Any],
        processors: LogitsProcessorList,
        prompt: Int[Tensor, "B P"],
        pad: int,
        *,
        drafted: bool,
    ) -> None:
        refused = [type(p).__name__ for p in processors if isinstance(p, STATEFUL)]
        if refused:
            raise UsageError(
                f"{', '.join(refused)} cannot be asked about several positions of a draft; "
                "leave it out (guidance_scale, watermarking_config, or your logits_processor), "
                "or call generate without custom_generate"
            )
        self.inner = inner
        self.prompt = prompt
        self.pad = pad
        self.info = inner.info
        # typed for torch.LongTensor, which no operation returns
        self.processors: Any = processors
        self.own = any(own(p) for p in processors)
        self.drafted = drafted

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> ProcessedCache:
        empty = torch.empty(rows, 0, self.info.vocab_size)
        repeats = Repeats(self.processors) if self.own and self.drafted else None
        return ProcessedCache(self.inner.open(rows, slots, taps), empty, empty, repeats)

    def admit(
        self,
        cache: ProcessedCache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        return self.inner.admit(cache.inner, rows, prompts, prefix_lengths)

    def score(self, cache: ProcessedCache, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache.inner, batch, draft)
        cache.logits = output.logits.float()  # whatever the model's dtype, as transformers does
        if not self.processors:
            cache.scores = cache.logits
            return replace(output, logits=cache.scores)
        if cache.repeats is not None and cache.repeats.early is None:
            room = int((batch.params.limit - batch.length).min())
            ids = padded_rows(self.prompt, batch, self.pad)
            cache.repeats.begin(ids, cache.logits[:, 0], batch.params.stop_ids, room)
        cache.scores = self._processed(cache, batch, draft)
        return replace(output, logits=_bounded(cache.scores, cache.logits))

    def check(self, cache: ProcessedCache, last: Round) -> None:
        """Raises UsageError if the processors left no distribution at a position of the round."""
        if not self.processors:
            return
        for row in (last.failed >= 0).nonzero()[:, 0].tolist():
            position = int(last.failed[row])
            place = position - int(last.batch.length[row])
            # otherwise the model is at fault, not they
            if bool(cache.logits[row, place].amax().isfinite()):
                token = position - int(last.batch.prompt_length[row])
                raise UsageError(
                    f"the logits processors allow no token at all, or return NaN, in row {row} for "
                    f"token {token} of the answer; leave one token possible everywhere, or pass "
                    "remove_invalid_values=True"
                )

    def finish(self, cache: ProcessedCache) -> None:
        """The run is over. Raises UsageError if a processor turns out to have a memory."""
        if cache.repeats is not None:
            cache.repeats.finish()

    def keep(self, cache: ProcessedCache, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache.inner, batch, verification)

    def release(self, cache: ProcessedCache, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache.inner, rows)

    def _processed(
        self, cache: ProcessedCache, batch: Batch, draft: Draft
    ) -> Float[Tensor, "B N V"]:
        logits = cache.logits
        scores = logits.clone()
        draft, reach = _ended(batch, draft)
        ids = padded_rows(self.prompt, batch, self.pad, draft)
        K = draft.tokens.shape[1]
        row = torch.arange(len(logits), device=logits.device)
        first = self.prompt.shape[1] + batch.length - batch.prompt_length
        # no row continues beyond its limit
        last = first + torch.minimum(reach, batch.params.limit - batch.length - 1)
        last = torch.where(batch.done, first - 1, last)
        spans = torch.stack([first, last], dim=1).tolist()
        positions: list[Position] = []  # those to repeat
        widths = _widths(spans)
        due = 0 if cache.repeats is None else cache.repeats.due(len(widths))
        for width in widths:
            if not any(begin <= width <= end for begin, end in spans):
                continue  # after a forbidden token in every row
            here = (first <= width) & (width <= last)
            at = (width - first).clamp(0, K)
            raw = logits[row, at]
            if cache.repeats is not None and len(positions) < due:
                positions.append(cache.repeats.ask(ids[:, :width], raw))
                new = positions[-1].scores
            else:
                new = self.processors(ids[:, :width], raw)
            scores[row, at] = torch.where(here[:, None], new, scores[row, at])
            if self.own and width < ids.shape[1]:
                inside = here & (width < last)
                forbidden = self._forbid(ids, width, inside, new, batch.params.stop_ids)
                spans = [
                    (begin, width if no else end)
                    for (begin, end), no in zip(spans, forbidden, strict=True)
                ]
        if cache.repeats is not None and positions:
            cache.repeats.check(positions)
        return scores

    def _forbid(
        self,
        ids: Int[Tensor, "B W"],
        width: int,
        rows: Bool[Tensor, "B"],
        new: Float[Tensor, "B V"],
        ends: Int[Tensor, "B E"],
    ) -> list[bool]:
        """Which of `rows` continue with a token of probability 0 at `width`.

        In `ids` the most likely token takes its place.
        """
        after = ids[:, width]
        # a pad may have an id outside the vocabulary
        token = after.clamp(0, new.shape[1] - 1)[:, None]
        forbidden = rows & (new.gather(1, token)[:, 0] == -torch.inf)
        instead = new.argmax(-1)
        ended = forbidden & (instead[:, None] == ends).any(-1)
        ids[:, width] = torch.where(forbidden, instead, after)
        ids[:, width + 1 :] = torch.where(ended[:, None], self.pad, ids[:, width + 1 :])
        verdict: list[bool] = forbidden.tolist()  # these processors run on the host anyway
        return verdict


def _widths(spans: list[list[int]]) -> list[int]:
    """Every width of some row's span, ascending."""
    widths: set[int] = set()
    for first, last in spans:
        widths.update(range(first, last + 1))
    return sorted(widths)


def _ended(batch: Batch, draft: Draft) -> tuple[Draft, Int[Tensor, "B"]]:
    """The draft up to its first end id, and how many of its tokens have a position after them.

    A row that is over has no draft.
    """
    K = draft.tokens.shape[1]
    place = torch.arange(K, device=draft.tokens.device)
    ends = (draft.tokens[..., None] == batch.params.stop_ids[:, None]).any(-1)
    before = F.pad(torch.where(ends, place, K), (0, 1), value=K).amin(1)
    size = draft.sizes.masked_fill(batch.done, 0)
    return replace(draft, size=torch.minimum(size, before + 1)), torch.minimum(size, before)


def _bounded(
    scores: Float[Tensor, "B N V"], logits: Float[Tensor, "B N V"]
) -> Float[Tensor, "B N V"]:
    """Scores with the processors' infinities clamped: these mean "this token".

    The model's own infinities are faults, and stay.
    """
    most = torch.finfo(scores.dtype).max
    return torch.where(logits == torch.inf, logits, scores.clamp(max=most))


def padded_rows(
    prompt: Int[Tensor, "B P"], batch: Batch, pad: int, draft: Draft | None = None
) -> Int[Tensor, "B W"]:
    """The rows in transformers' shape: left-padded prompts, answers, the draft, then `pad`.

    Of the draft, each row has its first `size` tokens.
    """
    tokens = batch.ids[:, :0] if draft is None else draft.tokens
    if draft is not None and draft.size is not None:
        counted = torch.arange(tokens.shape[1], device=tokens.device) < draft.size[:, None]
        tokens = torch.where(counted, tokens, pad)
    size = (batch.length - batch.prompt_length)[:, None]
    place = torch.arange(int(size.max()) + tokens.shape[1], device=prompt.device)
    at = (batch.prompt_length[:, None] + place).clamp(max=batch.ids.shape[1] - 1)
    answer = batch.ids.gather(1, at)
    ahead = F.pad(tokens, (0, 1), value=pad).gather(1, (place - size).clamp(0, tokens.shape[1]))
    return torch.cat([prompt, torch.where(place < size, answer, ahead)], dim=1)
