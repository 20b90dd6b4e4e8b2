"""L2: texts of the real loop have the target's law, whatever drafts, verifies or filters.

Planted bugs are found.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from samples import (
    DENOISER,
    DRAFTERS,
    PAIRS,
    TARGET,
    compare,
    conversations,
    conversations_law,
    fit,
    last,
    law,
    texts,
    written,
)

from doubles import (
    AnyOrder,
    DropsUnlikely,
    Forgetful,
    LengthFromThePast,
    Misreported,
    StaleTarget,
    StoresProbabilities,
    Through,
    ToyScorer,
    early_bonus,
    every_round_alike,
    no_residual,
    one_stream,
    one_uniform,
    swapped,
    verifier_of,
)
from specdiff import decode, engine, prefix_cache, sampling, verify
from specdiff.diffusion.process import Absorbing
from specdiff.diffusion.schedule import Loglinear
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.types import Batch, SamplingParams
from specdiff.verify import VERIFIERS

SETTINGS = {
    "T=1": SamplingParams(max_tokens=4),
    "T=0.7": SamplingParams(max_tokens=3, temperature=0.7),
    "top_k=2": SamplingParams(max_tokens=3, top_k=2),
    "top_p=0.7": SamplingParams(max_tokens=3, top_p=0.7),
    "min_p=0.2": SamplingParams(max_tokens=3, min_p=0.2),
    "repetition": SamplingParams(max_tokens=4, repetition_penalty=2.5),
    "counts": SamplingParams(max_tokens=4, presence_penalty=0.5, frequency_penalty=1.5),
    "all": SamplingParams(
        max_tokens=4,
        temperature=0.8,
        repetition_penalty=0.7,
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        logit_bias=((0, 1.5), (2, -0.5)),
    ),
    "allowed": SamplingParams(max_tokens=4, allowed_token_ids=(0, 2)),
}
PLAIN = SETTINGS["T=1"]
STOPPING = SamplingParams(max_tokens=5, stop_token_ids=(2,))
# G-tests in this file that a correct program has to pass
TESTS = len(PAIRS) * (len(SETTINGS) + 4) + 30
PASSES = 1e-3 / TESTS
CAUGHT = 1e-6
FEW = 40_000  # texts that give most bugs away
pairs = pytest.mark.parametrize(("drafter", "verifier"), PAIRS)


def test_the_law_is_the_targets_own_and_the_filters_bite() -> None:
    assert law(PLAIN) == pytest.approx(TARGET.law([1], 4), abs=1e-15)
    plain = law(SamplingParams(max_tokens=3))
    for name, params in SETTINGS.items():
        assert sum(law(params).values()) == pytest.approx(1, abs=1e-12)
        if name != "T=1":
            assert sum(abs(law(params).get(text, 0) - p) for text, p in plain.items()) > 0.05, (
                f"{name} changes nothing here"
            )


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_a_length_that_follows_the_last_rounds_acceptance_is_exact(verifier: str) -> None:
    drafter = LengthFromThePast(DRAFTERS["left-to-right"])
    assert fit(TARGET, drafter, VERIFIERS[verifier], PLAIN) > PASSES


@pytest.mark.parametrize("setting", SETTINGS)
@pairs
def test_texts_have_the_targets_law(drafter: str, verifier: str, setting: str) -> None:
    assert (
        fit(
            TARGET,
            DRAFTERS[drafter],
            VERIFIERS[verifier],
            SETTINGS[setting],
            _enough(drafter, verifier),
        )
        > PASSES
    )


def _enough(drafter: str, verifier: str) -> int:
    """Several passes in float64 cost more, and matching reads no probabilities.

    What is wrong there shows in FEW texts (below).
    """
    slow = drafter.startswith(("any", "auto", "hot"))
    return FEW if slow or verifier.startswith("match") else 100_000


@pairs
def test_greedy_texts_are_the_argmax_path(drafter: str, verifier: str) -> None:
    params = SamplingParams(max_tokens=12, temperature=0)
    (path,) = law(params)
    sample = texts(TARGET, DRAFTERS[drafter], VERIFIERS[verifier], params, count=2000, rows=2000)
    assert sample.tolist() == [list(path)] * 2000


@pairs
def test_texts_end_where_the_law_says(drafter: str, verifier: str) -> None:
    """At the first stop id or at max_tokens, both often inside what a round had accepted."""
    sample = texts(
        TARGET,
        DRAFTERS[drafter],
        VERIFIERS[verifier],
        STOPPING,
        count=min(60_000, _enough(drafter, verifier)),
    )
    assert compare(sample, law(STOPPING)) > PASSES
    assert {int(n) for n in (sample >= 0).sum(1).unique()} == {1, 2, 3, 4, 5}


@pairs
def test_decode_after_a_longer_prompt(drafter: str, verifier: str) -> None:
    prompt = [2, 0, 1]
    params = SamplingParams(max_tokens=3)
    batch = Batch.of([prompt] * 2000, [params] * 2000, range(2000))
    sample = written(
        last(decode.decode(TARGET, DRAFTERS[drafter], batch, verifier=VERIFIERS[verifier]))
    )
    assert compare(sample, law(params, tuple(prompt))) > PASSES


@pairs
def test_the_engine_with_rows_that_come_and_go(drafter: str, verifier: str) -> None:
    """1500 requests over 256 rows: a text's law does not depend on who sat in its row before."""
    requests = [engine.Request([1], STOPPING, seed) for seed in range(1500)]
    drafter_ = DRAFTERS[drafter]
    sample = defaultdict(list)
    for progress in engine.run(
        TARGET,
        drafter_,
        requests,
        verifier=VERIFIERS[verifier],
        draft_len=drafter_.draft_len,
        rows=256,
    ):
        sample[progress.request] += progress.tokens
    assert compare(list(sample.values()), law(STOPPING)) > PASSES


