"""Which free row a joining request should take: the one that holds the longest prefix of its prompt already."""

from bisect import bisect_left
from collections.abc import Sequence


def shared(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
        min(len(one), len(two)),
    )


def seats(held: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each prompt (place in `held`, how many of its first tokens lie there: at most all but the last). No place is given twice.

    Who shares most chooses first; who shares nothing takes the place that holds least. There must be a place for each prompt.
    """
    free = sorted((list(tokens), place) for place, tokens in enumerate(held))

    def best(prompt: list[int]) -> tuple[int, int]:
        at = bisect_left(
            free, (prompt, -1)
        )  # neighbours in sorted order share the longest prefixes
        found = max((shared(free[i][0], prompt), i) for i in (at - 1, at) if 0 <= i < len(free))
        return (
            found
            if found[0]
            else (0, min(range(len(free)), key=lambda i: (len(free[i][0]), free[i][1])))
        )

    wanted = [list(prompt) for prompt in prompts]
    given = [(0, 0)] * len(wanted)
    for j in sorted(range(len(wanted)), key=lambda j: -best(wanted[j])[0]):
        share, i = best(wanted[j])
        given[j] = free.pop(i)[1], min(share, len(wanted[j]) - 1)
    return given
