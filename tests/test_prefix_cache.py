"""Who sits where: the longest shared prefix, by comparing everything with everything."""

import random

import pytest

from specdiff.prefix_cache import seats, shared


@pytest.mark.parametrize(
    ("rows", "prompts", "seating"),
    [
        ([[1, 2, 3], [1, 2]], [[1, 2, 3, 4]], [(0, 3)]),
        ([[1, 2, 3]], [[1, 2, 3]], [(0, 2)]),  # the last token is always read
        ([[1, 2, 3]], [[1]], [(0, 0)]),
        ([[], []], [[1], [2]], [(0, 0), (1, 0)]),
        (
            [[5, 6, 7], [1], [5, 6]],
            [[9, 9]],
            [(1, 0)],
        ),  # nothing in common: the row that holds least
        (
            [[5, 6, 7], [5]],
            [[5, 1], [5, 6, 7, 8]],
            [(1, 1), (0, 3)],
        ),  # who shares most chooses first
    ],
)
def test_small_cases(
    rows: list[list[int]], prompts: list[list[int]], seating: list[tuple[int, int]]
) -> None:
    assert seats(rows, prompts) == seating


def some_tokens(chance: random.Random, least: int) -> list[int]:
    return [chance.randrange(3) for _ in range(chance.randrange(least, 9))]


def test_against_comparing_everything() -> None:
    chance = random.Random(0)
    for _ in range(300):
        rows = [some_tokens(chance, 0) for _ in range(chance.randrange(1, 9))]
        prompts = [some_tokens(chance, 1) for _ in range(chance.randrange(1, len(rows) + 1))]
        seating = seats(rows, prompts)
        assert len({place for place, _ in seating}) == len(prompts)
        for (place, length), prompt in zip(seating, prompts, strict=True):
            assert length == min(shared(rows[place], prompt), len(prompt) - 1)
        most = [max(shared(tokens, prompt) for tokens in rows) for prompt in prompts]
        first = max(range(len(prompts)), key=most.__getitem__)
        assert seating[first][1] == min(most[first], len(prompts[first]) - 1)
