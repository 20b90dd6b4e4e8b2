"""Verifying a tree: the path of draft tokens that stands, and the distribution of the next token.

A walk begins at the anchor and descends to the first child that passes, until none does. With the
target's own tokens, drawn at each row, this is `match`: a child passes if it is the one drawn.
With the probabilities that the nodes were drawn from it is `token`: siblings are met in turn.

Bottom-up verification (traversal) accepts more, but it is exact only where every subtree was drawn
independently. Nodes that share one network pass share their candidates, so it is not offered.

Shapes: B rows, K nodes, N = K + 1 scored rows, V vocabulary. Row n = k + 1 is that of node k.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw
from specdiff.tree import above, counted, parent_rows
from specdiff.types import Draft, Verification


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The decision before any draw.

    Node k passes if its uniform is below `thresholds[:, k]`, provided that its parent stands and no
    earlier sibling does. `residual[b, n]` is the distribution of the token after row n if no child
    of it passes.
    """

    thresholds: Float[Tensor, "B K"]
    residual: Float[Tensor, "B N V"]


def tree_plan(draft: Draft, p: Float[Tensor, "B N V"]) -> TreePlan:
    """Recursive rejection sampling from the top (Miao et al. 2023; Chen et al. 2024, Sequoia).

    Node k passes with probability min(1, b(x_k)/q_k(x_k)), where b is its row's distribution, at
    first p. If it fails, b becomes (b - q_k)+, normalized. q_k is what the node was drawn from,
    given its earlier siblings: without replacement it has none of their tokens, a token that was
    not drawn is a point mass.
    """
    residual = p.clone()
    counts = counted(draft)
    rows = torch.arange(len(p), device=p.device)
    thresholds = []
    for k, row in enumerate(parent_rows(draft).unbind(1)):
        b = residual[rows, row]
        q = _node_q(draft, k, b)
        x = draft.tokens[:, k, None]
        target = b.gather(1, x)[:, 0]
        ratio = torch.where(target > 0, target / q.gather(1, x)[:, 0], 0)
        thresholds.append(torch.where(counts[:, k], ratio, 0))
        rest = (b - q).clamp(min=0)
        total = rest.sum(-1, keepdim=True)
        # nothing is left only where the node passes for certain
        rest = torch.where(total > 0, rest / total.masked_fill(total == 0, 1), b)
        residual[rows, row] = torch.where(counts[:, k, None], rest, b)
    return TreePlan(torch.stack(thresholds, dim=1), residual)


def _node_q(draft: Draft, k: int, like: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """What node k was drawn from; without probabilities a point mass."""
    if draft.probs is None:
        return torch.zeros_like(like).scatter(1, draft.tokens[:, k, None], 1)
    q = draft.probs[:, k].to(like.dtype)
    if draft.columns is None:
        return q
    return torch.zeros_like(like).index_copy(1, draft.columns, q)


def rejection(draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
    """The walk of `tree_plan`, with a uniform for each node."""
    plan = tree_plan(draft, p)
    passed = noise.uniform(Purpose.RATIO, draft.tokens.shape[1]) < plan.thresholds
    accepted, path = walk(draft, passed)
    last = path.gather(1, accepted[:, None])[:, 0]
    residual = plan.residual[torch.arange(len(p), device=p.device), last]
    return emit(draft, accepted, path, draw(residual, noise.uniform(Purpose.RESIDUAL, 1)[:, 0]))


def agree(draft: Draft, own: Int[Tensor, "B N"]) -> Verification:
    """Descend while a child is the target's own token at its row, then emit that."""
    accepted, path = walk(draft, draft.tokens == own.gather(1, parent_rows(draft)))
    last = path.gather(1, accepted[:, None])
    return emit(draft, accepted, path, own.gather(1, last)[:, 0])


def walk(draft: Draft, passed: Bool[Tensor, "B K"]) -> tuple[Int[Tensor, "B"], Int[Tensor, "B N"]]:
    """The number of nodes on the path of first passing children, and its scored rows.

    The path begins at row 0; entries after its end are their own index.
    """
    K = draft.tokens.shape[1]
    node = torch.arange(K, device=passed.device)
    parents = parent_rows(draft)
    passed = passed & counted(draft)
    earlier = (parents[..., None] == parents[:, None]) & (node < node[:, None])
    first = passed & ~(earlier & passed[:, None]).any(-1)
    stands = ~(above(draft)[:, 1:] & ~first[:, None]).any(-1)
    accepted = stands.sum(1)
    rows = F.pad(torch.where(stands, node + 1, K + 1).sort(1).values, (1, 0))
    index = torch.arange(K + 1, device=passed.device)
    return accepted, torch.where(index <= accepted[:, None], rows, index)


def emit(
    draft: Draft,
    accepted: Int[Tensor, "B"],
    path: Int[Tensor, "B N"],
    following: Int[Tensor, "B"],
) -> Verification:
    """The tokens along the path, then `following`."""
    index = torch.arange(path.shape[1], device=path.device)
    n = accepted[:, None]
    tokens = F.pad(draft.tokens.gather(1, (path[:, 1:] - 1)), (0, 1))
    tokens = torch.where(index < n, tokens, 0)
    return Verification(accepted, torch.where(index == n, following[:, None], tokens), path)