@pairs
def test_conversations_that_find_their_beginning_in_a_row(drafter: str, verifier: str) -> None:
    """Second answers reuse the row of the first; this target's law depends on every slot."""
    target = StaleTarget(TARGET.table, sums=True)
    sample, reused = conversations(target, DRAFTERS[drafter], VERIFIERS[verifier], 2000)
    assert compare(sample, conversations_law()) > PASSES
    assert reused > 2000


@pytest.mark.parametrize("verifier", ["token", "block", "match"])
@pytest.mark.parametrize("draft_temperature", [0.0, 0.5, 2.5])
def test_the_draft_temperature_moves_no_text(verifier: str, draft_temperature: float) -> None:
    drafter = DenoisingDrafter(DENOISER, steps=2, draft_temperature=draft_temperature)
    assert fit(TARGET, drafter, VERIFIERS[verifier], PLAIN) > PASSES


# ---- L2b: each bug, and its exact twin in the very same place ----

ONE_SHOT = DRAFTERS["one-shot"]
PER_TOKEN = DenoisingDrafter(DENOISER, steps=3)
PLANS = {"token": verify.token_plan, "block": verify.block_plan}
ratio_tests = pytest.mark.parametrize("verifier", ["token", "block"])


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("bug", [swapped, no_residual, early_bonus])
def test_a_wrong_plan_is_caught(bug: Callable[..., Any], name: str) -> None:
    plan = PLANS[name]
    longest = name == "block"
    assert fit(TARGET, ONE_SHOT, _twin(name), PLAIN) > PASSES
    assert fit(TARGET, ONE_SHOT, verifier_of(bug(plan), longest), PLAIN, FEW) < CAUGHT


@cache
def _twin(name: str) -> verify.Verifier:
    return verifier_of(PLANS[name], longest=name == "block")


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize(
    "fault", [{"keeps": True}, {"shift": 1}], ids=["not overwritten", "one slot off"]
)
def test_a_stale_cache_slot_is_caught(fault: dict[str, Any], verifier: str) -> None:
    assert (
        fit(StaleTarget(TARGET.table, **fault), ONE_SHOT, VERIFIERS[verifier], PLAIN, FEW) < CAUGHT
    )


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_target_that_takes_over_too_much_is_caught(verifier: str) -> None:
    sample, _ = conversations(
        StaleTarget(TARGET.table, sums=True, beyond=1), ONE_SHOT, VERIFIERS[verifier], 4000
    )
    assert compare(sample, conversations_law()) < CAUGHT


