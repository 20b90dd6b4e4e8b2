"""What not to do: positions are filled in the order of confidence, and each keeps the probabilities of the moment it was drawn.

Every token is a fair draw from its row of `probs`, and yet the text is biased: a position filled first is seen by the ones before
it, so what they report already knows it. `specdiff check docs/examples/unlawful.py:AnyOrder` fails and says so.
"""

import torch

from specdiff import Draft, Drafter, Purpose
from specdiff.sampling import draw


class AnyOrder(Drafter):
    def __init__(self, target, sharpness=2.0):
        generator = torch.Generator().manual_seed(0)
        V = target.vocab_size
        # logits of a position given its left and right neighbour, MASK (the last row) where that is not there yet
        self.left, self.right = (
            sharpness * torch.randn(V + 1, V, dtype=torch.float64, generator=generator)
            for _ in range(2)
        )
        self.mask, self.draft_len = V, 4

    def open(self, rows, slots):
        return None

    def admit(self, state, context, rows):
        pass

    def release(self, state, rows):
        pass

    def propose(self, context, state, noise, draft_len):
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        row = torch.arange(len(uniform))
        canvas = torch.full(
            (len(row), draft_len + 2), self.mask
        )  # the anchor, the draft, and nothing
        canvas[:, 0] = context.batch.anchor
        probs = torch.zeros(len(row), draft_len, self.mask, dtype=torch.float64)
        for _ in range(draft_len):
            q = torch.softmax(self.left[canvas[:, :-2]] + self.right[canvas[:, 2:]], dim=-1)
            most = (
                q.amax(-1).masked_fill(canvas[:, 1:-1] != self.mask, -1).argmax(1)
            )  # the most confident empty position
            probs[row, most] = q[row, most]
            canvas[row, most + 1] = draw(q[row, most], uniform[row, most])
        return Draft(canvas[:, 1:-1], probs)
