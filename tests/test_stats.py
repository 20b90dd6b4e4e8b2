"""Counts of rounds add up, however they are split."""

from dataclasses import fields

from specdiff.stats import Stats

ROUNDS = [(3, 2, 3, False), (3, 0, 1, False), (0, 0, 1, False), (2, 2, 3, True), (0, 0, 1, True)]


def counted(rounds: list[tuple[int, int, int, bool]]) -> Stats:
    stats = Stats()
    for drafted, accepted, emitted, disabled in rounds:
        stats.add(drafted, accepted, emitted, {"draft": 0.5, "score": 0.25}, disabled=disabled)
    return stats


def test_merged_counts_are_those_of_all_rounds() -> None:
    """Of every field: a request that broke nothing, and one whose drafter broke."""
    merged = counted(ROUNDS[:3])
    merged.merge(counted(ROUNDS[3:]))
    assert merged == counted(ROUNDS)
    assert all(getattr(merged, f.name) for f in fields(Stats)), (
        "a field that stays empty shows nothing"
    )
    assert merged.tau == 9 / 5 and merged.alpha == 0.5 and merged.per_position == [2 / 3, 1.0, 0.0]


def test_tokens_cut_off_behind_the_end_were_never_accepted() -> None:
    stats = counted([(4, 4, 2, False)])
    assert (stats.accepted, stats.tokens, stats.passed) == (2, 2, [1, 1, 0, 0])
    assert stats.reached == [1, 1, 0, 0], "nor were they rejected"
    assert counted([(4, 2, 2, False)]).reached == [1, 1, 0, 0] and counted(
        [(4, 2, 3, False)]
    ).reached == [1, 1, 1, 0]
