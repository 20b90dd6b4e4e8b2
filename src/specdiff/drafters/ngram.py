"""Prompt lookup (Saxena 2023): the draft is what followed the newest tokens' previous occurrence.

No network, no probabilities: the tokens are point masses, valid under every verifier. Good where
text repeats itself or its prompt.

Shapes: B rows, S slots, K drafted positions.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.types import Batch, Context, Draft, TargetInfo


class NGramDrafter(Drafter[None]):
    """Looks up the longest suffix of `shortest` to `longest` tokens that occurs earlier in the row.

    The most recent occurrence counts, and what followed it is the draft; where that reaches the
    row's end it repeats periodically, as a loop would. A row without a match drafts nothing
    (`Draft.size` 0). Raises UsageError unless 1 <= shortest <= longest.
    """

    def __init__(self, target: TargetInfo, *, longest: int = 4, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(
                "ngram needs 1 <= shortest <= longest, "
                f"not shortest={shortest} and longest={longest}"
            )
        self.longest = longest
        self.shortest = shortest

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        batch = context.batch
        after = self._match(batch)
        matches = (after > 0) & ~batch.done
        # the loop has just read `done`, so this waits for nothing; without a match the target
        # scores one token instead of K + 1
        if not bool(matches.any()):
            return Draft.empty(batch)
        period = (batch.length - after).clamp(min=1)[:, None]
        at = after[:, None] + torch.arange(draft_len, device=after.device) % period
        tokens = batch.ids.gather(1, at.clamp(max=batch.ids.shape[1] - 1))
        return Draft(tokens, None, torch.where(matches, draft_len, 0))

    def _match(self, batch: Batch) -> Int[Tensor, "B"]:
        """The position right after the best match; 0 where there is none."""
        ids = batch.ids
        length = batch.length[:, None]
        # `place` is one past the candidate, whose last token is at place - 1
        place = torch.arange(ids.shape[1], device=ids.device)
        run = torch.zeros_like(ids)
        agrees = (place > 0) & (place < length)
        for n in range(1, self.longest + 1):
            suffix = ids.gather(1, (length - n).clamp(min=0))
            agrees = agrees & (place >= n) & (ids.roll(n, dims=1) == suffix)
            run += agrees
        # longest first, then most recent
        rank = torch.where(run >= self.shortest, run * len(place) + place, 0)
        best = rank.max(1)
        return best.indices.masked_fill(best.values == 0, 0)