def test_an_engine_that_takes_an_anchor_for_read_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: all committed tokens count as held, but the last of them was never scored.

    A rejected draft's entry may be there.
    """

    def seats(held: Any, prompts: Any) -> list[tuple[int, int]]:
        return [
            (row, min(length + (length > 0), len(p) - 1))
            for (row, length), p in zip(prefix_cache.seats(held, prompts), prompts, strict=True)
        ]

    monkeypatch.setattr("specdiff.rows.seats", seats)
    sample, _ = conversations(StaleTarget(TARGET.table, sums=True), ONE_SHOT, verify.token, 4000)
    assert compare(sample, conversations_law()) < CAUGHT
    monkeypatch.undo()
    sample, _ = conversations(StaleTarget(TARGET.table, sums=True), ONE_SHOT, verify.token, 4000)
    assert compare(sample, conversations_law()) > PASSES


def test_a_cache_without_stale_slots_passes() -> None:
    assert fit(StaleTarget(TARGET.table), ONE_SHOT, verify.token, PLAIN) > PASSES


@ratio_tests
def test_naive_any_order_is_caught(verifier: str) -> None:
    assert fit(TARGET, AnyOrder(DENOISER), VERIFIERS[verifier], PLAIN, FEW) < CAUGHT


@ratio_tests
def test_any_order_with_stored_probabilities_is_caught(verifier: str) -> None:
    """SEDD's own sampler and the paper's "the logits are stored": biased.

    The same draws as point masses are not.
    """
    lawful = AnyOrderDrafter(
        ToyScorer(Absorbing(TARGET.info.vocab_size), Loglinear(), seed=7, coupling=2), steps=5
    )
    assert fit(TARGET, lawful, VERIFIERS[verifier], PLAIN, FEW) > PASSES
    assert fit(TARGET, StoresProbabilities(lawful), VERIFIERS[verifier], PLAIN, FEW) < CAUGHT


@pytest.mark.parametrize("verifier", ["match", "match-gumbel"])
def test_matching_forgives_any_order(verifier: str) -> None:
    assert fit(TARGET, AnyOrder(DENOISER), VERIFIERS[verifier], PLAIN) > PASSES


def test_draws_reused_across_rounds_are_caught() -> None:
    assert fit(TARGET, ONE_SHOT, verify.block, PLAIN) > PASSES
    assert fit(TARGET, Through(ONE_SHOT, every_round_alike), verify.block, PLAIN) < CAUGHT


@ratio_tests
def test_one_uniform_for_all_diffusion_steps_is_caught(verifier: str) -> None:
    assert fit(TARGET, PER_TOKEN, VERIFIERS[verifier], PLAIN) > PASSES
    assert fit(TARGET, Through(PER_TOKEN, one_uniform), VERIFIERS[verifier], PLAIN, FEW) < CAUGHT


@ratio_tests
def test_a_stream_shared_by_draft_and_verifier_is_caught(verifier: str) -> None:
    assert fit(TARGET, ONE_SHOT, VERIFIERS[verifier], PLAIN) > PASSES
    assert fit(TARGET, Through(ONE_SHOT, one_stream), VERIFIERS[verifier], PLAIN, FEW) < CAUGHT


@ratio_tests
def test_a_length_that_looks_at_the_token_it_drops_is_caught(verifier: str) -> None:
    assert fit(TARGET, DropsUnlikely(ONE_SHOT, floor=0), VERIFIERS[verifier], PLAIN) > PASSES
    assert fit(TARGET, DropsUnlikely(ONE_SHOT, floor=0.4), VERIFIERS[verifier], PLAIN, FEW) < CAUGHT


@ratio_tests
def test_probabilities_that_were_not_drawn_from_are_caught(verifier: str) -> None:
    assert (
        fit(TARGET, Misreported(DENOISER, draft_temperature=1), VERIFIERS[verifier], PLAIN) > PASSES
    )
    assert (
        fit(TARGET, Misreported(DENOISER, draft_temperature=0.7), VERIFIERS[verifier], PLAIN, FEW)
        < CAUGHT
    )


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("setting", ["repetition", "counts"])
def test_a_penalty_that_ignores_the_draft_is_caught(
    monkeypatch: pytest.MonkeyPatch, setting: str, verifier: str
) -> None:
    """Planted: every scored position counts committed tokens only.

    `match` alone cannot repair it either: its p is wrong.
    """
    monkeypatch.setattr(
        decode,
        "distribution",
        lambda logits, batch, draft: sampling.distribution(logits, batch, draft.tokens[:, :0]),
    )
    sample = texts(TARGET, ONE_SHOT, VERIFIERS[verifier], SETTINGS[setting], count=FEW)
    assert compare(sample, law(SETTINGS[setting])) < CAUGHT


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_penalty_that_counts_the_whole_draft_everywhere_is_caught(
    monkeypatch: pytest.MonkeyPatch, verifier: str
) -> None:
    monkeypatch.setattr(
        decode,
        "distribution",
        lambda logits, batch, draft: sampling.distribution(logits, batch, draft.tokens),
    )
    sample = texts(TARGET, ONE_SHOT, VERIFIERS[verifier], SETTINGS["counts"], count=FEW)
    assert compare(sample, law(SETTINGS["counts"])) < CAUGHT


@ratio_tests
def test_a_draft_law_without_the_penalty_it_was_drawn_under_is_caught(verifier: str) -> None:
    assert fit(TARGET, Forgetful(DENOISER), VERIFIERS[verifier], SETTINGS["counts"], FEW) < CAUGHT


def test_the_comparison_itself() -> None:
    """A sample that fits passes.

    One with 2 % too many of a text, or with a text that cannot occur, does not.
    """
    expected = law(PLAIN)
    sample = []
    for text, p in expected.items():
        sample += [text] * round(100_000 * p)
    assert compare(sample, expected) > 0.9
    assert compare([*sample, *[max(expected, key=expected.__getitem__)] * 2000], expected) < CAUGHT
    assert compare([*sample, (0, 0, 0, 0, 0)], expected) == 0
