"""Every tree that a drafter can draw, and every outcome of verifying it, in float64.

Shapes: D drafts, K nodes, N = K + 1 scored rows, V vocabulary, T texts.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from specdiff import verify_tree
from specdiff.tree import above
from specdiff.types import Draft

# parents by node: a chain, siblings, two branches of two, and uneven ones
FORMS: dict[str, tuple[int, ...]] = {
    "chain": (-1, 0, 1),
    "siblings": (-1, -1, -1),
    "branches": (-1, -1, 0, 0, 1, 1),
    "uneven": (-1, 0, -1, 1, 0, 2),
    "late sibling": (-1, 0, 1, 0, -1),
}
Text = tuple[int, ...]
Law = dict[Text, Tensor]  # of the next token, by the tokens before it


def depth_of(parents: Sequence[int]) -> list[int]:
    depth: list[int] = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return depth


def random_law(V: int, longest: int, generator: torch.Generator, *, thin: bool = False) -> Law:
    """Random laws after every text of fewer than `longest` tokens; `thin`: with zeros."""
    law = {}
    for size in range(longest):
        for text in itertools.product(range(V), repeat=size):
            row = torch.rand(V, dtype=torch.float64, generator=generator) ** 3 + 1e-3
            if thin:
                row = row * (torch.rand(V, generator=generator) < 0.6)
                row[int(torch.randint(V, (1,), generator=generator))] += 0.1
            law[text] = row / row.sum()
    return law


def factorised(law: Law) -> Law:
    """The same law after all texts of one length."""
    return {text: law[(0,) * len(text)] for text in law}


@dataclass(frozen=True)
class Drawn:
    """All drafts of a shape with their chances; `texts[d]` are the tokens up to each node."""

    draft: Draft
    chance: Float[Tensor, "D"]
    texts: list[list[Text]]


Draws = Iterator[tuple[list[int], list[Tensor] | None, float]]


def drawn(draws: Draws, parents: Sequence[int]) -> Drawn:
    tokens, probs, chance = zip(*draws, strict=True)
    every = torch.tensor(parents).expand(len(tokens), -1)
    laws = None if probs[0] is None else torch.stack([torch.stack(rows) for rows in probs])
    texts = []
    for row in tokens:
        lines: list[Text] = []
        for node, parent in enumerate(parents):
            lines.append((*(lines[parent] if parent >= 0 else ()), row[node]))
        texts.append(lines)
    return Drawn(
        Draft(torch.tensor(tokens), laws, parents=every),
        torch.tensor(chance, dtype=torch.float64),
        texts,
    )


def without(q: Tensor, tokens: Sequence[int]) -> Tensor:
    """q without these tokens, normalized; a point mass on the first free one if nothing is left."""
    left = q.clone()
    left[list(tokens)] = 0
    if float(left.sum()) == 0:
        left[next(x for x in range(len(q)) if x not in tokens)] = 1
    return left / left.sum()


def independent(q: Law, parents: Sequence[int], *, replacement: bool) -> Draws:
    """Each node from its own parent's law, siblings with or without replacement."""

    def grow(tokens: list[int], laws: list[Tensor], chance: float) -> Draws:
        node = len(tokens)
        if node == len(parents):
            yield tokens, laws, chance
            return
        line: list[int] = []
        at = parents[node]
        while at >= 0:
            line.insert(0, tokens[at])
            at = parents[at]
        own = q[tuple(line)]
        earlier = [tokens[k] for k in range(node) if parents[k] == parents[node]]
        own = own if replacement else without(own, earlier)
        for x, mass in enumerate(own.tolist()):
            if mass > 0:
                yield from grow([*tokens, x], [*laws, own], chance * mass)

    return grow([], [], 1.0)


