"""The grammars of a running batch: one matcher for each row that has one.

Between rounds a matcher stands after the row's committed tokens. A round reads the masks along its
draft, and the matcher returns; what is committed afterwards advances it in the next round.

Shapes: B rows, K drafted tokens, N = K + 1 scored positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from specdiff.grammar import Matcher, fill_masks
from specdiff.types import Batch, Draft

if TYPE_CHECKING:
    from llguidance import LLExecutor


class GrammarRows:
    """The matchers of a batch's rows. False where no row has a grammar: then nothing is done."""

    def __init__(self) -> None:
        self.matchers: dict[int, Matcher] = {}
        self.running: list[int] = []  # rows with a matcher that are not done
        self.width = 0  # the most tokens that the last round can have committed
        self._executor: LLExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self.matchers)

    def admit(self, batch: Batch, rows: Int[Tensor, "R"]) -> None:
        """New requests sit in `rows`, or running ones whose answers are read again."""
        if not batch.grammars:
            return
        for row in rows.tolist():
            self.matchers.pop(row, None)
            if row in batch.grammars:
                answer = batch.ids[row, batch.prompt_length[row] : batch.length[row]].tolist()
                self.matchers[row] = Matcher(batch.grammars[row], answer)

    def release(self, rows: Int[Tensor, "R"]) -> None:
        """The requests in `rows` have left."""
        if self.matchers:
            for row in rows.tolist():
                self.matchers.pop(row, None)
            self.running = [row for row in self.running if row in self.matchers]

    def advance(self, batch: Batch) -> None:
        """Read what the last round committed. Waits for the device once."""
        if not self.matchers:
            return
        rows = torch.tensor([*self.matchers], device=batch.ids.device)
        start = batch.prompt_length[rows] + torch.tensor(
            [len(matcher.tokens) for matcher in self.matchers.values()], device=rows.device
        )
        index = start[:, None] + torch.arange(self.width, device=rows.device)
        tokens = batch.ids[rows].gather(1, index.clamp(max=batch.ids.shape[1] - 1))
        count = batch.length[rows] - start
        table = torch.cat([torch.stack([count, batch.done[rows].long()], 1), tokens], 1).tolist()
        self.running = []
        for row, (new, done, *committed) in zip(self.matchers, table, strict=True):
            if not done:
                self.matchers[row].advance(committed[:new])
                self.running.append(row)

    def next_mask(self, batch: Batch, vocab_size: int) -> Bool[Tensor, "B V"] | None:
        """Which tokens may follow each row's text; all of them in a row without a grammar."""
        if not self.running:
            return None
        mask = torch.ones(
            len(batch.length), vocab_size, dtype=torch.bool, device=batch.length.device
        )
        rows = torch.tensor(self.running, device=mask.device)
        words = self._fill([[] for _ in self.running])
        return mask.index_copy(0, rows, unpacked(words, vocab_size, mask.device)[:, 0])

    def drafted(self, draft: Draft) -> Sequence[Sequence[int]]:
        """The draft tokens of the running rows, on the host.

        Read them before the target scores them: they are there earlier than its logits.
        """
        self.width = draft.tokens.shape[1] + 1
        return draft.tokens[self.running].tolist() if self.running else []

    def masked(
        self, logits: Float[Tensor, "B N V"], drafts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "B N V"]:
        """The logits, -inf where a row's grammar forbids the token; the same object if none does.

        Row k is masked by the grammar's state after the first k of the `drafted` tokens. A position
        at which the grammar fails has no finite logit: see `error`.
        """
        if not self.running:
            return logits
        allowed = unpacked(self._fill(drafts), logits.shape[2], logits.device)
        if len(self.running) == len(logits):
            order = torch.tensor(self.running, device=logits.device).argsort()
            return logits.masked_fill(~allowed[order], -torch.inf)
        rows = torch.tensor(self.running, device=logits.device)
        return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed, -torch.inf))

    def errors(self) -> dict[int, str]:
        """Why the grammar of a row has failed at some position of the last draft, by row."""
        failures = {row: self.matchers[row].error for row in self.running}
        return {
            row: f"the grammar allows no token here ({error})"
            for row, error in failures.items()
            if error is not None
        }

    def _fill(self, drafts: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        if self._executor is None:  # of this run alone: its threads do not survive a fork
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        return fill_masks([self.matchers[row] for row in self.running], drafts, self._executor)


def unpacked(
    words: NDArray[np.int32], vocab_size: int, device: torch.device
) -> Bool[Tensor, "R N V"]:
    """Packed masks as booleans; a vocabulary is at most as large as the mask."""
    packed = torch.from_numpy(words.view(np.uint8)).to(device)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    bits = packed[..., None].bitwise_and(powers) != 0
    return bits.flatten(-2)[..., :vocab_size]
