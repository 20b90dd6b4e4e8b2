"""The draft length, driven by synthetic rounds with given seconds and emitted tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import pytest
import torch

from specdiff import decode
from specdiff.controller import FIRST, Controller, Observation
from specdiff.drafters.base import NoDrafter
from specdiff.profile import LENGTHS, SURE, Costs, Profile
from specdiff.stopwatch import DeviceStopwatch, Stopwatch, stopwatch
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Draft, DraftPlan, Round, Verification
from tiny import batch_of

DRAFT = 8


def controller_of(draft_len: int, costs: Mapping[int, float] | None = None) -> Controller:
    """A controller with a profile of its own, of these seconds by draft length."""
    profile = Profile(draft_len)
    if costs:
        measure(profile, costs)
    return Controller(profile)


def measure(profile: Profile, costs: Mapping[int, float], rows: int = 1) -> None:
    """Rounds of these seconds by draft length, a quarter of which is drafting."""
    known = profile.costs.setdefault(rows, Costs())
    for length, seconds in costs.items():
        known.score.observe(length + 1, 0.75 * seconds if length else seconds, times=SURE)
        if length:
            known.draft.observe(length, 0.25 * seconds, times=SURE)


@cache
def rows_of(rows: int) -> Batch:
    return batch_of([[1]] * rows)


def round_of(draft_len: int, emitted: int, seconds: float, rows: int = 1) -> Round:
    batch = rows_of(rows)
    tokens = torch.zeros(rows, draft_len + 1, dtype=torch.long)
    count = torch.full((rows,), emitted)
    path = torch.arange(draft_len + 1).expand(rows, -1)
    verification = Verification((count - 1).clamp(min=0), tokens, path)
    shares = {"draft": seconds / 4, "score": 3 * seconds / 4}
    return Round(
        Draft(tokens[:, :draft_len]),
        verification,
        count,
        batch,
        shares,
        torch.zeros(rows, dtype=torch.bool),
        torch.full((rows,), -1),
    )


def driven(
    controller: Controller, rounds: int, emits: Callable[[int], int], cost: float = 2.0
) -> list[int]:
    """The draft lengths of a run.

    A plain round takes a second, a drafting one `cost` and emits up to `emits(i)` tokens.
    """
    last = None
    lengths = []
    for i in range(rounds):
        n = controller(last).longest
        lengths.append(n)
        last = round_of(n, min(emits(i), n + 1), cost if n else 1.0)
    return lengths


def share(lengths: list[int]) -> float:
    return sum(c > 0 for c in lengths) / len(lengths)


def test_it_starts_with_a_short_draft_and_a_plain_round() -> None:
    lengths = driven(controller_of(DRAFT), 40, lambda i: 9)
    assert lengths[:2] == [FIRST, 0] and max(lengths[2:5]) > FIRST
    assert DRAFT in lengths[:12]
    assert set(lengths) <= {0, *LENGTHS}


def test_it_stays_on_where_it_pays() -> None:
    controller = controller_of(DRAFT)
    lengths = driven(controller, 1000, lambda i: 5)
    assert share(lengths[20:]) > 0.95
    rates = controller.rates()
    assert rates[DRAFT,] > rates[0,]


def test_it_turns_off_where_it_does_not_and_probes_ever_more_seldom() -> None:
    lengths = driven(controller_of(DRAFT), 3000, lambda i: 1)
    assert share(lengths[:100]) < 0.15
    assert share(lengths) < 0.02
    assert share(lengths[2000:]) > 0  # probing never ends


def test_it_comes_back_when_drafts_get_better() -> None:
    controller = controller_of(DRAFT)
    driven(controller, 300, lambda i: 1)
    lengths = driven(controller, 700, lambda i: 6)
    assert share(lengths[-300:]) > 0.95


def test_costs_decide() -> None:
    """2 tokens a round pay where a drafting round costs 1.5 plain ones, not where it costs 3."""
    assert share(driven(controller_of(DRAFT), 400, lambda i: 2, cost=1.5)) > 0.9
    assert share(driven(controller_of(DRAFT), 400, lambda i: 2, cost=3.0)) < 0.1


def test_the_shortest_draft_of_the_most_tokens_a_second() -> None:
    """Each drafted token costs 0.3 plain rounds, and the third is never accepted."""
    costs = {n: 1 + 0.3 * n for n in (0, 1, 2, 3, 4, 6, 8)}
    controller = controller_of(DRAFT, costs)
    last = None
    lengths = []
    for _ in range(200):
        n = controller(last).longest
        lengths.append(n)
        last = round_of(n, min(3, n + 1), costs[n])
    assert lengths[50:].count(2) > 130


def test_rounds_in_which_nothing_ran_count_for_nothing() -> None:
    controller = controller_of(DRAFT)
    before = controller(None)
    for _ in range(50):
        assert controller(round_of(DRAFT, 0, 100.0)) == before
    assert controller.profile.seconds == 0 and not controller.profile.costs


def test_done_rows_do_not_lower_acceptance() -> None:
    controller = controller_of(FIRST)
    controller(None)
    mixed = round_of(FIRST, 5, 2.0, rows=2)
    mixed.emitted[1] = 0
    mixed.verification.accepted[1] = 0
    controller(mixed)
    (own,) = controller.own
    assert own.accepted == own.reached == [1] * FIRST


def test_rows_with_a_limit_of_their_own_are_no_rejections() -> None:
    """Two rows accept all that they drafted: 4 tokens, and 1, which is the row's limit."""
    controller = controller_of(FIRST)
    controller(None)
    mixed = round_of(FIRST, FIRST + 1, 2.0, rows=2)
    draft = replace(mixed.draft, size=torch.tensor([FIRST, 1]))
    accepted = torch.tensor([FIRST, 1])
    verification = replace(mixed.verification, accepted=accepted)
    controller(replace(mixed, draft=draft, verification=verification, emitted=accepted + 1))
    (own,) = controller.own
    assert own.reached == own.accepted == [1, 0.5, 0.5, 0.5]