def lattice(q: Law, parents: Sequence[int], *, replacement: bool) -> Draws:
    """One list of candidates a depth, shared by all parents: sibling i of a node is the i-th."""
    depth = depth_of(parents)
    rank = [sum(parents[j] == parents[k] for j in range(k)) for k in range(len(parents))]
    width = [1 + max(rank[k] for k in range(len(depth)) if depth[k] == d) for d in set(depth)]
    star = [(d, i) for d, w in enumerate(width) for i in range(w)]

    def grow(lists: dict[tuple[int, int], int], laws: dict, chance: float) -> Draws:
        if len(lists) == len(star):
            keys = list(zip(depth, rank, strict=True))
            yield [lists[key] for key in keys], [laws[key] for key in keys], chance
            return
        d, i = star[len(lists)]
        own = q[(0,) * d]
        own = own if replacement else without(own, [lists[d, j] for j in range(i)])
        for x, mass in enumerate(own.tolist()):
            if mass > 0:
                yield from grow({**lists, (d, i): x}, {**laws, (d, i): own}, chance * mass)

    return grow({}, {}, 1.0)


def top_plus_one(q: Law, parents: Sequence[int]) -> Draws:
    """At each node the first child is drawn from what the most likely ones, its later siblings,
    leave of q (evidence: Khisti et al.'s candidates); those are point masses."""
    order = {text: row.sort(descending=True).indices.tolist() for text, row in q.items()}

    def grow(tokens: list[int], laws: list[Tensor], chance: float) -> Draws:
        node = len(tokens)
        if node == len(parents):
            yield tokens, laws, chance
            return
        line: list[int] = []
        at = parents[node]
        while at >= 0:
            line.insert(0, tokens[at])
            at = parents[at]
        text = tuple(line)
        rank = sum(parents[k] == parents[node] for k in range(node))
        family = sum(parent == parents[node] for parent in parents)
        if rank:
            x = order[text][rank - 1]
            point = torch.zeros_like(q[text])
            point[x] = 1
            yield from grow([*tokens, x], [*laws, point], chance)
            return
        own = without(q[text], order[text][: family - 1])
        for x, mass in enumerate(own.tolist()):
            if mass > 0:
                yield from grow([*tokens, x], [*laws, own], chance * mass)

    return grow([], [], 1.0)


def point_masses(V: int, parents: Sequence[int], generator: torch.Generator, count: int) -> Draws:
    """Any trees at all, of any chances, duplicates among siblings too."""
    chances = torch.rand(count, dtype=torch.float64, generator=generator)
    for chance in (chances / chances.sum()).tolist():
        yield torch.randint(V, (len(parents),), generator=generator).tolist(), None, chance


def target_rows(all_drawn: Drawn, p: Law) -> Float[Tensor, "D N V"]:
    return torch.stack([torch.stack([p[()], *(p[t] for t in lines)]) for lines in all_drawn.texts])


Outcomes = Iterator[tuple[Tensor, list[int], Tensor]]  # chances [D], the path's nodes, laws [D, V]
Rule = Callable[[Drawn, Tensor], Outcomes]


def by_plan(plan: Callable[[Draft, Tensor], verify_tree.TreePlan]) -> Rule:
    """The outcomes of the real walk, for every pattern of passing nodes."""

    def outcomes(every: Drawn, p: Tensor) -> Outcomes:
        planned = plan(every.draft, p)
        K = every.draft.tokens.shape[1]
        chances = planned.thresholds.clamp(0, 1)
        patterns = torch.tensor(list(itertools.product((False, True), repeat=K)))
        size = every.draft.size
        assert size is None or bool((size == size[0]).all())
        form = replace(
            every.draft,
            tokens=torch.zeros_like(patterns).long(),
            probs=None,
            size=None if size is None else size[:1].expand(len(patterns)),
            parents=torch.as_tensor(every.draft.parents)[:1].expand(len(patterns), -1),
        )
        accepted, path = verify_tree.walk(form, patterns)
        for pattern, n, rows in zip(patterns, accepted.tolist(), path.tolist(), strict=True):
            chance = torch.where(pattern, chances, 1 - chances).prod(1)
            yield chance, [row - 1 for row in rows[1 : n + 1]], planned.residual[:, rows[n]]

    return outcomes


