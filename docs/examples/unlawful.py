"""What not to do: fill positions in the order of confidence, with the probabilities of that moment.

Every token is a fair draw from its row of `probs`, and yet the text is biased: a position that is
filled first is seen by the ones before it, so the probabilities they report already know it.
`specdiff check docs/examples/unlawful.py:AnyOrder` fails and explains why.
"""

import torch

from specdiff import Draft, Drafter, Purpose
from specdiff.sampling import draw


class AnyOrder(Drafter[None]):
    draft_len = 4

    def __init__(self, target, sharpness=2.0):
        generator = torch.Generator().manual_seed(0)
        V = target.vocab_size
        # logits of a position given its left and right neighbor; the last row is MASK
        shape = (V + 1, V)
        self.left = sharpness * torch.randn(shape, dtype=torch.float64, generator=generator)
        self.right = sharpness * torch.randn(shape, dtype=torch.float64, generator=generator)
        self.mask = V

    def propose(self, context, state, noise, draft_len):
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        row = torch.arange(len(uniform))
        # the anchor, the draft, and nothing
        canvas = torch.full((len(row), draft_len + 2), self.mask)
        canvas[:, 0] = context.batch.anchor
        probs = torch.zeros(len(row), draft_len, self.mask, dtype=torch.float64)
        for _ in range(draft_len):
            q = torch.softmax(self.left[canvas[:, :-2]] + self.right[canvas[:, 2:]], dim=-1)
            # the empty position of the highest confidence
            confidence = q.amax(-1).masked_fill(canvas[:, 1:-1] != self.mask, -1)
            best = confidence.argmax(1)
            probs[row, best] = q[row, best]
            canvas[row, best + 1] = draw(q[row, best], uniform[row, best])
        return Draft(canvas[:, 1:-1], probs)