def test_acceptance_is_that_of_each_branch() -> None:
    """Of two branches, lookup's tokens are accepted and the network's are not."""
    profile = Profile(8, (4, 8))
    costs = profile.costs.setdefault(1, Costs())
    for n in (1, 2, 3, 5, 9):
        costs.score.observe(n, 1 + 0.05 * (n - 1), times=SURE)
    for n in (0, 1, 2, 4):
        costs.draft.observe(n, 0.3 if n else 0.0, times=SURE)
    controller = Controller(profile)
    controller.plan = controller._next()
    for turn in range(200):
        branch = int(turn % 4 == 0 and controller.plan.length(1) > 0)
        size = controller.plan.length(branch)
        seconds = costs.score.at(size + 1)
        draft = costs.draft.at(0 if branch else controller.plan.length(0))
        counts = [(branch, size, size if branch else 0)]
        controller.observe(Observation(1, size, draft, seconds, counts))
        controller.plan = controller._next()
    assert controller.plan.lengths == (0, 8)
    assert profile.shares()[1] == pytest.approx(0.25, abs=0.05)


def test_the_draft_temperature_of_the_most_tokens_is_found() -> None:
    """Greedy drafts are accepted more often here; a greedy request chooses none."""
    profile = Profile(4, (), (1.0, 0.3, 0.0))
    measure(profile, {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4})
    random = Random(1)
    used = []
    for greedy in (False, True):
        controller = Controller(profile, greedy)
        controller.plan = controller._next()
        for _ in range(600):
            rate = {1.0: 0.4, 0.3: 0.55, 0.0: 0.75}[controller.plan.temperature]
            size = controller.plan.longest
            accepted = 0
            while accepted < size and random.random() < rate:
                accepted += 1
            used.append((greedy, controller.plan.temperature))
            seconds = profile.costs[1].score.at(size + 1)
            draft = profile.costs[1].draft.at(size) if size else 0.0
            counts = [(0, size, accepted)]
            controller.observe(Observation(1, size, draft, seconds, counts, greedy))
            controller.plan = controller._next()
    assert used[300:600].count((False, 0.0)) > 240
    assert {t for greedy, t in used[:600]} == {1.0, 0.3, 0.0}
    assert {t for greedy, t in used[600:]} == {1.0}


def test_costs_of_more_rows_are_guessed_from_those_of_one() -> None:
    """Four rows of two positions score what one row of eight does."""
    profile = Profile(8)
    measure(profile, {n: 1 + 0.25 * n for n in (0, 1, 2, 4, 7)})
    guess = profile.costs_of(4)
    assert guess.score.at(2) == pytest.approx(profile.costs[1].score.at(8))
    assert 4 not in profile.costs


def test_another_stream_may_add_costs_meanwhile() -> None:
    class Meanwhile(dict[int, float]):
        def __len__(self) -> int:
            profile.costs[2] = Costs()
            return super().__len__()

    profile = Profile(8)
    measure(profile, {n: 1 + 0.25 * n for n in (0, 1, 2, 4, 7)})
    score = profile.costs[1].score
    score.medians = Meanwhile(score.medians)
    assert profile.costs_of(4).score.at(2) == pytest.approx(score.at(8))


def test_a_draft_that_did_not_come_is_a_plain_round() -> None:
    """The drafter is disabled, or found nothing."""
    controller = controller_of(DRAFT)
    assert controller(None).longest == FIRST
    controller(round_of(0, 1, 1.0))
    assert list(controller.profile.costs[1].score.medians) == [1]
    assert controller.own[0].reached == [0] * DRAFT


