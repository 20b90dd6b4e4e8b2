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
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from specdiff.errors import UsageError
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, TargetOutput, Verification

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
class PreparedCache:
    """The inner target's cache, and the round just scored: its raw logits, and what the processors made of them."""

    inner: Any
    logits: Float[Tensor, "B N V"]
    scores: Float[Tensor, "B N V"]


class PreparedTarget(Target[PreparedCache]):
    """`inner` under `processors`, which see each row as `prompt` [B, P] (padded on the left), its answer, and the draft above the
    scored position. Chains only. Raises UsageError for processors that cannot be asked twice about one position.

    Behind a draft token that they forbid no position can be reached; they are shown the likeliest lawful token there instead, so
    that they never see a text they would not have allowed. A row that is not at the width asked for is shown as far as it is known,
    then `pad`; what they say of it is not used.
    """

    def __init__(self, inner: Target[Any], processors: LogitsProcessorList, prompt: Int[Tensor, "B P"], pad: int) -> None:
        refused = [type(p).__name__ for p in processors if isinstance(p, STATEFUL)]
        if refused:
            raise UsageError(
                f"{', '.join(refused)} cannot be asked about several positions of a draft; leave it out (guidance_scale, "
                f"watermarking_config, or your logits_processor), or call generate without custom_generate"
            )
        self.inner, self.prompt, self.pad, self.info = inner, prompt, pad, inner.info
        self.processors: Any = processors  # typed for torch.LongTensor, which no operation's result is

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> PreparedCache:
        nothing = torch.empty(rows, 0, self.info.vocab_size)
        return PreparedCache(self.inner.open(rows, slots, taps), nothing, nothing)

    def admit(
        self, cache: PreparedCache, rows: Int[Tensor, "R"], prompts: Sequence[Int[Tensor, "L"]], kept: Int[Tensor, "R"]
    ) -> Float[Tensor, "R N D"] | None:
        return self.inner.admit(cache.inner, rows, prompts, kept)

    def score(self, cache: PreparedCache, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache.inner, batch, draft)
        cache.logits = output.logits.float()  # whatever the model's dtype, as transformers does
        cache.scores = self._processed(cache.logits, batch, draft) if self.processors else cache.logits
        return replace(output, logits=cache.scores)

    def keep(self, cache: PreparedCache, batch: Batch, verification: Verification) -> None:
        self.inner.keep(cache.inner, batch, verification)

    def release(self, cache: PreparedCache, rows: Int[Tensor, "R"]) -> None:
        self.inner.release(cache.inner, rows)

    def _processed(self, logits: Float[Tensor, "B N V"], batch: Batch, draft: Draft) -> Float[Tensor, "B N V"]:
        scores, seen = logits.clone(), shown(self.prompt, batch, self.pad, draft)
        K, row = draft.tokens.shape[1], torch.arange(len(logits), device=logits.device)
        first = self.prompt.shape[1] + batch.length - batch.prompt_length
        size = K if draft.size is None else draft.size
        last = first + (batch.params.limit - batch.length - 1).clamp(max=size)  # no row goes on beyond its limit
        last = torch.where(batch.done, first - 1, last)
        spans = zip(first.tolist(), last.tolist(), strict=True)
        for width in sorted({w for begin, end in spans for w in range(begin, end + 1)}):
            here, at = (first <= width) & (width <= last), (width - first).clamp(0, K)
            new = self.processors(seen[:, :width], logits[row, at])
            scores[row, at] = torch.where(here[:, None], new, scores[row, at])
            if width < seen.shape[1]:
                after = seen[:, width]
                known = after.clamp(0, new.shape[1] - 1)[:, None]  # a pad may have an id outside the vocabulary
                forbidden = here & (width < last) & (new.gather(1, known)[:, 0] == -torch.inf)
                seen[:, width] = torch.where(forbidden, new.argmax(-1), after)
        return scores


def shown(prompt: Int[Tensor, "B P"], batch: Batch, pad: int, draft: Draft | None = None) -> Int[Tensor, "B W"]:
    """The rows in transformers' shape: prompts padded on the left, answers, the draft that counts, then `pad`."""
    tokens = batch.ids[:, :0] if draft is None else draft.tokens
    if draft is not None and draft.size is not None:
        counted = torch.arange(tokens.shape[1], device=tokens.device) < draft.size[:, None]
        tokens = torch.where(counted, tokens, pad)
    written = (batch.length - batch.prompt_length)[:, None]
    place = torch.arange(int(written.max()) + tokens.shape[1], device=prompt.device)
    answer = batch.ids.gather(1, (batch.prompt_length[:, None] + place).clamp(max=batch.ids.shape[1] - 1))
    ahead = F.pad(tokens, (0, 1), value=pad).gather(1, (place - written).clamp(0, tokens.shape[1]))
    return torch.cat([prompt, torch.where(place < written, answer, ahead)], dim=1)
