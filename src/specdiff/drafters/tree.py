"""Trees from one network pass: the nodes that a drafter believes in most.

A node's weight is the product of the draft probabilities from the anchor down to it, so a parent
weighs at least as much as its child, and the N heaviest nodes are a tree: the one that best-first
search builds with a heap, popping a node and pushing its next sibling and its first child. Here it
is found depth by depth on the device: of each depth only the N heaviest nodes can belong to it.

The nodes are not drawn, so they are point masses and the tree is exact under every verifier that
takes one.

Shapes: B rows, K nodes (the budget), W nodes of one depth, M candidates, C columns (V, or a draft
vocabulary).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import Denoiser, checked_temperature
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.sampling import distribution
from specdiff.types import Context, Draft, Params, tempered

DenoiserState = TypeVar("DenoiserState")
BUDGET = range(2, 257)
# the distributions after each of the W nodes of a depth (0: the anchor), given their own tokens
Following = Callable[[int, Int[Tensor, "B W"]], Float[Tensor, "B #W C"]]


def checked_budget(tree: int) -> int:
    """The number of nodes itself. Raises UsageError unless it is in BUDGET."""
    if tree not in BUDGET:
        raise UsageError(
            f"tree must be a number of nodes in [{BUDGET[0]}, {BUDGET[-1]}], not {tree}",
            param="tree",
        )
    return tree


def refuse_hot_trees(hot_start: float | str) -> None:
    """Raises UsageError for a hot start: it mixes predictions along a chain."""
    if hot_start:
        raise UsageError(
            f"hot_start={hot_start!r} starts chains only; leave out hot_start, or tree",
            param="tree",
        )


class TreeDrafter(Drafter[Any], Generic[DenoiserState]):
    """The `tree` most likely nodes of one pass over the denoiser's `draft_len` positions.

    Positions are independent, so all nodes of a depth have the same children. `draft_temperature`
    as in DenoisingDrafter; greedy rows rank their nodes at temperature 1.
    """

    trees = True

    def __init__(
        self,
        denoiser: Denoiser[DenoiserState],
        tree: int,
        *,
        draft_temperature: float = 1.0,
    ) -> None:
        if denoiser.mask_id is None:
            raise UsageError(
                "a tree is drafted in one pass over MASK tokens, and a drafter of the uniform "
                "process has none",
                param="tree",
            )
        self.mask_id = denoiser.mask_id
        self.denoiser = denoiser
        self.draft_temperature = checked_temperature(draft_temperature)
        self.taps = denoiser.taps
        self.keeps_features = denoiser.keeps_features
        self.draft_len = checked_budget(tree)

    def open(self, rows: int, slots: int) -> DenoiserState:
        return self.denoiser.open(rows, slots)

    def admit(self, state: DenoiserState, context: Context, rows: Int[Tensor, "R"]) -> None:
        self.denoiser.admit(state, context, rows)

    def release(self, state: DenoiserState, rows: Int[Tensor, "R"]) -> None:
        self.denoiser.release(state, rows)

    def propose(
        self, context: Context, state: DenoiserState, noise: Noise, draft_len: int
    ) -> Draft:
        """At most `draft_len` nodes, of depth `denoiser.draft_len` at most."""
        params = soft(context.batch.params, self.draft_temperature)
        batch = replace(context.batch, params=params)
        depth = min(self.denoiser.draft_len, draft_len)
        canvas = batch.ids.new_full((len(batch.length), depth), self.mask_id)
        logits = self.denoiser.denoise(context, state, canvas, torch.zeros_like(canvas).bool())
        columns = self.denoiser.columns
        q = distribution(logits, batch, batch.ids[:, :0], columns)
        return best_first(
            lambda level, tokens: q[:, level, None], batch.anchor, depth, draft_len, columns
        )


def soft(params: Params, factor: float) -> Params:
    """The request's parameters with the draft temperature multiplied in, where none is greedy."""
    params = tempered(params, factor)
    temperature = params.temperature.masked_fill(params.temperature == 0, 1)
    return replace(params, temperature=temperature, all_greedy=False)


def best_first(
    following: Following,
    anchor: Int[Tensor, "B"],
    depth: int,
    budget: int,
    columns: Int[Tensor, "C"] | None = None,
) -> Draft:
    """The `budget` heaviest nodes of each row, parents first. Nodes without weight do not count."""
    weight = torch.zeros(len(anchor), 1, device=anchor.device)
    tokens = anchor[:, None]
    levels = []
    first = -1  # the index of the depth's first node among those of all depths
    for level in range(depth):
        q = following(level, tokens)
        own = q.topk(min(budget, q.shape[-1]), dim=-1)
        scores = (weight[..., None] + own.values.float().log()).flatten(1)
        best = scores.topk(min(budget, scores.shape[1]), dim=1)
        parents = best.indices // own.indices.shape[-1] + first
        ids = own.indices.expand(-1, tokens.shape[1], -1).flatten(1).gather(1, best.indices)
        first += tokens.shape[1]
        weight = best.values
        tokens = ids if columns is None else columns[ids]
        levels.append((weight, tokens, parents))
    weight, tokens, parents = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
    return _heaviest(weight, tokens, parents, budget)


def _heaviest(
    weight: Float[Tensor, "B M"],
    tokens: Int[Tensor, "B M"],
    parents: Int[Tensor, "B M"],
    budget: int,
) -> Draft:
    """The draft of the heaviest candidates. `parents` are candidates too, -1 the anchor."""
    # stable: a child that weighs as much as its parent stays after it
    order = weight.sort(dim=1, descending=True, stable=True)
    rank = order.indices.argsort(dim=1)
    nodes = order.indices[:, :budget]
    parents = parents.gather(1, nodes)
    parents = torch.where(parents < 0, -1, rank.gather(1, parents.clamp(min=0)))
    size = (order.values[:, :budget] > -torch.inf).sum(1)
    return Draft(tokens.gather(1, nodes), None, size, parents)
