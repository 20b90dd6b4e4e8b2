"""Lawful toy drafters to check the other roles with: one draws from a table, one knows the text.

Shapes: K drafted tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch

from specdiff.drafters.base import Drafter
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw, probabilities
from specdiff.types import Context, Draft


class TableDrafter(Drafter[None]):
    """q(next | last) is a table, each token drawn after the one before it.

    A row's draft may end early, by a draw of its own. point: the same tokens without probabilities.
    """

    draft_len = 3

    def __init__(self, vocab_size: int, *, seed: int = 1, point: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab_size, vocab_size)
        self.table = 1.5 * torch.randn(shape, dtype=torch.float64, generator=generator)
        self.point = point

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        tokens = [context.batch.anchor]
        probs = []
        for k in range(draft_len):
            q = probabilities(self.table[tokens[-1]][:, None], context.batch.params)[:, 0]
            probs.append(q)
            tokens.append(draw(q, uniform[:, k]))
        end = noise.uniform(Purpose.DRAFT, 1, index=1)[:, 0]
        size = (end * 2 * (draft_len + 1)).long().clamp(max=draft_len)
        laws = None if self.point else torch.stack(probs, 1)
        return Draft(torch.stack(tokens[1:], 1), laws, size)


class Hinted(Drafter[None]):
    """Knows each row's text by its seed, and errs at every `flaw`-th position.

    So there are long accepted prefixes, and rejections too.
    """

    def __init__(self, texts: Mapping[int, Sequence[int]], vocab_size: int, flaw: int = 3) -> None:
        self.texts = texts
        self.vocab_size = vocab_size
        self.flaw = flaw

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        batch = context.batch
        starts = zip(batch.seed.tolist(), batch.length.tolist(), strict=True)
        tokens = [self._row(seed, start, draft_len) for seed, start in starts]
        return Draft(torch.tensor(tokens, device=batch.ids.device))

    def _row(self, seed: int, start: int, draft_len: int) -> list[int]:
        text = [*self.texts[seed][start : start + draft_len], *[0] * draft_len][:draft_len]
        wrong = [(start + k) % self.flaw == 0 for k in range(draft_len)]
        return [(t + w) % self.vocab_size for t, w in zip(text, wrong, strict=True)]
