"""Trees of the most likely nodes: best-first search with a heap gives the same."""

import heapq
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from doubles import ToyDenoiser
from specdiff.drafters.block import BlockTreeDrafter
from specdiff.drafters.sedd import SEDDDenoiser, sedd
from specdiff.drafters.tree import TreeDrafter, best_first
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.tree import above, depths, related
from specdiff.types import Batch, Context, Draft, SamplingParams

V, DEPTH = 7, 4


def heap(laws: dict[tuple[int, ...], list[float]], budget: int) -> dict[tuple[int, ...], float]:
    """The texts of the nodes and their weights: pop one, push its next sibling and first child."""
    order = {text: sorted(range(V), key=lambda x: -row[x]) for text, row in laws.items()}
    nodes: dict[tuple[int, ...], float] = {}
    queue = [(-laws[()][order[()][0]], (), 0, 1.0)]
    while queue and len(nodes) < budget:
        weight, text, rank, above_ = heapq.heappop(queue)
        node = (*text, order[text][rank])
        nodes[node] = -weight
        if rank + 1 < V:
            sibling = above_ * laws[text][order[text][rank + 1]]
            heapq.heappush(queue, (-sibling, text, rank + 1, above_))
        if node in laws:
            child = -weight * laws[node][order[node][0]]
            heapq.heappush(queue, (-child, node, 0, -weight))
    return nodes


def texts_of(draft: Draft, row: int) -> list[tuple[int, ...]]:
    line = above(draft)[row, 1:]
    return [tuple(draft.tokens[row][nodes].tolist()) for nodes in line]


@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("budget", [2, 5, 16, 64, 256])
def test_it_is_the_tree_of_best_first_search(budget: int, markov: bool) -> None:
    generator = torch.Generator().manual_seed(budget)
    rows = 3
    position = 3 * torch.randn(rows, DEPTH, V, dtype=torch.float64, generator=generator)
    bias = 2 * torch.randn(V, V, dtype=torch.float64, generator=generator) * markov

    def law(level: int, tokens: Tensor) -> Tensor:
        return (position[:, level, None] + bias[tokens]).softmax(-1)

    anchor = torch.tensor([0, 3, 6])
    draft = best_first(law, anchor, DEPTH, budget)
    assert draft.parents is not None
    assert bool((draft.parents < torch.arange(draft.tokens.shape[1])).all())
    for row in range(rows):
        laws: dict[tuple[int, ...], list[float]] = {}
        queue: list[tuple[int, ...]] = [()]
        while queue:
            text = queue.pop()
            last = anchor if not text else torch.full((rows,), text[-1])
            laws[text] = law(len(text), last[:, None])[row, 0].tolist()
            if len(text) + 1 < DEPTH:
                queue += [(*text, x) for x in range(V)]
        expected = heap(laws, budget)
        assert set(texts_of(draft, row)) == set(expected)
        weights = [expected[text] for text in texts_of(draft, row)]
        assert weights == sorted(weights, reverse=True)


def test_nodes_without_weight_do_not_count_and_certain_ones_come_after_their_parents() -> None:
    law = torch.zeros(1, 1, V, dtype=torch.float64)
    law[..., 2] = 1
    draft = best_first(lambda level, tokens: law, torch.tensor([0]), 3, 8)
    assert draft.sizes.tolist() == [3]
    assert draft.tokens[0, :3].tolist() == [2, 2, 2]
    assert draft.parents is not None and draft.parents[0, :3].tolist() == [-1, 0, 1]


def test_columns_are_ids() -> None:
    law = torch.tensor([[[0.1, 0.9]]])
    columns = torch.tensor([3, 5])
    draft = best_first(lambda level, tokens: law, torch.tensor([0]), 2, 3, columns)
    assert draft.tokens.tolist() == [[5, 5, 3]]


def test_relations_of_a_tree() -> None:
    draft = Draft(torch.zeros(1, 5, dtype=torch.long), parents=torch.tensor([[-1, 0, 0, 2, -1]]))
    assert depths(draft).tolist() == [[0, 1, 2, 2, 3, 1]]
    lines = [row.nonzero()[:, 0].tolist() for row in related(draft)[0]]
    assert lines == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 5]]
    chain = replace(draft, parents=None)
    assert depths(chain).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_greedy_tree_has_the_argmax_chain_and_a_filter_cuts_it() -> None:
    denoiser = ToyDenoiser(V, seed=2)
    for params, count in (({"temperature": 0}, 6), ({"top_k": 1}, 3)):
        batch = Batch.of([[1], [2, 3]], [SamplingParams(**params)] * 2, [0, 1])
        context = Context(batch, None, torch.zeros_like(batch.length), None)
        draft = TreeDrafter(denoiser, 6).propose(context, None, Noise.of(batch), 6)
        canvas = torch.full((2, 3), denoiser.mask_id)
        best = denoiser.denoise(context, None, canvas, canvas < 0).argmax(-1)
        assert draft.sizes.tolist() == [count, count]
        for row in range(2):
            assert tuple(best[row].tolist()) in texts_of(draft, row)


@pytest.mark.parametrize("tree", [0, 1, 257, -4])
def test_a_budget_out_of_range_is_refused(tree: int) -> None:
    with pytest.raises(
        UsageError, match=rf"tree must be a number of nodes in \[2, 256\], not {tree}"
    ):
        TreeDrafter(ToyDenoiser(V), tree)
    target = tiny.target("llama").info
    with pytest.raises(UsageError, match="tree must be"):
        BlockTreeDrafter(tiny.block(), target, tree)


def test_a_tree_takes_one_pass_over_mask(tmp_path: Path) -> None:
    target = tiny.target("llama").info
    for options in ({"steps": 2}, {"order": "any"}, {"order": "left-to-right"}):
        with pytest.raises(UsageError, match="a tree is drafted in one pass"):
            sedd(target, tmp_path, tree=4, **options)
    uniform = tiny.sedd_config(process="uniform", scale_by_sigma=False, schedule="geometric")
    denoiser = SEDDDenoiser(tiny.sedd(uniform), target)
    with pytest.raises(UsageError, match="uniform process has none"):
        TreeDrafter(denoiser, 4)