# ---- replayed: 256 tokens against the best fixed length of the same costs and acceptance ----

TOKENS = 256
RUNS = 12
MOST = 3.0  # percent of the time of the best fixed length


@dataclass(frozen=True)
class Scenario:
    """Seconds of a round by length, and acceptance by position; both after `done` tokens."""

    cost: Callable[[int, int], float]
    accept: Callable[[int, int], float]
    longest: int = 8


def linear(base: float, each: float) -> Callable[[int, int], float]:
    return lambda n, done: 1 + (base + each * n if n else 0)


STEEP = (1, 1.05, 1.5, 2.0, 2.3, 2.6, 3.0, 3.3, 3.6)
FALLING = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1)
SCENARIOS = {
    "nothing pays": Scenario(linear(0.2, 0.05), lambda k, done: 0.02),
    "nothing pays, a short drafter": Scenario(linear(0.3, 0.02), lambda k, done: 0.05, 4),
    "nothing pays, an expensive drafter": Scenario(linear(1.0, 0.1), lambda k, done: 0.1),
    "about even": Scenario(linear(0.3, 0.05), lambda k, done: 0.3),
    "pays strongly": Scenario(linear(0.1, 0.03), lambda k, done: 0.9),
    "falling acceptance": Scenario(linear(0.1, 0.05), lambda k, done: FALLING[k]),
    "pays a little": Scenario(linear(0.15, 0.02), lambda k, done: 0.55 - 0.05 * k, 4),
    "drafts get better at once": Scenario(
        linear(0.2, 0.05), lambda k, done: 0.05 if done < 128 else 0.8
    ),
    "drafts get worse": Scenario(linear(0.2, 0.05), lambda k, done: 0.8 - 0.7 * done / TOKENS),
    "costs of quantized weights": Scenario(lambda n, done: STEEP[n], lambda k, done: 0.7),
    "costs double": Scenario(
        lambda n, done: 1 + (0.1 + 0.03 * n if n else 0) * (1 if done < 128 else 5),
        lambda k, done: 0.6,
    ),
}
UNMEASURED = [name for name in SCENARIOS if not name.startswith("costs")]


def replay(
    policy: Callable[[Round | None], int | DraftPlan],
    scenario: Scenario,
    seed: int,
    noise: float = 0.0,
) -> float:
    """Seconds of an answer; the clock reads up to `noise` more or less, and at times the double."""
    random = Random(seed)
    seconds = 0.0
    done = 0
    last = None
    while done < TOKENS:
        length = policy(last)
        length = length if isinstance(length, int) else length.longest
        passes = [random.random() for _ in range(8)]
        error = noise * (2 * random.random() - 1)
        outlier = noise > 0 and random.random() < 0.04
        accepted = 0
        while accepted < length and passes[accepted] < scenario.accept(accepted, done):
            accepted += 1
        cost = scenario.cost(length, done)
        last = round_of(length, accepted + 1, cost * (1 + error) * (2 if outlier else 1))
        seconds += cost
        done += accepted + 1
    return seconds


def regret(scenario: Scenario, *, measured: bool, noise: float) -> float:
    """Percent more time than the best fixed length takes."""

    def fixed(length: int) -> Callable[[Round | None], int]:
        return lambda last: length

    lengths = range(scenario.longest + 1)
    best = min(sum(replay(fixed(n), scenario, i) for i in range(RUNS)) for n in lengths)
    costs = {n: scenario.cost(n, 0) for n in lengths if n in (0, *LENGTHS)} if measured else {}
    auto = 0.0
    for i in range(RUNS):
        auto += replay(controller_of(scenario.longest, costs), scenario, i, noise)
    return 100 * (auto / best - 1)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_little_is_lost_where_costs_are_measured_beforehand(name: str, noise: float) -> None:
    assert regret(SCENARIOS[name], measured=True, noise=noise) <= MOST


@pytest.mark.parametrize("name", UNMEASURED)
def test_little_is_lost_where_the_first_rounds_measure(name: str) -> None:
    assert regret(SCENARIOS[name], measured=False, noise=0.0) <= MOST


def test_later_requests_start_from_what_earlier_ones_taught() -> None:
    """Ten short answers where nothing pays: at most 3 % is lost, half of it after the first."""
    profile = Profile(DRAFT)
    answers = [driven(Controller(profile), 48, lambda i: 1, cost=1.4) for _ in range(10)]
    drafts = [sum(length > 0 for length in lengths) for lengths in answers]
    assert 0.4 * sum(drafts) <= 0.03 * 10 * 48
    assert 0.4 * sum(drafts[1:]) <= 0.015 * 9 * 48


