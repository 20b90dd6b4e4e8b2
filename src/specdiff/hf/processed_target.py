"""A target whose law is what transformers' logits processors make of its logits.

Processors are functions of all rows' token ids, left-padded to one width, and of one row of logits each. Here rows advance
unevenly and every round scores several positions, so they are called once for each width that some row is scored at.

Shapes: B rows, P prompt width with its padding, K drafted tokens, N = K + 1 scored positions, V vocabulary, W shown width.
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
    """The inner target's cache, and the round just scored: its raw logits, and what the processors made of them.

    `repeats` asks the caller's own processors again; None where there are none, or nothing is drafted.
    """

    inner: Any
    logits: Float[Tensor, "B N V"]
    scores: Float[Tensor, "B N V"]
    repeats: Repeats | None = None


class ProcessedTarget(Target[ProcessedCache]):
    """`inner` under `processors`, which see each row as `prompt` [B, P] (padded on the left), its answer, and the draft above the
    scored position. Chains only. Raises UsageError for processors that cannot be asked twice about one position.

    They are never asked about a position behind an end id that only the draft holds. No position
    behind a draft token that they forbid can be reached either. Where they must be asked for other
    rows, they are shown the most likely token there instead, so that they never see a text they
    would not have allowed. A row that is not at the width asked for is shown as far as it is known,
    then `pad`; what they say of it is not used.

    drafted: whether there will be drafts. Without any, every processor is called once a step in
        order, as in transformers, so one of the caller's own may have a memory.
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
                f"{', '.join(refused)} cannot be asked about several positions of a draft; leave it out (guidance_scale, "
                f"watermarking_config, or your logits_processor), or call generate without custom_generate"
            )
        self.inner, self.prompt, self.pad, self.info = inner, prompt, pad, inner.info
        self.processors: Any = (
            processors  # typed for torch.LongTensor, which no operation's result is
        )
        self.own = any(own(p) for p in processors)
        self.drafted = drafted

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> ProcessedCache:
        nothing = torch.empty(rows, 0, self.info.vocab_size)
        repeats = Repeats(self.processors) if self.own and self.drafted else None
        return ProcessedCache(self.inner.open(rows, slots, taps), nothing, nothing, repeats)

    def admit(
        self,
        cache: ProcessedCache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        kept: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        return self.inner.admit(cache.inner, rows, prompts, kept)

    def score(self, cache: ProcessedCache, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache.inner, batch, draft)
        cache.logits = output.logits.float()  # whatever the model's dtype, as transformers does
        if not self.processors:
            cache.scores = cache.logits
            return replace(output, logits=cache.scores)
        if cache.repeats is not None and cache.repeats.early is None:
            room = int((batch.params.limit - batch.length).min())
            cache.repeats.begin(
                shown(self.prompt, batch, self.pad), cache.logits[:, 0], batch.params.stop_ids, room
            )
        cache.scores = self._processed(cache, batch, draft)
        return replace(output, logits=_bounded(cache.scores, cache.logits))

    def check(self, cache: ProcessedCache, last: Round) -> None:
        """Raises UsageError where the processors left no distribution at a position that a round decided."""
        if not self.processors:
            return
        for row in (last.failed >= 0).nonzero()[:, 0].tolist():
            position = int(last.failed[row])
            place = position - int(last.batch.length[row])
            if bool(
                cache.logits[row, place].amax().isfinite()
            ):  # else the model is at fault, not they
                token = position - int(last.batch.prompt_length[row])
                raise UsageError(
                    f"the logits processors allow no token at all, or return NaN, in row {row} for token {token} of the "
                    f"answer; leave one token possible everywhere, or pass remove_invalid_values=True"
                )

    def finish(self, cache: ProcessedCache) -> None:
        """The run is over. Raises UsageError where a processor turns out to have a memory after all."""
        if cache.repeats is not None:
            cache.repeats.finish()

    def keep(self, cache: ProcessedCache, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache.inner, batch, verification)

    def release(self, cache: ProcessedCache, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache.inner, rows)

    def _processed(
        self, cache: ProcessedCache, batch: Batch, draft: Draft
    ) -> Float[Tensor, "B N V"]:
        logits, scores = cache.logits, cache.logits.clone()
        draft, reach = _ended(batch, draft)
        seen = shown(self.prompt, batch, self.pad, draft)
        K, row = draft.tokens.shape[1], torch.arange(len(logits), device=logits.device)
        first = self.prompt.shape[1] + batch.length - batch.prompt_length
        last = first + torch.minimum(
            reach, batch.params.limit - batch.length - 1
        )  # no row goes on beyond its limit
        last = torch.where(batch.done, first - 1, last)
        spans = torch.stack([first, last], dim=1).tolist()
        positions: list[Position] = []  # those to ask about again
        widths = sorted({w for begin, end in spans for w in range(begin, end + 1)})
        due = 0 if cache.repeats is None else cache.repeats.due(len(widths))
        for width in widths:
            if not any(begin <= width <= end for begin, end in spans):
                continue  # behind what was forbidden in every row
            here, at = (first <= width) & (width <= last), (width - first).clamp(0, K)
            given = logits[row, at]
            if cache.repeats is not None and len(positions) < due:
                positions.append(cache.repeats.ask(seen[:, :width], given))
                new = positions[-1].scores
            else:
                new = self.processors(seen[:, :width], given)
            scores[row, at] = torch.where(here[:, None], new, scores[row, at])
            if self.own and width < seen.shape[1]:
                forbidden = self._forbid(
                    seen, width, here & (width < last), new, batch.params.stop_ids
                )
                spans = [
                    (begin, width if no else end)
                    for (begin, end), no in zip(spans, forbidden, strict=True)
                ]
        if cache.repeats is not None and positions:
            cache.repeats.check(positions)
        return scores

    def _forbid(
        self,
        seen: Int[Tensor, "B W"],
        width: int,
        rows: Bool[Tensor, "B"],
        new: Float[Tensor, "B V"],
        ends: Int[Tensor, "B E"],
    ) -> list[bool]:
        """Which of `rows` continue with a token that has no chance at `width`.

        In `seen` the most likely token takes its place.
        """
        after = seen[:, width]
        known = after.clamp(0, new.shape[1] - 1)[
            :, None
        ]  # a pad may have an id outside the vocabulary
        forbidden = rows & (new.gather(1, known)[:, 0] == -torch.inf)
        instead = new.argmax(-1)
        ended = forbidden & (instead[:, None] == ends).any(-1)
        seen[:, width] = torch.where(forbidden, instead, after)
        seen[:, width + 1 :] = torch.where(ended[:, None], self.pad, seen[:, width + 1 :])
        verdict: list[bool] = forbidden.tolist()  # these processors run on the host anyway
        return verdict


def _ended(batch: Batch, draft: Draft) -> tuple[Draft, Int[Tensor, "B"]]:
    """The draft up to its first end id, and how many of its tokens have a position behind them.

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
    """Infinite scores that the processors made, without the infinity: they say "this token".

    Those of the model itself are a fault, and stay.
    """
    most = torch.finfo(scores.dtype).max
    return torch.where(logits == torch.inf, logits, scores.clamp(max=most))


def shown(
    prompt: Int[Tensor, "B P"], batch: Batch, pad: int, draft: Draft | None = None
) -> Int[Tensor, "B W"]:
    """The rows in transformers' shape: prompts padded on the left, answers, the draft that counts, then `pad`."""
    tokens = batch.ids[:, :0] if draft is None else draft.tokens
    if draft is not None and draft.size is not None:
        counted = torch.arange(tokens.shape[1], device=tokens.device) < draft.size[:, None]
        tokens = torch.where(counted, tokens, pad)
    written = (batch.length - batch.prompt_length)[:, None]
    place = torch.arange(int(written.max()) + tokens.shape[1], device=prompt.device)
    answer = batch.ids.gather(
        1, (batch.prompt_length[:, None] + place).clamp(max=batch.ids.shape[1] - 1)
    )
    ahead = F.pad(tokens, (0, 1), value=pad).gather(1, (place - written).clamp(0, tokens.shape[1]))
    return torch.cat([prompt, torch.where(place < written, answer, ahead)], dim=1)
