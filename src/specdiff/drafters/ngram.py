"""Prompt lookup (Saxena 2023): the draft is what followed the last time the row's newest tokens occurred in it.

No network, no probabilities: the tokens are point masses, lawful under every verifier. Good where text repeats itself or its prompt.

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
    """The longest suffix of `shortest` to `longest` tokens that the row holds twice is found, and its most recent earlier place.

    What followed there is the draft; where it runs into the row's end it goes on with itself, as a loop would. A row without
    a match drafts nothing (`Draft.size` 0). Raises UsageError unless 1 <= shortest <= longest.
    """

    def __init__(self, target: TargetInfo, *, longest: int = 4, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(
                f"ngram needs 1 <= shortest <= longest, not shortest={shortest} and longest={longest}"
            )
        self.longest, self.shortest = longest, shortest

    def open(self, rows: int, slots: int) -> None:
        return None

    def admit(self, state: None, context: Context, rows: Int[Tensor, "R"]) -> None:
        return None

    def release(self, state: None, rows: Int[Tensor, "R"]) -> None:
        return None

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        batch = context.batch
        after = self._match(batch)
        found = (after > 0) & ~batch.done
        if not bool(
            found.any()
        ):  # the loop has read `done` just now, so this waits for nothing; the target then scores one token, not K + 1
            return Draft.empty(batch)
        period = (batch.length - after).clamp(min=1)[:, None]
        at = after[:, None] + torch.arange(draft_len, device=after.device) % period
        tokens = batch.ids.gather(1, at.clamp(max=batch.ids.shape[1] - 1))
        return Draft(tokens, None, torch.where(found, draft_len, 0))

    def _match(self, batch: Batch) -> Int[Tensor, "B"]:
        """Where what follows the best match begins; 0 where there is none."""
        ids, length = batch.ids, batch.length[:, None]
        place = torch.arange(
            ids.shape[1], device=ids.device
        )  # `place` follows the candidate: its last token is at place - 1
        run = torch.zeros_like(ids)
        agrees = (place > 0) & (place < length)
        for n in range(1, self.longest + 1):
            suffix = ids.gather(1, (length - n).clamp(min=0))
            agrees = agrees & (place >= n) & (ids.roll(n, dims=1) == suffix)
            run += agrees
        rank = torch.where(
            run >= self.shortest, run * len(place) + place, 0
        )  # longest first, then most recent
        best = rank.max(1)
        return best.indices.masked_fill(best.values == 0, 0)
