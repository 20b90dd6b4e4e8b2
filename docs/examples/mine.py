"""A drafter in one method: it repeats the last token, or draws any other.

`specdiff check docs/examples/mine.py:Mine` passes.
"""

import torch

from specdiff import Draft, Drafter, Purpose
from specdiff.sampling import draw


class Mine(Drafter[None]):
    def __init__(self, target, keep=0.5):
        self.vocab = target.vocab_size
        self.keep = keep

    def propose(self, context, state, noise, draft_len):
        last = torch.nn.functional.one_hot(context.batch.anchor, self.vocab)  # [B, V]
        q = self.keep * last + (1 - self.keep) / self.vocab
        q = q[:, None].expand(-1, draft_len, -1)  # [B, K, V]
        tokens = draw(q, noise.uniform(Purpose.DRAFT, draft_len))  # [B, K]
        return Draft(tokens, q)
