"""The loop's contracts: who advances the batch, where text is cut, and what a drafter gets to see."""

from dataclasses import replace

import pytest
import torch

from specdiff import decode
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UsageError
from specdiff.noise import Noise, Purpose
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, Round, SamplingParams
from specdiff.verify import VERIFIERS

V = 5
TARGET = TableTarget.random(V, seed=3)


class Witness(Drafter[dict[str, torch.Tensor]]):
    """Drafts uniformly, and checks that its features are exactly the tokens that entered the cache since it last looked."""

    taps = (0, 0)
    draft_len = 3

    def open(self, rows: int, slots: int) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros(rows, dtype=torch.long)}

    def admit(self, state: dict[str, torch.Tensor], context: Context, rows: torch.Tensor) -> None:
        state["seen"][rows] = 0

    def release(self, state: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
        return None

    def propose(self, context: Context, state: dict[str, torch.Tensor], noise: Noise, draft_len: int) -> Draft:
        assert context.features is not None
        for row, seen in enumerate(state["seen"].tolist()):
            entered = context.batch.ids[row, seen : context.batch.length[row] - 1]
            size = int(context.feature_size[row])
            assert size == len(entered)
            expected = torch.nn.functional.one_hot(entered, V).double().repeat(1, 2)
            assert torch.equal(context.features[row, :size], expected)
        state["seen"] = context.batch.length - 1
        assert (context.previous is None) == bool((context.batch.round == 0).all())
        u = noise.uniform(Purpose.DRAFT, draft_len)
        return Draft((u * V).long(), torch.full((*u.shape, V), 1 / V, dtype=torch.float64))


def batch(rows: int = 4, max_tokens: int = 30, **options: object) -> Batch:
    prompts = [[(r + i) % V for i in range(r + 1)] for r in range(rows)]
    return Batch.of(prompts, [SamplingParams(max_tokens=max_tokens, **options)] * rows, range(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [(3,), (3, 0), (0, 0, 2, 3, 0)])
def test_features_are_what_entered_the_cache_also_across_rounds_without_drafting(pattern: tuple[int, ...]) -> None:
    turn = iter(range(10**6))
    rounds = list(decode.decode(TARGET, Witness(), batch(), draft_len=lambda _: pattern[next(turn) % len(pattern)]))
    assert rounds[-1].batch.done.all()


def test_features_follow_rows_that_join_late() -> None:
    run = decode.start(TARGET, Witness(), batch(), slots=64)
    decode.admit(run, torch.arange(4))
    for k in (3, 0, 3):
        decode.step(run, k)
    rows = torch.tensor([1, 3])
    decode.release(run, rows)
    fresh = Batch.of([[0, 1, 2, 3, 4, 0, 1], [2]], [SamplingParams(max_tokens=9)] * 2, [7, 8])
    run.batch = run.batch.with_rows(rows, fresh)
    decode.admit(run, rows)
    while not bool(run.batch.done.all()):
        decode.step(run, 3)
    alone = list(decode.decode(TARGET, Witness(), fresh, draft_len=3))[-1].batch
    for row, single in zip(rows.tolist(), range(2), strict=True):
        length = int(alone.length[single])
        assert torch.equal(run.batch.ids[row, :length], alone.ids[single, :length])


@pytest.mark.parametrize("name", VERIFIERS)
def test_rounds_append_what_was_verified_and_change_nothing_else(name: str) -> None:
    before = batch()
    for r in decode.decode(TARGET, Witness(), before, verifier=VERIFIERS[name]):
        assert torch.equal(r.batch.length, before.length + r.emitted)
        for row, n in enumerate(r.emitted.tolist()):
            length = int(before.length[row])
            assert torch.equal(r.batch.ids[row, :length], before.ids[row, :length])
            assert torch.equal(r.batch.ids[row, length : length + n], r.verification.tokens[row, :n])
            assert bool(before.done[row]) == (n == 0)
        assert torch.equal(r.batch.round, before.round + (r.emitted > 0))
        assert set(r.seconds) == {"draft", "score", "verify", "commit"}
        before = r.batch
    assert torch.equal(before.length, before.params.limit)


def test_a_stop_id_inside_a_draft_ends_the_row_exactly_there() -> None:
    final = list(decode.decode(TARGET, Witness(), batch(64, 200, stop_token_ids=(2, 4)), draft_len=3))[-1].batch
    for row in range(64):
        tail = final.ids[row, final.prompt_length[row] : final.length[row]].tolist()
        assert tail[-1] in (2, 4) and not {2, 4} & set(tail[:-1])


def test_stop_may_end_rows_and_later_rounds_leave_them_alone() -> None:
    def stop(last: Round) -> torch.Tensor:
        return last.batch.length >= 10

    rounds = list(decode.decode(TARGET, NoDrafter(), batch(), stop=stop))
    assert rounds[-1].batch.length.tolist() == [10, 10, 10, 10]


def test_draft_len_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="draft_len must be at least 1, not 0"):
        next(decode.decode(TARGET, Witness(), batch(), draft_len=0))


def test_commit_never_writes_beyond_the_limit() -> None:
    b = batch(2, 2)
    wide = replace(b, ids=torch.nn.functional.pad(b.ids, (0, 8), value=9))
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    from specdiff.types import Verification

    after, emitted = decode.commit(wide, Verification(torch.tensor([3, 3]), tokens, tokens))
    assert emitted.tolist() == [2, 2] and after.done.all()
    assert (after.ids[0, 3:] == wide.ids[0, 3:]).all()
