"""Trees of draft tokens: the ancestors and depths of the nodes that `Draft.parents` describes.

Node k is draft token k, and its row n = k + 1 of the target's scores is the prediction after it;
row 0 is that of the anchor. Parents come before their children, so the first `size` nodes of a tree
are a tree.

Shapes: B rows, K nodes, N = K + 1 scored rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from specdiff.types import Draft


def parent_rows(draft: Draft) -> Int[Tensor, "#B K"]:
    """The scored row that each node continues: 0 is the anchor's."""
    if draft.parents is None:
        return torch.arange(draft.tokens.shape[1], device=draft.tokens.device)[None]
    return draft.parents + 1


def above(draft: Draft) -> Bool[Tensor, "#B N K"]:
    """Which draft tokens precede the prediction of scored row n (B or 1 rows).

    In a chain these are the first n, in a tree node n - 1 and its ancestors.
    """
    K = draft.tokens.shape[1]
    device = draft.tokens.device
    if draft.parents is None:
        return torch.ones(1, K + 1, K, dtype=torch.bool, device=device).tril(-1)
    index = torch.arange(K, device=device)
    line = (draft.parents[..., None] == index) | (index[:, None] == index)
    for _ in range(K.bit_length()):  # each product doubles the length of the lines
        line = line.float() @ line.float() > 0
    return F.pad(line, (0, 0, 1, 0))


def related(draft: Draft) -> Bool[Tensor, "#B N N"]:
    """Which scored rows each row attends to: its own, the anchor's, and its ancestors'."""
    line = F.pad(above(draft), (1, 0), value=True)
    return line | torch.eye(line.shape[-1], dtype=torch.bool, device=line.device)


def depths(draft: Draft) -> Int[Tensor, "#B N"]:
    """How many draft tokens precede the prediction of each scored row."""
    return above(draft).sum(-1)


def counted(draft: Draft) -> Bool[Tensor, "B K"]:
    """Which draft tokens count: those before the row's size."""
    return torch.arange(draft.tokens.shape[1], device=draft.tokens.device) < draft.sizes[:, None]
