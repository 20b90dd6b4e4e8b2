"""What an automatic plan loses against the best fixed one, replayed.

Random scenarios are drawn from seeds that no constant was tuned on. The best fixed length is the
best in hindsight, on the very same draws.
"""

from collections.abc import Mapping
from statistics import median, quantiles

import pytest

from replays import TASKS, Setting, scenario_regret, task_seconds
from specdiff.controller import Controller
from specdiff.profile import interpolated

SEED = 5000  # of the first scenario
SCENARIOS = 50
# Scoring n positions in plain rounds: packed 4-bit weights on a CPU with AVX-512; a wide device.
CURVES = {
    "packed": {1: 1.0, 2: 1.05, 3: 1.24, 4: 1.45, 5: 1.72, 7: 2.0, 9: 2.4},
    "wide": {1: 1.0, 9: 1.1},
}
DRAFT = 0.14  # seconds of a draft's pass, in plain rounds
LOOKUP = 0.005
TIMES = 3  # each recorded answer


def setting_of(curve: Mapping[int, float], tasks: str) -> Setting:
    cascade = tasks.startswith("cascade")
    return Setting(
        lambda n: curve[n] if n in curve else interpolated(curve, n),
        lambda n: DRAFT + 0.01 * n if n else LOOKUP,
        (4, 8) if cascade else (8,),
    )


def test_random_scenarios() -> None:
    """256 tokens of one request, with costs measured at load."""
    regrets = [
        scenario_regret(SEED + i, tokens=256, answers=1, runs=2, measured=True)
        for i in range(SCENARIOS)
    ]
    assert median(regrets) <= 2.0
    assert quantiles(regrets, n=10)[8] <= 5.0


def test_random_sessions_of_short_answers() -> None:
    """Six answers of 48 tokens, which share a profile."""
    regrets = [
        scenario_regret(SEED + i, tokens=48, answers=6, runs=1, measured=True)
        for i in range(SCENARIOS)
    ]
    assert median(regrets) <= 2.5
    assert quantiles(regrets, n=10)[8] <= 5.0


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("curve", CURVES)
def test_a_session_of_all_tasks(curve: str, tasks: str) -> None:
    """Recorded answers of every task in turn, against the one plan that is best for all."""
    setting = setting_of(CURVES[curve], tasks)
    profile = setting.profile(measured=True)
    fixed = dict.fromkeys((plan.lengths for plan in setting.plans()), 0.0)
    auto = 0.0
    for turn in range(TIMES):
        for task in TASKS[tasks].values():
            auto += task_seconds(setting, task, Controller(profile), turn)
            for plan in setting.plans():
                fixed[plan.lengths] += task_seconds(setting, task, plan)
    assert 100 * (auto / min(fixed.values()) - 1) <= 3.5
    assert auto <= 1.02 * fixed[(0,) * len(setting.branches)]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("curve", CURVES)
def test_each_task_alone(curve: str, tasks: str) -> None:
    """Three answers of one task; half of the tasks lose little even so."""
    setting = setting_of(CURVES[curve], tasks)
    regrets = []
    for task in TASKS[tasks].values():
        profile = setting.profile(measured=True)
        auto = sum(task_seconds(setting, task, Controller(profile), i) for i in range(TIMES))
        best = min(task_seconds(setting, task, plan) for plan in setting.plans())
        regrets.append(100 * (auto / TIMES / best - 1))
    assert median(regrets) <= 4.0, regrets


def test_a_length_for_each_branch() -> None:
    """Lookup drafts long, the network short, where that pays."""
    setting = setting_of(CURVES["packed"], "cascade")
    profile = setting.profile(measured=True)
    task = TASKS["cascade, T=0"]["math"]
    for turn in range(TIMES):
        controller = Controller(profile)
        task_seconds(setting, task, controller, turn)
    assert controller.plan.length(1) >= 6 > controller.plan.length(0)
