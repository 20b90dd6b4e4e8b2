"""Prompt lookup (Saxena 2023): the draft is what followed the newest tokens' previous occurrence.

No network, no probabilities: the tokens are point masses, valid under every verifier. Good where
text repeats itself or its prompt.

Shapes: B rows, S slots, K drafted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.drafters.lookup import Match, Memory, TextIndex
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.types import Batch, Context, Draft, TargetInfo

WINDOW = 64  # newest tokens read at once; a row that has more is read once more


@dataclass(slots=True)
class NGramState:
    """The index of each row's text, as far as it has been read; `live` rows draft this round."""

    texts: list[TextIndex]
    live: list[bool]


class NGramDrafter(Drafter[NGramState]):
    """Looks up the longest suffix of `shortest` to `longest` tokens that occurs earlier in the row.

    The most recent occurrence counts, and what followed it is the draft; where that reaches the
    row's end it repeats periodically, as a loop would. A row without a match drafts nothing
    (`Draft.size` 0). A round costs what its new tokens cost, whatever the length of the text.

    memory: number of tokens of earlier requests, prompts and answers, that are looked up too (0:
        none). They are those of all rows and threads that use this object. Acceptance, and so
        timing, depends on what others wrote. The output distribution does not change as long as no
        two requests share a seed: what one drew with its noise is no draft for the other. Under
        `match` and at temperature 0 a seed is safe, and gives the same text.

    Raises UsageError unless 1 <= shortest <= longest and memory >= 0.
    """

    def __init__(
        self, target: TargetInfo, *, longest: int = 4, shortest: int = 1, memory: int = 0
    ) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(
                "ngram needs 1 <= shortest <= longest, "
                f"not shortest={shortest} and longest={longest}"
            )
        if memory < 0:
            raise UsageError(f"memory must be a number of tokens >= 0, not {memory}")
        self.sizes = range(shortest, longest + 1)
        self.memory = Memory(memory, self.sizes) if memory else None
        self.reproducible = not memory

    def open(self, rows: int, slots: int) -> NGramState:
        return NGramState([TextIndex(self.sizes) for _ in range(rows)], [False] * rows)

    def admit(self, state: NGramState, context: Context, rows: Int[Tensor, "R"]) -> None:
        batch = context.batch
        lengths = batch.length[rows].tolist()
        texts = batch.ids[rows, : max(lengths, default=0)].tolist()
        for row, length, tokens in zip(rows.tolist(), lengths, texts, strict=True):
            state.texts[row].restart(tokens[:length])

    def release(self, state: NGramState, rows: Int[Tensor, "R"]) -> None:
        """With a memory, the texts are remembered up to their last drafts."""
        if self.memory is not None:
            for row in rows.tolist():
                self.memory.add(state.texts[row].tokens)

    def propose(self, context: Context, state: NGramState, noise: Noise, draft_len: int) -> Draft:
        matches = self.matches(context.batch, state)
        texts = [[] if match is None else match.following(draft_len) for match in matches]
        return point_masses(texts, context.batch)

    def matches(self, batch: Batch, state: NGramState) -> list[Match | None]:
        """The match of each row's committed text; None where there is none, or the row is done."""
        self._read(batch, state)
        return [
            text.match(self.memory) if live else None
            for text, live in zip(state.texts, state.live, strict=True)
        ]

    def _read(self, batch: Batch, state: NGramState) -> None:
        """Append what was committed since the last draft.

        The loop has just read `done`, so this waits for nothing.
        """
        newest = batch.length[:, None] - WINDOW + torch.arange(WINDOW, device=batch.ids.device)
        tokens = batch.ids.gather(1, newest.clamp(min=0))
        table = torch.cat([batch.done[:, None].long(), batch.length[:, None], tokens], dim=1)
        for row, (done, length, *tail) in enumerate(table.tolist()):
            text = state.texts[row]
            state.live[row] = not done
            new = 0 if done else length - len(text.tokens)
            if new > WINDOW:
                text.extend(batch.ids[row, length - new : length].tolist())
            elif new:
                text.extend(tail[-new:])


def point_masses(texts: Sequence[Sequence[int]], batch: Batch) -> Draft:
    """The draft of these tokens, a list a row; an empty draft, and so a plain round, without any.

    The target scores one token then, instead of K + 1.
    """
    K = max(map(len, texts), default=0)
    if K == 0:
        return Draft.empty(batch)
    tokens = torch.tensor([[*text, *[0] * (K - len(text))] for text in texts])
    size = torch.tensor([len(text) for text in texts])
    device = batch.ids.device
    return Draft(tokens.to(device), None, size.to(device))
