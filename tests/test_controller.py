"""Drafting on and off, driven by synthetic rounds with given seconds and emitted tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specdiff import decode
from specdiff.controller import FIRST_PAUSE, LONGEST_PAUSE, PATIENCE, PLAIN_PROBES, Controller
from specdiff.drafters.base import NoDrafter
from specdiff.stopwatch import DeviceStopwatch, Stopwatch, stopwatch
from specdiff.targets.table import TableTarget
from specdiff.types import Draft, Round, Verification
from tiny import batch_of

DRAFT = 8


def round_of(draft_len: int, emitted: int, seconds: float, rows: int = 1) -> Round:
    batch = batch_of([[1]] * rows)
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

    A plain round takes a second, a drafting one `cost` and emits `emits(i)` tokens.
    """
    last = None
    lengths = []
    for i in range(rounds):
        lengths.append(controller(last))
        last = round_of(lengths[-1], emits(i), cost) if lengths[-1] else round_of(0, 1, 1.0)
    return lengths


def share(lengths: list[int]) -> float:
    return sum(c > 0 for c in lengths) / len(lengths)


def test_it_starts_by_drafting_and_times_a_few_plain_rounds() -> None:
    lengths = driven(Controller(DRAFT), 40, lambda i: 5)
    assert lengths[:PATIENCE] == [DRAFT] * PATIENCE
    assert lengths.count(0) == PLAIN_PROBES
    assert set(lengths) == {0, DRAFT}


def test_it_stays_on_above_break_even() -> None:
    controller = Controller(DRAFT)
    lengths = driven(controller, 1000, lambda i: 3)
    assert lengths.count(0) == PLAIN_PROBES
    assert controller.tau > controller.break_even


def test_it_turns_off_below_break_even() -> None:
    lengths = driven(Controller(DRAFT), 40, lambda i: 1)
    assert lengths[PATIENCE : PATIENCE + PLAIN_PROBES + FIRST_PAUSE] == [0] * (
        PLAIN_PROBES + FIRST_PAUSE
    )


def test_it_probes_again_after_ever_longer_pauses() -> None:
    lengths = driven(Controller(DRAFT), 3000, lambda i: 1)
    pauses = []
    run = 0
    for c in lengths:
        if c == 0:
            run += 1
        elif run:
            pauses.append(run)
            run = 0
    assert len(pauses) >= 5
    assert pauses == sorted(pauses)
    assert pauses[-1] <= LONGEST_PAUSE + PLAIN_PROBES + 1
    assert share(lengths) < 0.1  # probing costs little
    assert share(lengths[2000:]) > 0  # and never ends


def test_it_comes_back_when_drafts_get_better() -> None:
    """And after that a dip is forgiven sooner: the pause starts short again."""
    controller = Controller(DRAFT)
    driven(controller, 300, lambda i: 1)
    lengths = driven(controller, 700, lambda i: 6)
    assert share(lengths[-300:]) == 1
    assert controller.pause == FIRST_PAUSE


def test_break_even_is_measured() -> None:
    """tau 2 pays where a drafting round costs 1.5 plain ones, and does not where it costs 3."""
    assert share(driven(Controller(DRAFT), 400, lambda i: 2, cost=1.5)) > 0.95
    assert share(driven(Controller(DRAFT), 400, lambda i: 2, cost=3.0)) < 0.2


def test_a_noisy_drafter_above_break_even_stays_on() -> None:
    lengths = driven(Controller(DRAFT), 600, lambda i: (1, 5, 2, 6)[i % 4])
    assert share(lengths) > 0.95


def test_rounds_in_which_nothing_ran_count_for_nothing() -> None:
    controller = Controller(DRAFT)
    before = controller(None)
    for _ in range(50):
        assert controller(round_of(DRAFT, 0, 100.0)) == before
    assert (controller.tau, controller.drafted, controller.plain) == (0.0, 0, 0)


def test_done_rows_do_not_lower_tau() -> None:
    controller = Controller(DRAFT)
    mixed = round_of(DRAFT, 4, 2.0, rows=2)
    mixed.emitted[1] = 0
    controller(mixed)
    assert controller.tau == 4


def test_nothing_to_draft() -> None:
    assert driven(Controller(0), 20, lambda i: 1) == [0] * 20


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
    controller = Controller(DRAFT)
    last = None
    lengths = []
    for _ in range(60):
        lengths.append(controller(last))
        clock = DeviceStopwatch(device.event)
        if lengths[-1]:
            device.work(0.001, waits=True)
        clock.lap("draft")
        device.work(0.010)
        clock.lap("score")
        last = replace(round_of(lengths[-1], 3 if lengths[-1] else 1, 0.0), seconds=clock.seconds)
    assert lengths.count(0) == PLAIN_PROBES
    assert controller.break_even == pytest.approx(1.2, abs=0.1)


def test_a_round_is_measured_by_the_watch_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(decode, "stopwatch", lambda place: DeviceStopwatch(device.event))
    (first, *_) = decode.decode(TableTarget.random(5), NoDrafter(), batch_of([[1]], 2))
    assert list(first.seconds) == ["draft", "score", "verify", "commit"] and device.waits == 0
    assert isinstance(Stopwatch().seconds, dict)


def test_a_cpu_asks_for_no_events() -> None:
    assert isinstance(stopwatch(torch.device("cpu")), Stopwatch)
