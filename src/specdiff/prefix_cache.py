"""Prefix reuse: a joining request takes the free row with the longest prefix of its prompt."""

from bisect import bisect_left
from collections.abc import Sequence


def shared(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for n, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return n
    return min(len(one), len(two))


def seats(rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """A different row for each prompt, and the length of the prefix they share.

    The length is at most len(prompt) - 1. The prompt that shares most chooses first; one that
    shares nothing takes the row that holds least. There must be a row for each prompt.
    """
    free = sorted((list(tokens), row) for row, tokens in enumerate(rows))
    remaining = {index: list(prompt) for index, prompt in enumerate(prompts)}
    order = sorted(remaining, key=lambda index: -_best(free, remaining[index])[0])
    seating = [(0, 0)] * len(prompts)
    for index in order:
        length, place = _best(free, remaining[index])
        _, row = free.pop(place)
        seating[index] = row, min(length, len(prompts[index]) - 1)
    return seating


def _best(free: list[tuple[list[int], int]], prompt: list[int]) -> tuple[int, int]:
    """The longest shared prefix, and its place in `free`, which is sorted."""
    place = bisect_left(free, (prompt, -1))
    neighbors = [i for i in (place - 1, place) if 0 <= i < len(free)]  # share the longest prefixes
    length, best = max((shared(free[i][0], prompt), i) for i in neighbors)
    if length:
        return length, best
    return 0, min(range(len(free)), key=lambda i: (len(free[i][0]), free[i][1]))
