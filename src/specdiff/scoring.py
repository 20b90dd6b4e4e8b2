"""Prompt scores: the log probability of each token of a prompt, given the tokens before it.

Shapes: L tokens of the prompt, N positions of one piece, V vocabulary, T most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from specdiff import decode
from specdiff.errors import TargetError
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, SamplingParams

PIECE = 128  # positions scored in one forward: each has logits for the whole vocabulary


@dataclass(frozen=True, slots=True)
class PromptScore:
    """The log-softmax of the target's raw logits at the prompt's tokens 1 .. L - 1.

    top_logprobs: the T most likely (token id, logprob) pairs at each of these positions.
    """

    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


class PromptScoring:
    """Scores one prompt in pieces. `score` is complete once `done`.

    The prompt is the row of a cache of its own, and its tokens are scored like a draft.
    """

    def __init__(self, target: Target[Any], prompt: Sequence[int], top: int) -> None:
        self.target = target
        self.prompt = prompt
        self.top = top
        self.score = PromptScore()
        self.start = 0  # of the next piece
        self.row: tuple[Any, Batch] | None = None  # its cache and its tokens

    @property
    def done(self) -> bool:
        """Whether every token but the first has its log probability."""
        return self.start >= len(self.prompt) - 1

    @torch.inference_mode()
    def advance(self) -> None:
        """Score the next piece. Raises TargetError where the target's logits are not finite."""
        if self.done:
            return
        if self.row is None:
            self.row = self._open()
        cache, batch = self.row
        start = self.start
        end = min(start + PIECE, len(self.prompt) - 1)
        batch = replace(batch, length=torch.full_like(batch.length, start + 1))
        draft = Draft(batch.ids[:, start + 1 : end])
        logits = self.target.score(cache, batch, draft).logits[0]
        finite = int(decode.finite_rows(logits[None])[0].long().cumprod(0).sum())
        if finite < len(logits):
            raise TargetError(decode.reason(start + finite + 1))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = logits.log_softmax(-1)
        tokens = batch.ids[0, start + 1 : end + 1]
        self.score.logprobs.extend(logprobs.gather(1, tokens[:, None])[:, 0].tolist())
        best = logprobs.topk(min(self.top, logprobs.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        self.score.top_logprobs.extend(list(zip(*pair, strict=True)) for pair in pairs)
        self.start = end
        if self.done:
            self.row = None

    def _open(self) -> tuple[Any, Batch]:
        params = SamplingParams(max_tokens=1)
        batch = Batch.of([self.prompt], [params], [0], device=self.target.info.device)
        return self.target.open(1, len(self.prompt) + 1), batch
