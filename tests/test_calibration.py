"""Costs that are timed before the first request."""

from itertools import count
from typing import Any

import tiny
from specdiff.calibration import calibrate
from specdiff.controller import Controller, profile_of
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.noise import Noise
from specdiff.profile import SURE
from specdiff.text.load import load
from specdiff.types import Context, Draft

TARGET = tiny.target("llama")
DRAFTER = tiny.drafter(TARGET.info, steps=1)


def test_every_part_of_a_round_is_timed() -> None:
    profile = profile_of(DRAFTER)
    calibrate(TARGET, DRAFTER, profile, seconds=60)
    costs = profile.costs[1]
    assert set(costs.score.latest) == {1, 2, 4, 5, 9}
    assert set(costs.draft.latest) == {1, 3, 4, 8}
    assert costs.sure and len(costs.score.latest[1]) == SURE
    assert profile.acceptance == {} and profile.seconds == 0


def test_the_first_round_knows_what_drafts_cost() -> None:
    profile = profile_of(DRAFTER)
    calibrate(TARGET, DRAFTER, profile, seconds=60)
    controller = Controller(profile)
    lengths = controller(None).lengths
    rates = controller.rates(hope=True)
    assert rates[lengths] == max(rates.values())


def test_each_branch_of_a_cascade_is_timed() -> None:
    drafter = CascadeDrafter(TARGET.info, DRAFTER, memory=100)
    profile = profile_of(drafter)
    calibrate(TARGET, drafter, profile, seconds=60)
    assert set(profile.costs[1].draft.latest) == {0, 1, 3, 4, 8}
    assert drafter.lookup.memory is not None and not drafter.lookup.memory.texts


def test_a_slow_target_teaches_nothing() -> None:
    clock = count()
    profile = profile_of(DRAFTER)
    calibrate(TARGET, DRAFTER, profile, seconds=0.3, clock=lambda: float(next(clock)))
    assert profile.costs == {}


class Faulty(Drafter[None]):
    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        raise ValueError("broken")


def test_a_faulty_drafter_is_left_to_the_requests(recwarn: Any) -> None:
    profile = profile_of(Faulty())
    calibrate(TARGET, Faulty(), profile, seconds=60)
    assert profile.costs[1].draft.latest == {} and not recwarn.list


def test_what_requests_measured_stays() -> None:
    profile = profile_of(DRAFTER)
    calibrate(TARGET, DRAFTER, profile, seconds=60)
    costs = profile.costs[1]
    calibrate(TARGET, DRAFTER, profile, seconds=60)
    assert profile.costs[1] is costs


def test_plain_decoding_is_not_timed() -> None:
    profile = profile_of(NoDrafter())
    calibrate(TARGET, NoDrafter(), profile)
    assert profile.costs == {}
    lookup = NGramDrafter(TARGET.info)
    profile = profile_of(lookup)
    calibrate(TARGET, lookup, profile, seconds=60)
    assert 1 in profile.costs[1].score.latest


def test_loading_calibrates_unless_told_not_to(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    tiny.model("llama").save_pretrained(folder)
    assert load(folder, "ngram", calibrate=False).profile.costs == {}
    assert load(folder, "ngram").profile.costs