def matched(every: Drawn, p: Tensor) -> Outcomes:
    """The outcomes of `agree`, for every set of the target's own tokens."""
    D, N, V = p.shape
    for own in itertools.product(range(V), repeat=N):
        token = torch.tensor(own)
        chance = p.gather(2, token.expand(D, -1)[..., None])[..., 0].prod(1)
        result = verify_tree.agree(every.draft, token.expand(D, -1))
        for d in range(D):
            n = int(result.accepted[d])
            mass = torch.zeros_like(chance)
            mass[d] = chance[d]
            following = torch.zeros(D, V, dtype=torch.float64)
            following[d, result.tokens[d, n]] = 1
            yield mass, [row - 1 for row in result.path[d, 1 : n + 1].tolist()], following


def emitted(every: Drawn, p: Law, rule: Rule, longest: int) -> dict[Text, float]:
    """The chance of each text of `longest` tokens: the round's, and the rest from p."""
    rows = target_rows(every, p)
    law: dict[Text, float] = dict.fromkeys(
        itertools.product(range(rows.shape[2]), repeat=longest), 0
    )

    def rest(text: Text, mass: float) -> None:
        if len(text) == longest:
            law[text] += mass
            return
        for x, chance in enumerate(p[text].tolist()):
            rest((*text, x), mass * chance)

    starts: dict[Text, float] = {}
    for chance, path, following in rule(every, rows):
        masses = (chance * every.chance)[:, None] * following
        for d, row in enumerate(masses.tolist()):
            text = every.texts[d][path[-1]] if path else ()
            for x, mass in enumerate(row):
                if mass > 0:
                    starts[(*text, x)] = starts.get((*text, x), 0) + mass
    for text, mass in starts.items():
        rest(text, mass)
    return law


def error(every: Drawn, p: Law, rule: Rule, longest: int) -> float:
    """The largest error of any text's chance."""
    law = emitted(every, p, rule, longest)
    worst = 0.0
    for text, mass in law.items():
        chance = 1.0
        for k, x in enumerate(text):
            chance *= float(p[text[:k]][x])
        worst = max(worst, abs(mass - chance))
    return worst


def traversal(every: Drawn, p: Tensor) -> Outcomes:
    """BUG on a lattice: from the leaves up, as if every subtree had been drawn independently."""
    draft = every.draft
    assert draft.parents is not None and draft.probs is not None
    D, K = draft.tokens.shape
    parents = draft.parents[0].tolist()
    line = above(draft)[0]
    for d in range(D):
        results: list[tuple[float, int, Tensor]] = []

        def visit(node: int, scale: float, weight: float, d: int = d, results=results) -> float:
            b = p[d, node + 1].clone()
            assert draft.probs is not None
            for child in range(K):
                if parents[child] != node:
                    continue
                x = int(draft.tokens[d, child])
                s = draft.probs[d, child]
                passes = min(1.0, scale * float(b[x]) / float(s[x])) if float(s[x]) > 0 else 0.0
                weight = visit(child, passes, weight)
                if weight <= 1e-15:
                    return 0.0
                r = (scale * b - s).clamp(min=0)
                total = float(r.sum())
                scale = 1.0 if total + 1 - scale <= 1e-15 else total / (total + 1 - scale)
                b = r / r.sum() if total > 0 else b
            results.append((weight * scale, node, b))
            return weight * (1 - scale)

        visit(-1, 1.0, 1.0)
        for weight, node, b in results:
            mass = torch.zeros(D, dtype=torch.float64)
            mass[d] = weight
            yield mass, line[node + 1].nonzero()[:, 0].tolist(), b.expand(D, -1)
