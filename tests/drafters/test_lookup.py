"""Text indexes: grown step by step they are those of the whole text; memory is bounded."""

import random

import pytest
import torch

import tiny
from specdiff import catalog, decode
from specdiff.drafters.lookup import Memory, TextIndex
from specdiff.drafters.ngram import WINDOW, NGramDrafter
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.targets.table import TableTarget
from specdiff.types import Context
from specdiff.verify import VERIFIERS

SIZES = range(1, 5)
TARGET = TableTarget.random(4, seed=3)


def test_an_index_that_grew_is_that_of_the_whole_text() -> None:
    chance = random.Random(0)
    grown = TextIndex(SIZES)
    text: list[int] = []
    for _ in range(80):
        new = [chance.randrange(4) for _ in range(chance.randrange(4))]
        text += new
        grown.extend(new)
        whole = TextIndex(SIZES)
        whole.restart(list(text))
        assert (grown.tokens, grown.places) == (text, whole.places)
        assert grown.match() == whole.match()


def test_a_text_that_is_continued_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    index = TextIndex(SIZES)
    index.restart([1, 2, 3, 1, 2])
    sizes = []
    extend = TextIndex.extend
    monkeypatch.setattr(
        TextIndex, "extend", lambda self, new: (sizes.append(len(new)), extend(self, new))
    )
    index.restart([1, 2, 3, 1, 2, 3, 1])
    index.restart([1, 2, 4, 1, 2])
    assert sizes == [2, 5]
    match = index.match()
    assert match is not None and match.following(4) == [4, 1, 2, 4]


def test_a_round_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round after a long prompt indexes its new tokens alone."""
    sizes: list[int] = []
    extend = TextIndex.extend

    def counted(self: TextIndex, tokens: list[int]) -> None:
        sizes.append(len(tokens))
        extend(self, tokens)

    monkeypatch.setattr(TextIndex, "extend", counted)
    drafter = NGramDrafter(TARGET.info)
    batch = tiny.batch_of([[0, 1, 2, 3] * 100], max_tokens=20)
    rounds = list(decode.decode(TARGET, drafter, batch, draft_len=3))
    emitted = [int(r.emitted[0]) for r in rounds]
    assert sizes == [400, *emitted[:-1]]  # what the last round commits is never looked up


def test_rounds_without_drafting_are_caught_up_with() -> None:
    drafter = NGramDrafter(TARGET.info)
    text = [0, 1, 2, 3, 0] * 50
    prompt = tiny.batch_of([text[:7], [1]], max_tokens=len(text))
    state = drafter.open(2, len(text))
    context = Context(prompt, None, torch.zeros_like(prompt.length), None)
    drafter.admit(state, context, torch.arange(2))
    assert len(text) > WINDOW + 7
    for length in (8, len(text)):
        batch = tiny.batch_of([text[:length], [1]])
        context = Context(batch, None, torch.zeros_like(batch.length), None)
        draft = drafter.propose(context, state, Noise.of(batch), 3)
        assert state.texts[0].tokens == text[:length]
    assert draft.tokens.tolist()[0] == [0, 1, 2] and draft.sizes.tolist() == [3, 0]


def test_memory_gives_what_followed_in_an_earlier_text() -> None:
    memory = Memory(100, SIZES)
    memory.add([5, 6, 7, 8, 9])
    index = TextIndex(SIZES)
    index.restart([7, 1, 6, 7])
    own, other = index.match(), index.match(memory)
    assert own is not None and own.following(2) == [1, 6]
    assert other is not None and other.following(5) == [8, 9]  # the longer match; cut at its end
    index.restart([6, 7, 3, 6, 7])
    match = index.match(memory)
    assert match is not None and match.following(1) == [3]  # of equals, the text's own


def test_memory_is_bounded_and_leaves_nothing_of_what_it_forgets() -> None:
    chance = random.Random(1)
    memory = Memory(40, SIZES)
    texts = [[chance.randrange(4) for _ in range(chance.randrange(60))] for _ in range(50)]
    for text in texts:
        memory.add(text)
        assert memory.size == sum(map(len, memory.texts)) <= 40
        assert {id(t) for t, _ in memory.places.values()} <= {id(t) for t in memory.texts}
    memory.add([9] * 100)
    assert memory.size == 40 and len(memory.texts) == 1
    assert list(memory.places.values()) == [(memory.texts[0], 39)] * 4


def test_a_longer_text_replaces_its_own_beginning() -> None:
    memory = Memory(100, SIZES)
    memory.add([1, 2, 3])
    memory.add([1, 2, 3, 4, 5])
    assert list(memory.texts) == [(1, 2, 3, 4, 5)] and memory.size == 5


@pytest.mark.parametrize("verifier", ["match", "match-gumbel"])
def test_with_a_memory_a_seed_still_gives_one_text_under_match(verifier: str) -> None:
    drafter = NGramDrafter(TARGET.info, memory=1000)
    fresh = NGramDrafter(TARGET.info)
    rule = VERIFIERS[verifier]
    for seed in range(6):
        batch = tiny.batch_of([[1, 2], [3]], seeds=[seed, seed + 50], max_tokens=30)
        texts = tiny.decoded(TARGET, drafter, batch, verifier=rule, draft_len=4)
        assert texts == tiny.decoded(TARGET, fresh, batch, verifier=rule, draft_len=4)
    assert drafter.memory is not None and drafter.memory.size > 200
    assert fresh.reproducible and not drafter.reproducible


def test_a_bad_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="memory must be a number of tokens >= 0, not -1"):
        catalog.drafter("ngram", TARGET.info, {"memory": -1})
