"""Lawful toys to check the other roles with: a table that drafts, with or without its laws, and one that knows the text.

Shapes: K drafted tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw, probabilities
from specdiff.types import Context, Draft


class TableDrafter(Drafter[None]):
    """q(next | last) is a table, each token drawn after the one before; a row's draft may end early, by a draw of its own.

    point: the same tokens without their probabilities.
    """

    draft_len = 3

    def __init__(self, vocab_size: int, *, seed: int = 1, point: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table, self.point = (
            1.5 * torch.randn(vocab_size, vocab_size, dtype=torch.float64, generator=generator),
            point,
        )

    def open(self, rows: int, slots: int) -> None:
        return None

    def admit(self, state: None, context: Context, rows: Int[Tensor, "R"]) -> None:
        return None

    def release(self, state: None, rows: Int[Tensor, "R"]) -> None:
        return None

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        uniform, tokens, probs = noise.uniform(Purpose.DRAFT, draft_len), [context.batch.anchor], []
        for k in range(draft_len):
            q = probabilities(self.table[tokens[-1]][:, None], context.batch.params)[:, 0]
            probs.append(q)
            tokens.append(draw(q, uniform[:, k]))
        size = (
            (noise.uniform(Purpose.DRAFT, 1, index=1)[:, 0] * 2 * (draft_len + 1))
            .long()
            .clamp(max=draft_len)
        )
        return Draft(
            torch.stack(tokens[1:], 1), None if self.point else torch.stack(probs, 1), size
        )


class Hinted(Drafter[None]):
    """Knows each row's text by its seed, and errs at every `flaw`-th position: long accepted prefixes, and rejections too."""

    def __init__(self, texts: Mapping[int, Sequence[int]], vocab_size: int, flaw: int = 3) -> None:
        self.texts, self.vocab_size, self.flaw = texts, vocab_size, flaw

    def open(self, rows: int, slots: int) -> None:
        return None

    def admit(self, state: None, context: Context, rows: Int[Tensor, "R"]) -> None:
        return None

    def release(self, state: None, rows: Int[Tensor, "R"]) -> None:
        return None

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        tokens = []
        for seed, start in zip(
            context.batch.seed.tolist(), context.batch.length.tolist(), strict=True
        ):
            known = [*self.texts[seed][start : start + draft_len], *[0] * draft_len][:draft_len]
            tokens.append(
                [
                    (t + ((start + k) % self.flaw == 0)) % self.vocab_size
                    for k, t in enumerate(known)
                ]
            )
        return Draft(torch.tensor(tokens, device=context.batch.ids.device))
