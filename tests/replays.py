"""Replays: decoding without a model, from costs, acceptance and what a rule decides.

Seconds are in plain rounds. Every replay of one seed sees the same draws, whatever the rule.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from specdiff.controller import Controller, Observation
from specdiff.profile import SURE, Costs, Profile
from specdiff.types import DraftPlan

Cost = Callable[[int], float]
OUTLIERS = 0.04  # rounds that take twice as long
MEASURED = (1, 2, 3, 5, 9)  # positions whose scoring is timed before the first request


@dataclass(frozen=True)
class Setting:
    """Seconds of scoring `n` positions and of drafting `K` tokens; the longest draft by branch."""

    score: Cost
    draft: Cost
    branches: tuple[int, ...] = (8,)

    def profile(self, *, measured: bool) -> Profile:
        profile = Profile(max(self.branches), self.branches)
        if measured:
            costs = profile.costs.setdefault(1, Costs())
            for n in MEASURED:
                if n <= max(self.branches) + 1:
                    costs.score.observe(n, self.score(n), times=SURE)
            for n in profile.lengths[0]:
                costs.draft.observe(n, self.draft(n), times=SURE)
        return profile

    def plans(self) -> list[DraftPlan]:
        """Every fixed setting."""
        pairs: list[tuple[int, ...]] = [()]
        for longest in self.branches:
            pairs = [(*pair, n) for pair in pairs for n in range(longest + 1)]
        return [DraftPlan(pair) for pair in pairs]


def seconds(
    setting: Setting,
    rule: Controller | DraftPlan,
    accepted: Sequence[int],
    looked_up: Sequence[int] = (),
    *,
    seed: int = 0,
    noise: float = 0.0,
) -> float:
    """Seconds of an answer; the clock reads up to `noise` more or less, and at times the double.

    accepted: of a draft at each position of the answer. looked_up: tokens that the second branch
        has at each position, 0 for none (empty: there is no such branch).
    """
    clock = Random(seed)
    total = 0.0
    position = 0
    while position < len(accepted):
        plan = rule if isinstance(rule, DraftPlan) else rule._next()
        most = looked_up[position] if looked_up and plan.length(1) else 0
        branch = int(most > 0)
        size = min(plan.length(1), most) if branch else plan.length(0)
        count = min(size, accepted[position])
        draft = setting.draft(0 if branch else plan.length(0)) if plan.longest else 0.0
        score = setting.score(size + 1)
        total += draft + score
        if isinstance(rule, Controller):
            rule.plan = plan
            error = 1 + noise * (2 * clock.random() - 1)
            error *= 2 if noise and clock.random() < OUTLIERS else 1
            counts = [(branch, size, count)]
            rule.observe(Observation(1, size, draft * error, score * error, counts))
        position += count + 1
    return total


# ---- random scenarios ----


@dataclass(frozen=True)
class Scenario:
    setting: Setting
    rates: Sequence[float]
    bursts: bool

    @classmethod
    def random(cls, seed: int) -> "Scenario":
        """Costs of all kinds of machines and drafters; texts that are even, or hard in places."""
        random = Random(seed)
        slope = random.choice([0.02, random.uniform(0.02, 0.12), random.uniform(0.15, 0.35)])
        free = random.choice([1, 2])  # positions that cost what one does
        base = random.choice([0.0, random.uniform(0.03, 0.2), random.uniform(0.1, 1.0)])
        each = random.uniform(0, 0.06) if base else random.choice([0.0, random.uniform(0.1, 0.5)])
        first = random.uniform(0.02, 0.97)
        decay = random.uniform(0.6, 1.02)
        setting = Setting(
            lambda n: 1 + slope * max(n - free, 0),
            lambda n: base + each * n if n else 0.0,
            (random.choice([4, 8]),),
        )
        rates = [min(0.98, first * decay**k) for k in range(8)]
        return cls(setting, rates, random.random() < 0.5)

    def accepted(self, tokens: int, seed: int) -> list[int]:
        """Of a draft at each position of an answer, how many tokens are accepted."""
        random = Random(seed)
        level = 1.0
        counts = []
        for _ in range(tokens):
            if self.bursts and random.random() < 1 / 15:
                level = random.choice([0.4, 1.0, 1.3])
            passed = [random.random() < rate * level for rate in self.rates]
            counts.append([*passed, False].index(False))
        return counts


def scenario_regret(seed: int, *, tokens: int, answers: int, runs: int, measured: bool) -> float:
    """Percent more time than the best fixed length takes, over `runs` sessions of `answers`."""
    scenario = Scenario.random(seed)
    setting = scenario.setting
    fixed = dict.fromkeys((plan.lengths for plan in setting.plans()), 0.0)
    auto = 0.0
    for run in range(runs):
        profile = setting.profile(measured=measured)
        for answer in range(answers):
            at = 1000 * run + answer
            accepted = scenario.accepted(tokens, at)
            for lengths in fixed:
                fixed[lengths] += seconds(setting, DraftPlan(lengths), accepted)
            auto += seconds(setting, Controller(profile), accepted, seed=at, noise=0.1)
    return 100 * (auto / min(fixed.values()) - 1)


# ---- recorded tasks: what was accepted of a draft at every position of an answer ----

TASKS: Mapping[str, Mapping[str, Mapping[str, str]]] = json.loads(
    (Path(__file__).parent / "acceptance.json").read_text()
)


def task_seconds(
    setting: Setting, task: Mapping[str, str], rule: Controller | DraftPlan, seed: int = 0
) -> float:
    """Seconds of one recorded answer."""
    accepted = [int(digit) for digit in task["accepted"]]
    looked_up = [int(digit) for digit in task.get("looked_up", "")]
    return seconds(setting, rule, accepted, looked_up, seed=seed, noise=0.05)