def test_a_profile_that_pays_drafts_from_the_first_round_on() -> None:
    profile = Profile(DRAFT)
    driven(Controller(profile), 200, lambda i: 5)
    assert 0 not in driven(Controller(profile), 20, lambda i: 5)


def test_costs_are_those_of_the_number_of_rows() -> None:
    """A draft pays for one row, not for eight, whose rounds take ten plain ones."""
    profile = Profile(DRAFT)
    for rows, cost in [(1, 1.2), (8, 10.0)]:
        measure(profile, {0: 1.0, 4: cost, 8: cost}, rows)
    controller = Controller(profile)
    assert controller(round_of(0, 1, 1.0, rows=1)).longest > 0
    assert controller(round_of(0, 1, 1.0, rows=8)).longest == 0
    assert controller(round_of(0, 1, 1.0, rows=1)).longest > 0


@pytest.mark.parametrize("seconds", [20.0, 1000.0])
def test_one_slow_first_draft_does_not_switch_drafting_off(seconds: float) -> None:
    """A kernel that is compiled, or pages that are read: no later request pays for them."""
    profile = Profile(DRAFT)
    controller = Controller(profile)
    n = controller(None).longest
    assert n > 0
    n = controller(round_of(n, n + 1, seconds)).longest
    controller(round_of(n, 1, 1.0))
    answers = [driven(Controller(profile), 48, lambda i: 5) for _ in range(4)]
    assert share(answers[0]) > 0.7 and share(answers[-1]) > 0.9


def test_a_fixed_length_does_lose() -> None:
    """The bounds above say something: drafting on regardless, or never, loses much more."""

    def always(length: int) -> Callable[[Round | None], int]:
        return lambda last: length

    bad = SCENARIOS["nothing pays"]
    good = SCENARIOS["pays strongly"]
    assert replay(always(4), bad, 0) > 1.2 * replay(always(0), bad, 0)
    assert replay(always(0), good, 0) > 3 * replay(always(8), good, 0)


def test_nothing_to_draft() -> None:
    assert driven(controller_of(0), 20, lambda i: 1) == [0] * 20


class Device:
    """Works through what is queued after the host has moved on, as a GPU does."""

    def __init__(self) -> None:
        self.host = 0.0
        self.free = 0.0
        self.waits = 0

    def work(self, seconds: float, *, waits: bool = False) -> None:
        self.host += 0.001  # launching
        self.free = max(self.free, self.host) + seconds
        if waits:
            self.host = self.free

    def event(self) -> "Mark":
        return Mark(self)


class Mark:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self.device.host, self.device.free)

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: "Mark") -> float:
        return 1000 * (end.at - self.at)


def test_stages_on_a_device_take_what_the_device_takes() -> None:
    """The drafter waits for its passes, the target's is only launched.

    Host times would call the drafter the slow one.
    """
    device = Device()
    clock = DeviceStopwatch(device.event)
    device.work(0.010, waits=True)
    clock.lap("draft")
    device.work(0.030)
    clock.lap("score")
    assert device.host < 0.015 and device.waits == 0  # nothing has waited yet
    assert dict(clock.seconds) == pytest.approx({"draft": 0.011, "score": 0.031})
    waits = device.waits
    assert (
        sum(clock.seconds.values()) == pytest.approx(0.042) and device.waits == waits
    )  # read once


def test_a_cheap_drafter_stays_on_where_scoring_returns_at_once() -> None:
    """Draft and score cost 1 + 10 ms, plain rounds 10, and a round emits 3 tokens: it pays.

    What the host has waited for does not matter.
    """
    device = Device()
    controller = controller_of(DRAFT)
    last = None
    lengths = []
    for _ in range(60):
        lengths.append(controller(last).longest)
        clock = DeviceStopwatch(device.event)
        if lengths[-1]:
            device.work(0.001, waits=True)
        clock.lap("draft")
        device.work(0.010)
        clock.lap("score")
        last = replace(round_of(lengths[-1], 3 if lengths[-1] else 1, 0.0), seconds=clock.seconds)
    assert lengths.count(0) <= 4
    costs = controller.profile.costs_of(1)
    drafting = costs.score.at(3) + costs.draft.at(2)
    assert drafting / costs.score.at(1) == pytest.approx(1.2, abs=0.1)


def test_a_round_is_measured_by_the_watch_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(decode, "stopwatch", lambda place: DeviceStopwatch(device.event))
    (first, *_) = decode.decode(TableTarget.random(5), NoDrafter(), batch_of([[1]], 2))
    assert list(first.seconds) == ["draft", "score", "verify", "commit"] and device.waits == 0
    assert isinstance(Stopwatch().seconds, dict)


def test_a_cpu_asks_for_no_events() -> None:
    assert isinstance(stopwatch(torch.device("cpu")), Stopwatch)
