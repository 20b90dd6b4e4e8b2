"""A drafter that fails while decoding costs speed, never the text: plain rounds, and one warning.

Shapes: B rows, K drafted tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from doubles import ToyDenoiser
from specdiff import SpeculativeLM, decode, engine, stats
from specdiff.check.goodness_of_fit import compare, law, texts
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.guarded import GuardedDrafter
from specdiff.engine import Request
from specdiff.errors import UsageError
from specdiff.noise import Noise
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, SamplingParams
from specdiff.verify import VERIFIERS

torch.set_num_threads(1)  # thousands of small operations: a second thread costs more than it brings

V = 3
TARGET = TableTarget.random(V, seed=4)
SOUND = DenoisingDrafter(ToyDenoiser(V, seed=5), steps=2)
PARAMS = SamplingParams(max_tokens=4)
Spoil = Callable[[Draft, torch.Tensor, torch.Tensor], Draft]


class Spoiled(Drafter[None]):
    """SOUND, whose draft is spoiled in some rows and rounds, from some position on.

    A hash of seed and round decides.
    """

    draft_len = 3

    def __init__(self, spoil: Spoil, every: int = 2) -> None:
        self.spoil, self.every = spoil, every

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        mixed = (context.batch.seed * 0x9E3779B1 + context.batch.round * 0x85EBCA77) >> 7
        hit, at = mixed % self.every == 0, mixed // self.every % draft_len
        return self.spoil(SOUND.propose(context, None, noise, draft_len), hit, at)


def probs_become(value: float) -> Spoil:
    def spoil(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
        assert draft.probs is not None
        here = (torch.arange(draft.tokens.shape[1]) == at[:, None]) & hit[:, None]
        return replace(
            draft, probs=torch.where(here[..., None] & (torch.arange(V) == 1), value, draft.probs)
        )

    return spoil


def tokens_become(value: int) -> Spoil:
    """Of point masses: the ratio test of soft drafts would look the token's probability up."""

    def spoil(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
        here = (torch.arange(draft.tokens.shape[1]) == at[:, None]) & hit[:, None]
        return Draft(torch.where(here, value, draft.tokens))

    return spoil


def wrong_size(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
    return replace(draft, size=torch.where(hit, 99 * (2 * at - 1), 3))


def raises(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
    if bool(hit.any()):
        raise RuntimeError("the drafter's own trouble")
    return draft


FAULTS: dict[str, tuple[Spoil, str]] = {
    "nan": (probs_become(torch.nan), "no distribution"),
    "infinite": (probs_become(torch.inf), "no distribution"),
    "negative": (probs_become(-0.5), "no distribution"),
    "unnormalised": (probs_become(0.9999), "no distribution"),
    "beyond the vocabulary": (tokens_become(V), "outside the target's vocabulary"),
    "below the vocabulary": (tokens_become(-100), "outside the target's vocabulary"),
    "size": (wrong_size, "draft size"),
    "raises": (raises, "raised RuntimeError: the drafter's own trouble"),
    "tokens' shape": (
        lambda d, hit, at: replace(d, tokens=d.tokens[:, :, None]),
        "tokens of shape",
    ),
    "too long": (lambda d, hit, at: Draft(torch.cat([d.tokens, d.tokens], 1)), "tokens of shape"),
    "tokens' type": (lambda d, hit, at: replace(d, tokens=d.tokens.double()), "tokens of type"),
    "probabilities' shape": (
        lambda d, hit, at: replace(d, probs=torch.ones(1, 1)),
        "probabilities of shape",
    ),
    "another device": (
        lambda d, hit, at: replace(d, probs=d.probs.to("meta")),
        "probabilities on meta; the batch is on cpu",
    ),  # type: ignore[union-attr]
    "tokens elsewhere": (lambda d, hit, at: Draft(d.tokens.to("meta")), "tokens on meta"),
    "size elsewhere": (
        lambda d, hit, at: replace(d, size=torch.ones(len(hit), dtype=torch.long, device="meta")),
        "a size on meta",
    ),
    "float8": (
        lambda d, hit, at: replace(d, probs=d.probs.to(torch.float8_e5m2)),
        "type torch.float8_e5m2",
    ),  # type: ignore[union-attr]
    "sparse": (
        lambda d, hit, at: replace(d, probs=d.probs.to_sparse()),
        "probabilities of layout torch.sparse_coo",
    ),  # type: ignore[union-attr]
    "sparse tokens": (
        lambda d, hit, at: Draft(d.tokens.to_sparse()),
        "tokens of layout torch.sparse_coo",
    ),
    "size of bits": (
        lambda d, hit, at: replace(d, size=hit),
        "a size of shape .* and type torch.bool",
    ),
    "tokens are a list": (lambda d, hit, at: Draft(d.tokens.tolist()), "raised AttributeError"),
    "tree": (
        lambda d, hit, at: replace(d, parents=torch.zeros_like(d.tokens) - 1),
        "drafted a tree",
    ),
    "nothing": (lambda d, hit, at: None, "returned a NoneType"),  # type: ignore[arg-type]
}


def requests(count: int = 5) -> list[Request]:
    return [Request([i % V, 1], SamplingParams(max_tokens=14), 100 + i) for i in range(count)]


def served(
    drafter: Drafter[Any], queue: Sequence[Request], verifier: str = "match", rows: int = 2
) -> dict[int, list[int]]:
    results: dict[int, list[int]] = {}
    for turn in engine.serve(
        TARGET, drafter, queue, verifier=VERIFIERS[verifier], draft_len=drafter.draft_len, rows=rows
    ):
        results |= {i: ids.tolist() for i, ids, _ in turn.finished()}
    return results


@pytest.mark.parametrize("fault", FAULTS)
def test_the_text_goes_on_and_one_warning_names_drafter_and_fault(fault: str) -> None:
    spoil, message = FAULTS[fault]
    with pytest.warns(RuntimeWarning, match=f"drafter Spoiled .*{message}") as caught:
        results = served(Spoiled(spoil), requests())
    assert len(caught) == 1
    assert results == served(NoDrafter(), requests())


@pytest.mark.filterwarnings("ignore:the drafter Spoiled")
@pytest.mark.parametrize("verifier", ["token", "block", "match"])
@pytest.mark.parametrize("fault", ["nan", "negative", "beyond the vocabulary", "size"])
def test_the_law_is_the_targets_though_rounds_fail_at_random(fault: str, verifier: str) -> None:
    results = texts(
        TARGET, Spoiled(FAULTS[fault][0], every=3), VERIFIERS[verifier], PARAMS, count=20_000
    )
    assert compare(results, law(TARGET, PARAMS)) > 1e-5


@pytest.mark.filterwarnings("ignore:the drafter Spoiled")
@pytest.mark.parametrize("verifier", ["token", "block"])
def test_the_law_is_the_targets_though_it_raises(verifier: str) -> None:
    """In small batches, or it would raise in the first round of all."""
    results = texts(
        TARGET, Spoiled(raises, every=40), VERIFIERS[verifier], PARAMS, count=3000, rows=30
    )
    assert compare(results, law(TARGET, PARAMS)) > 1e-5


def test_falling_back_by_what_was_drawn_would_show() -> None:
    """The law tests above can fail: here a whole draft is dropped because of a late token."""

    def by_token(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
        return replace(draft, size=torch.where((draft.tokens == 2).any(1), 0, 3))

    results = texts(TARGET, Spoiled(by_token), VERIFIERS["token"], PARAMS, count=40_000)
    assert compare(results, law(TARGET, PARAMS)) < 1e-6


def test_a_sound_drafter_does_not_feel_it() -> None:
    batch = Batch.of([[1, 2]] * 50, [SamplingParams(max_tokens=9)] * 50, range(50))
    context, noise = Context(batch, None, torch.zeros_like(batch.length), None), Noise.of(batch)
    guard = GuardedDrafter(SOUND, V)
    state = guard.open(50, 20)
    one, two = guard.propose(context, state, noise, 3), SOUND.propose(context, None, noise, 3)
    assert one.probs is not None and two.probs is not None and one.size is not None
    assert (
        torch.equal(one.tokens, two.tokens)
        and torch.equal(one.probs, two.probs)
        and one.size.tolist() == [3] * 50
    )


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_how_a_sound_draft_lies_in_memory_does_not_matter(verifier: str) -> None:
    """With gradients, strided, expanded, in half precision's place: no fault, and the same text."""

    def strided(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
        assert draft.probs is not None
        probs = draft.probs.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
        return Draft(
            draft.tokens.T.contiguous().T,
            probs,
            torch.tensor(3, dtype=torch.int32).expand(len(hit)),
        )

    assert served(Spoiled(strided), requests(), verifier) == served(SOUND, requests(), verifier)


@pytest.mark.filterwarnings("ignore:the drafter Spoiled drafted a tree")
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_tree_is_refused_and_the_law_is_the_targets(verifier: str) -> None:
    """A chain's tokens that claim to be siblings: a penalty would count the wrong tokens."""
    params = SamplingParams(max_tokens=4, repetition_penalty=2.5)
    forest = Spoiled(lambda d, hit, at: replace(d, parents=torch.full_like(d.tokens, -1)))
    results = texts(TARGET, forest, VERIFIERS[verifier], params, count=20_000)
    assert torch.equal(
        results, texts(TARGET, NoDrafter(), VERIFIERS[verifier], params, count=20_000)
    )


@pytest.mark.filterwarnings("ignore:the drafter Spoiled")
def test_the_tokens_before_the_fault_stay_and_then_the_row_is_disabled() -> None:
    batch = Batch.of([[1]] * 3, [SamplingParams(max_tokens=9)] * 3, range(3))
    rounds = list(
        decode.decode(
            TARGET,
            Spoiled(
                lambda d, h, a: probs_become(torch.nan)(d, torch.tensor([1, 0, 0]) > 0, a * 0 + 2)
            ),
            batch,
        )
    )
    sizes = [r.draft.size.tolist() for r in rounds if r.draft.size is not None]
    assert (
        sizes[0] == [2, 3, 3] and {s[0] for s in sizes[1:]} == {0} and {s[1] for s in sizes} == {3}
    )
    counted = stats.fold(rounds)
    assert counted[0].plain_rounds == counted[0].rounds - 1 and counted[1].plain_rounds == 0
    assert [c.faults for c in counted] == [c.as_dict()["faults"] for c in counted] == [1, 0, 0]


def faults_of(drafter: Drafter[Any], count: int = 5, rows: int = 2) -> list[int]:
    """What the answers' own stats say."""
    lm = SpeculativeLM(TARGET, drafter, None, 64)
    prompts = [[i % V, 1] for i in range(count)]
    return [g.stats.faults for g in lm.generate(prompts, max_tokens=14, rows=rows, seed=0)]


@pytest.mark.filterwarnings("ignore:the drafter Spoiled")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_stats_of_an_answer_say_that_the_drafter_broke(fault: str) -> None:
    """Once a request: drafting is disabled until the next one."""
    assert faults_of(Spoiled(FAULTS[fault][0], every=1)) == [1] * 5
    assert faults_of(SOUND) == [0] * 5


@pytest.mark.filterwarnings("ignore:the drafter Spoiled")
def test_only_the_rows_that_broke_are_counted() -> None:
    results = faults_of(Spoiled(FAULTS["nan"][0], every=8), count=12)
    assert 0 < sum(results) < 12
    assert results == faults_of(Spoiled(FAULTS["nan"][0], every=8), count=12, rows=12)


def test_once_every_row_is_disabled_nothing_is_drafted_until_a_request_joins() -> None:
    calls = []

    def failing(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
        calls.append(len(hit))
        raise ValueError("no")

    with pytest.warns(RuntimeWarning, match="raised ValueError: no"):
        served(Spoiled(failing), requests(3), rows=1)
    assert calls == [1, 1, 1]  # once a request


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UsageError])
def test_what_is_no_fault_passes(error: type[BaseException]) -> None:
    def stop(draft: Draft, hit: torch.Tensor, at: torch.Tensor) -> Draft:
        raise error("stop")

    with pytest.raises(error):
        served(Spoiled(stop), requests(1))


def test_the_targets_own_trouble_is_not_swallowed() -> None:
    class Full(TableTarget):
        def score(self, *arguments: Any) -> Any:
            raise torch.OutOfMemoryError("the device is full")

    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        warnings.simplefilter("error")
        list(decode.decode(Full(TARGET.table), SOUND, Batch.of([[1]], [PARAMS], [0])))


@pytest.mark.parametrize("role", ["admit", "release"])
def test_trouble_as_requests_come_and_go(role: str) -> None:
    class Clumsy(Spoiled):
        def admit(self, *arguments: Any) -> None:
            if role == "admit":
                raise IndexError("lost a row")

        def release(self, *arguments: Any) -> None:
            if role == "release":
                raise IndexError("lost a row")

    with pytest.warns(
        RuntimeWarning,
        match=r"drafter Clumsy raised IndexError as requests (joined|left): lost a row",
    ) as caught:
        results = served(Clumsy(lambda d, h, a: d), requests())
    assert len(caught) == 1 and results == served(NoDrafter(), requests())
    with pytest.warns(
        RuntimeWarning, match="drafter Clumsy"
    ):  # a request that has its answer counts no fault
        assert faults_of(Clumsy(lambda d, h, a: d)) == [int(role == "admit")] * 5
