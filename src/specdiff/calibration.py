"""Calibration: what scoring and drafting cost here and now, timed before the first request.

An automatic draft length then starts from the costs, and has only acceptance left to learn.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.noise import Noise
from specdiff.profile import Costs, Profile
from specdiff.targets.base import Target
from specdiff.types import Batch, Context, Draft, DraftPlan, Round, SamplingParams

SECONDS = 0.3  # of timing
CONTEXT = 32  # tokens of the scratch text
TURNS = 2  # rounds of each length: the first ones warm up, and the faster one of two counts
LENGTHS = (1, 3, 4, 8)  # on a CPU the fifth scored position costs most


class _RepeatDrafter(Drafter[None]):
    """Drafts one token over and over: the cheapest way to have K + 1 positions scored."""

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return Draft(context.batch.anchor[:, None].expand(-1, draft_len).contiguous())


def calibrate(
    target: Target[Any],
    drafter: Drafter[Any],
    profile: Profile,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Add the costs of one row's rounds to the profile, from a few rounds on scratch states.

    It ends after `seconds` and the pass then running; a target that takes longer for the scratch
    text teaches nothing here. A drafter that fails is reported by the requests, not here.
    """
    if not profile.draft_len:
        return
    begin = clock()
    costs = Costs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            states: list[decode.DecodeState] = []
            for proposer in (_RepeatDrafter(), drafter):
                states.append(_start(target, proposer, profile.draft_len))
                if clock() - begin > seconds:
                    return
            came: set[DraftPlan] = set()
            for _, (own, plan) in product(range(TURNS), _rounds(profile)):
                state = states[own]
                if not own and plan in came:
                    continue  # the drafter's own rounds time the scoring, too
                if bool(state.batch.done.all()) or clock() - begin > seconds:
                    return
                last = decode.step(state, plan)
                if own and last.draft.tokens.shape[1] == plan.longest:
                    came.add(DraftPlan((plan.longest,)))
                _observe(costs, last, plan, own=own)
        except Exception:  # the requests meet it again, and say whose fault it is
            return
        finally:
            if 1 in costs.score.medians and 1 not in profile.costs:
                profile.costs[1] = costs


def _rounds(profile: Profile) -> list[tuple[bool, DraftPlan]]:
    """Whether the drafter itself drafts, and the plan; shorter drafts come first."""
    longest = profile.draft_len
    network, *others = profile.branches
    rounds = []
    for n in dict.fromkeys((0, *(n for n in LENGTHS if n < longest), longest)):
        if 0 < n <= network:
            rounds.append((True, DraftPlan((n, *[0] * len(others)))))
        rounds.append((False, DraftPlan((n,))))
    if others:
        rounds.append((True, DraftPlan((0, *others))))
    return rounds


def _observe(costs: Costs, last: Round, plan: DraftPlan, *, own: bool) -> None:
    drafting = last.seconds["draft"]
    if own and not bool(last.disabled.any()):
        costs.draft.observe(plan.lengths[0], drafting)
    scored = last.draft.tokens.shape[1] + 1
    costs.score.observe(scored, sum(last.seconds.values()) - drafting)


def _start(target: Target[Any], drafter: Drafter[Any], longest: int) -> decode.DecodeState:
    """A scratch state, which is not released: a drafter with a memory must not remember it."""
    info = target.info
    context = min(CONTEXT, info.max_positions // 2)
    prompt: Sequence[int] = [i % info.vocab_size for i in range(context)]
    needed = TURNS * (len(LENGTHS) + 3) * (longest + 1)
    params = SamplingParams(max_tokens=max(1, min(needed, info.max_positions - context)))
    batch = Batch.of([prompt], [params], [0], device=info.device)
    slots = context + params.max_tokens + longest + 1
    state = decode.start(target, drafter, batch, slots=slots)
    decode.admit(state, torch.arange(1, device=info.device))
    return state
