"""Prompt lookup: against a slow version, by hand, and ragged in one batch through the real loop."""

import pytest
import torch

import tiny
from specdiff import catalog, decode, stats
from specdiff.drafters.ngram import NGramDrafter
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.targets.table import TableTarget
from specdiff.types import Context, Draft
from specdiff.verify import VERIFIERS

TARGET = TableTarget.random(4, seed=3)


def propose(rows: list[list[int]], draft_len: int, **options: int) -> Draft:
    batch = tiny.batch_of(rows)
    drafter = NGramDrafter(TARGET.info, **options)
    context = Context(batch, None, torch.zeros_like(batch.length), None)
    state = drafter.open(len(rows), batch.ids.shape[1])
    drafter.admit(state, context, torch.arange(len(rows)))
    return drafter.propose(context, state, Noise.of(batch), draft_len)


def slow(row: list[int], draft_len: int, longest: int, shortest: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for after in range(len(row) - 1, n - 1, -1):
            if row[after - n : after] == row[len(row) - n :]:
                text = row[after:]
                while len(text) < draft_len:
                    text += row[after:]
                return text[:draft_len]
    return []


@pytest.mark.parametrize(("longest", "shortest"), [(4, 1), (3, 2), (1, 1), (6, 5)])
def test_against_a_slow_version(longest: int, shortest: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    rows = [
        torch.randint(3, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 30, (60,), generator=generator)
    ]
    draft = propose(rows, 5, longest=longest, shortest=shortest)
    assert draft.probs is None and draft.size is not None
    drafts = [
        tokens[:size]
        for tokens, size in zip(draft.tokens.tolist(), draft.size.tolist(), strict=True)
    ]
    assert drafts == [slow(row, 5, longest, shortest) for row in rows]
    assert {len(f) for f in drafts} == {0, 5}


def test_the_longest_match_wins_then_the_most_recent() -> None:
    assert propose([[1, 2, 9, 3, 2, 7, 1, 2]], 2).tokens.tolist() == [[9, 3]]
    assert propose([[2, 9, 5, 2, 7, 5, 2]], 2, longest=1).tokens.tolist() == [[7, 5]]


def test_a_loop_goes_on_past_the_end_of_the_row() -> None:
    assert propose([[8, 1, 2, 3, 1, 2, 3]], 7).tokens.tolist() == [[1, 2, 3, 1, 2, 3, 1]]
    assert propose([[5, 5]], 3).tokens.tolist() == [[5, 5, 5]]


def test_no_match_anywhere_is_a_plain_round() -> None:
    assert propose([[1, 2, 3], [7]], 4).tokens.shape == (2, 0)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_row_without_a_match_next_to_one_with(verifier: str) -> None:
    """The first round of the second row is plain; each row's text is the one it has alone."""
    rows, drafter = [[1, 2, 0, 1, 2], [3]], catalog.drafter("ngram", TARGET.info)
    rounds = list(
        decode.decode(
            TARGET, drafter, tiny.batch_of(rows), verifier=VERIFIERS[verifier], draft_len=3
        )
    )
    assert rounds[0].draft.size is not None and rounds[0].draft.size.tolist() == [3, 0]
    assert int(rounds[0].verification.accepted[1]) == 0 and int(rounds[0].emitted[1]) == 1
    assert stats.fold(rounds)[1].plain_rounds >= 1 and stats.fold(rounds)[0].drafted > 0
    for i, row in enumerate(rows):
        alone = tiny.decoded(
            TARGET,
            drafter,
            tiny.batch_of([row], seeds=[i]),
            verifier=VERIFIERS[verifier],
            draft_len=3,
        )
        assert alone[0] == tiny.rows_of(rounds[-1].batch)[i]


def test_a_repetitive_greedy_text_is_drafted_well() -> None:
    batch = tiny.batch_of([[1, 2]], max_tokens=60, temperature=0.0)
    folded = stats.fold(decode.decode(TARGET, NGramDrafter(TARGET.info), batch, draft_len=8))[0]
    assert folded.tau > 3


@pytest.mark.parametrize(
    "options", [{"longest": 0}, {"shortest": 0}, {"longest": 2, "shortest": 3}]
)
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="ngram needs 1 <= shortest <= longest, not shortest="):
        catalog.drafter("ngram", TARGET.info, options)
    with pytest.raises(UsageError, match="does not take these options"):
        catalog.drafter("ngram", TARGET.info, {"order": "any"})
