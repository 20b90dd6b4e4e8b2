"""The loop's contracts: who advances the batch, where text is cut, what a drafter sees."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from doubles import SICKNESS, Sick
from specdiff import decode
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import TargetError, UsageError
from specdiff.noise import Noise, Purpose
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, Round, SamplingParams
from specdiff.verify import VERIFIERS

V = 5
TARGET = TableTarget.random(V, seed=3)


class Witness(Drafter[dict[str, torch.Tensor]]):
    """Drafts uniformly, and checks its features.

    They must be exactly the tokens that entered the cache since its last propose.
    """

    taps = (0, 0)
    draft_len = 3

    def open(self, rows: int, slots: int) -> dict[str, torch.Tensor]:
        return {"position": torch.zeros(rows, dtype=torch.long)}

    def admit(self, state: dict[str, torch.Tensor], context: Context, rows: torch.Tensor) -> None:
        state["position"][rows] = 0

    def propose(
        self, context: Context, state: dict[str, torch.Tensor], noise: Noise, draft_len: int
    ) -> Draft:
        assert context.features is not None
        for row, position in enumerate(state["position"].tolist()):
            entered = context.batch.ids[row, position : context.batch.length[row] - 1]
            size = int(context.feature_size[row])
            assert size == len(entered)
            expected = torch.nn.functional.one_hot(entered, V).double().repeat(1, 2)
            assert torch.equal(context.features[row, :size], expected)
        state["position"] = context.batch.length - 1
        assert (context.previous is None) == bool((context.batch.round == 0).all())
        u = noise.uniform(Purpose.DRAFT, draft_len)
        return Draft((u * V).long(), torch.full((*u.shape, V), 1 / V, dtype=torch.float64))


def batch(rows: int = 4, max_tokens: int = 30, **options: object) -> Batch:
    prompts = [(torch.arange(r, 2 * r + 1) % V).tolist() for r in range(rows)]
    return Batch.of(prompts, [SamplingParams(max_tokens=max_tokens, **options)] * rows, range(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [(3,), (3, 0), (0, 0, 2, 3, 0)])
def test_features_are_what_entered_the_cache_also_across_rounds_without_drafting(
    pattern: tuple[int, ...],
) -> None:
    turn = iter(range(10**6))
    rounds = list(
        decode.decode(
            TARGET, Witness(), batch(), draft_len=lambda _: pattern[next(turn) % len(pattern)]
        )
    )
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
            assert torch.equal(
                r.batch.ids[row, length : length + n], r.verification.tokens[row, :n]
            )
            assert bool(before.done[row]) == (n == 0)
        assert torch.equal(r.batch.round, before.round + (r.emitted > 0))
        assert set(r.seconds) == {"draft", "score", "verify", "commit"}
        before = r.batch
    assert torch.equal(before.length, before.params.limit)


def test_a_stop_id_inside_a_draft_ends_the_row_exactly_there() -> None:
    final = list(
        decode.decode(TARGET, Witness(), batch(64, 200, stop_token_ids=(2, 4)), draft_len=3)
    )[-1].batch
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


def rounds_until_the_error(
    target: Any, drafter: Drafter[Any], rows: Batch, verifier: str
) -> tuple[list[Round], str]:
    """The rounds that were yielded, and the message that came after them."""
    rounds = []
    with pytest.raises(TargetError) as caught:
        for r in decode.decode(target, drafter, rows, verifier=VERIFIERS[verifier], draft_len=3):
            rounds.append(r)
    return rounds, str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("sickness", SICKNESS)
def test_a_row_whose_logits_are_not_finite_ends_there_and_the_others_go_on(
    sickness: str, verifier: str, temperature: float
) -> None:
    rows = batch(4, temperature=temperature, top_k=3, top_p=0.9, logprobs=1)
    healthy = tiny.decoded(TARGET, Witness(), rows, verifier=VERIFIERS[verifier], draft_len=3)
    rounds, message = rounds_until_the_error(
        Sick(TARGET, SICKNESS[sickness], 12, seed=2), Witness(), rows, verifier
    )
    assert message.startswith("row 2: the target's logits at position 12 are not finite")
    texts = tiny.rows_of(rounds[-1].batch)
    assert texts[2] == healthy[2][: len(texts[2])] and len(texts[2]) <= 12
    assert [texts[row] for row in (0, 1, 3)] == [healthy[row] for row in (0, 1, 3)]
    failed = torch.stack([r.failed for r in rounds])
    assert failed.amax(0).tolist() == [-1, -1, 12, -1] and (failed[:, 2] == 12).sum() == 1
    at = int((failed[:, 2] == 12).nonzero()[0, 0])
    assert rounds[at].emitted[2] == 0 and rounds[at].batch.done[2]
    assert all(r.emitted[2] == 0 for r in rounds[at:])


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_position_that_no_row_arrives_at_may_have_any_logits(verifier: str) -> None:
    """Past the limit, and after a stop id in the draft: no token comes from there."""
    rows = batch(4, max_tokens=7, stop_token_ids=(2,))
    ends = [
        len(text)
        for text in tiny.decoded(TARGET, Witness(), rows, verifier=VERIFIERS[verifier], draft_len=3)
    ]
    for row, end in enumerate(ends):
        healthy = tiny.decoded(TARGET, Witness(), rows, verifier=VERIFIERS[verifier], draft_len=3)
        sick = Sick(TARGET, SICKNESS["all nan"], end, seed=row)
        assert (
            tiny.decoded(sick, Witness(), rows, verifier=VERIFIERS[verifier], draft_len=3)[row][
                :end
            ]
            == healthy[row]
        )


def test_single_entries_of_minus_infinity_are_a_distribution() -> None:
    masked = Sick(TARGET, lambda logits: logits.index_fill(-1, torch.tensor([1, 3]), -torch.inf), 0)
    (text, *_) = tiny.decoded(masked, Witness(), batch(), draft_len=3)
    assert len(text) == 31 and not {1, 3} & set(text[1:])


def test_a_model_that_breaks_after_ten_passes() -> None:
    net = tiny.model("llama")
    target = tiny.CausalTarget(net)
    passes = 0

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > 10:
            output.logits = output.logits.index_fill(-1, torch.tensor([5]), torch.nan)
        return output

    hook = net.register_forward_hook(spoil)
    run = decode.start(
        target, tiny.Hinted([[0] * 99], tiny.VOCAB), tiny.batch_of([[1, 2, 3]], 60, temperature=0)
    )
    decode.admit(run, torch.arange(1))
    with pytest.raises(TargetError, match="row 0: the target's logits at position") as caught:
        while not bool(run.batch.done.all()):
            decode.raise_if_failed(decode.step(run, 3))
    hook.remove()
    assert f"position {int(run.batch.length[0])}" in str(caught.value)


def test_a_released_row_is_done_and_emits_nothing() -> None:
    """Also where it had more to say."""
    run = decode.start(TARGET, Witness(), batch(), slots=64)
    decode.admit(run, torch.arange(4))
    decode.step(run, 3)
    decode.release(run, torch.tensor([1, 3]))
    assert run.batch.done.tolist() == [False, True, False, True]
    length = run.batch.length.clone()
    after = decode.step(run, 3)
    assert after.emitted[[1, 3]].tolist() == [0, 0] and after.emitted[[0, 2]].min() > 0
    assert torch.equal(run.batch.length[[1, 3]], length[[1, 3]])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_position_of_a_model_is_its_own(family: str) -> None:
    """Scored in one pass up to the very last position, logits are those of a plain pass."""
    net = tiny.model(family, positions=24)
    ids = torch.randint(tiny.VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    plain = tiny.copy_of(net)(ids).logits
    target = tiny.CausalTarget(net)
    rows = Batch.of([ids[0, :20].tolist()], [SamplingParams(max_tokens=4)], [0], slots=30)
    run = decode.start(target, NoDrafter(), rows, slots=30)
    decode.admit(run, torch.arange(1))
    with torch.inference_mode():
        logits = target.score(run.cache, run.batch, Draft(ids[:, 20:])).logits
    torch.testing.assert_close(logits, plain[:, 19:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_draft_tokens_beyond_the_last_slot_touch_no_token_of_the_text(family: str) -> None:
    net = tiny.model(family)
    ids = torch.randint(tiny.VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    plain = tiny.copy_of(net)(ids).logits
    target = tiny.CausalTarget(net)
    run = decode.start(target, NoDrafter(), tiny.batch_of(ids.tolist(), 1), slots=25)
    decode.admit(run, torch.arange(1))
    with torch.inference_mode():
        logits = target.score(run.cache, run.batch, Draft(torch.arange(6)[None])).logits
    torch.testing.assert_close(logits[:, 0], plain[:, -1], rtol=0, atol=1e-4)
