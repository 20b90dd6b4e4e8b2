"""A drafter in twenty lines: it repeats the last token, or draws any other. `specdiff check docs/examples/mine.py:Mine` passes."""

import torch

from specdiff import Draft, Drafter, Purpose


class Mine(Drafter):
    def __init__(self, target, keep=0.5):
        self.vocab, self.keep = target.vocab_size, keep

    def open(self, rows, slots):
        return None

    def admit(self, state, context, rows):
        pass

    def release(self, state, rows):
        pass

    def propose(self, context, state, noise, draft_len):
        anchor = context.batch.anchor[:, None].expand(-1, draft_len)
        other = (noise.uniform(Purpose.DRAFT, draft_len, index=1) * self.vocab).long()
        tokens = torch.where(noise.uniform(Purpose.DRAFT, draft_len) < self.keep, anchor, other)
        q = torch.full(
            (*tokens.shape, self.vocab), (1 - self.keep) / self.vocab, device=tokens.device
        )
        return Draft(
            tokens, q.scatter_add(2, anchor[..., None], torch.full_like(q[..., :1], self.keep))
        )
