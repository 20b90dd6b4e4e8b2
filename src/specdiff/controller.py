"""Adaptive drafting: each round's plan, from measured costs and acceptance.

A round that drafts K tokens yields 1 + a_0 + a_0 a_1 + ... (K products) tokens, a_k being the share
of k-th tokens accepted where all before them were, and takes T_draft(K) + T_target(K + 1). The plan
maximizes expected tokens a second over the draft length of each branch and the draft temperature.
What is known of both at first is the profile of target and drafter, which all requests share; a
stream's own rounds then count for more. Rounds tried for what they may teach are paid from a
budget, a small share of the time that decoding takes anyway.

A plan depends on earlier rounds alone, so the output distribution does not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Integral
from typing import Any

import torch

from specdiff.drafters.base import Drafter
from specdiff.errors import UsageError
from specdiff.profile import Acceptance, Costs, Profile
from specdiff.types import DraftPlan, Round

FIRST_LOSS = 1.0  # plain rounds that may be lost before any time has passed
SHARE = 0.0075  # of the time passed that may be lost
FADING = 0.98  # weight of the acceptance of a stream's earlier rounds, a round
TRUST = 3.0  # rounds of a stream that count as much as the profile
HOPE = 0.2  # standard deviations of acceptance to hope for; twice, PATIENCE rounds after a draft
PATIENCE = 8
TASTE = 1.0  # standard deviations of acceptance to hope for at a draft temperature
TRIAL = 8  # drafting rounds in a row at one draft temperature
REFRESH = 32  # drafting rounds after which a plain round is timed again, where it may matter
CLEAR = 1.5  # gain of drafting that a plain round's exact cost cannot undo
FIRST = 4  # the first draft's length at most
CERTAIN = 0.999  # acceptance at most

Lengths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """A round as a rule sees it.

    width: drafted positions that were scored. draft, score: seconds of the drafter, and of the
    rest. counts: of each row that ran, the branch, and the numbers of drafted and accepted tokens.
    greedy: all rows have temperature 0.
    """

    rows: int
    width: int
    draft: float
    score: float
    counts: Sequence[tuple[int, int, int]]
    greedy: bool = False

    @classmethod
    def of(cls, last: Round) -> "Observation":
        """Waits for the device once."""
        draft = last.draft
        table = torch.stack([last.emitted, draft.sizes, last.verification.accepted]).tolist()
        rows = len(table[0])
        branches = draft.branches or (0,) * rows
        counts = [
            (branch, size, min(accepted, size))
            for branch, emitted, size, accepted in zip(branches, *table, strict=True)
            if emitted
        ]
        drafting = last.seconds["draft"]
        rest = sum(last.seconds.values()) - drafting
        greedy = last.batch.params.all_greedy
        return cls(rows, draft.tokens.shape[1], drafting, rest, counts, greedy)


@dataclass(slots=True)
class Controller:
    """Maps the last round of a stream to the next round's plan.

    profile: what is known beforehand, to which this stream adds. A stream has a controller of its
        own.
    greedy: all of its requests have temperature 0, as far as is known before its first round.
    """

    profile: Profile
    greedy: bool = False
    rows: int = 1
    plan: DraftPlan = field(default_factory=lambda: DraftPlan((0,)))
    temperature: float = 1.0
    own: list[Acceptance] = field(default_factory=list)
    lost: float = 0.0  # share of a round of this plan that is lost, if it is not the best
    plain: int = 0  # rounds since the last draft
    drafting: int = 0  # rounds since the last plain one
    steady: bool = False  # the last round drafted, so that the drafter has read the text

    def __post_init__(self) -> None:
        self.own = [Acceptance.of(longest) for longest in self.profile.branches]
        self.temperature = self.profile.temperatures[0]

    def __call__(self, last: Round | None) -> DraftPlan:
        if last is not None and self.profile.draft_len:
            observation = Observation.of(last)
            if observation.counts:
                self.observe(observation)
        self.plan = self._next()
        return self.plan

    def rates(self, *, hope: bool = False) -> dict[Lengths, float]:
        """Expected tokens a second by draft lengths; `hope`: what may be hoped for where little is
        measured."""
        profile = self.profile
        costs = profile.costs_of(self.rows)
        places = range(max(profile.branches) + 1)
        score = [costs.score.at(n + 1, hope=hope) for n in places]
        draft = [costs.draft.at(n, hope=hope) for n in places]
        tokens = [self._tokens(branch, hope=hope) for branch in range(len(profile.branches))]
        if len(tokens) == 1:
            rest = (n for n in profile.lengths[0] if n)
            rates: dict[Lengths, float] = {(0,): 1 / score[0]}
            return rates | {(n,): tokens[0][n] / (score[n] + draft[n]) for n in rest}
        shares = profile.shares()
        return {
            (a, b): _mixed_rate((a, b), tokens, shares, self.rows, score, draft)
            for a, b in product(*profile.lengths)
        }

    def observe(self, last: Observation) -> None:
        """A round of `plan`."""
        profile = self.profile
        length = self.plan.lengths[0]
        # a plain round's draft stage is part of what it costs
        score = last.score if self.plan.longest else last.draft + last.score
        self.rows = last.rows
        self.greedy = last.greedy
        costs = profile.costs.setdefault(last.rows, Costs())
        costs.score.observe(last.width + 1, score)
        if self.plan.longest:
            self._observe_draft(costs, last, length)
        self.steady = length > 0
        self.plain = 0 if last.width else self.plain + 1
        self.drafting = self.drafting + 1 if last.width else 0
        for branch, longest in enumerate(profile.branches):
            drafts = [(size, n) for b, size, n in last.counts if b == branch and size]
            if drafts:
                self._observe_acceptance(branch, range(longest), drafts, len(last.counts))
        seconds = last.draft + last.score
        profile.seconds += seconds
        profile.loss += self.lost * seconds

    def _observe_draft(self, costs: Costs, last: Observation, length: int) -> None:
        branches = [branch for branch, _, _ in last.counts]
        if len(self.profile.branches) > 1:
            shares = [branches.count(b) / len(branches) for b in range(2)]
            self.profile.observe_branches(shares)
        ran = length if 0 in branches else 0
        # after plain rounds a drafter reads their tokens, too: the draft takes at most this long
        earlier = costs.draft.medians.get(ran, last.draft)
        costs.draft.observe(ran, last.draft if self.steady else min(last.draft, earlier))

    def _observe_acceptance(
        self, branch: int, places: range, drafts: Sequence[tuple[int, int]], rows: int
    ) -> None:
        profile = self.profile
        kind = None if self.greedy else self.plan.temperature
        reached = [sum(n >= k and size > k for size, n in drafts) / rows for k in places]
        accepted = [sum(n > k for _, n in drafts) / rows for k in places]
        relative = self._relative(branch, kind)
        profile.observe_acceptance(branch, kind, reached, accepted)
        # a stream's own acceptance is as if at the first draft temperature
        even = [m / r for m, r in zip(accepted, relative, strict=True)]
        even = [min(m, n) for m, n in zip(even, reached, strict=True)]
        self.own[branch] = self.own[branch].following(reached, even, FADING)

    def _relative(self, branch: int, kind: float | None) -> list[float]:
        """Acceptance at a draft temperature over that at the first one, by position."""
        first = self.profile.temperatures[0]
        if kind in (None, first):
            return [1.0] * self.profile.branches[branch]
        pairs = zip(
            self.profile.rates(branch, kind), self.profile.rates(branch, first), strict=True
        )
        return [a / max(b, 1e-3) for a, b in pairs]

    def _tokens(self, branch: int, *, hope: bool) -> list[float]:
        """Expected tokens of a row by draft length, at the present draft temperature."""
        profile = self.profile
        own = self.own[branch]
        first = profile.temperatures[0]
        kind = None if self.greedy else self.temperature
        prior = profile.rates(branch, None if self.greedy else first, own)
        rates = own.rates(prior, TRUST)
        if hope:
            rates = hoped(rates, own.reached, HOPE * (1 + self.plain / PATIENCE))
        if kind not in (None, first):
            relative = self._relative(branch, kind)
            rates = [a * r for a, r in zip(rates, relative, strict=True)]
        return expected_tokens(rates)

    def _best_temperature(self) -> float:
        """That of the most tokens a draft, or that may have, as far as all requests know."""
        profile = self.profile
        temperatures = profile.temperatures
        if self.greedy or len(temperatures) == 1 or not profile.branches[0]:
            return temperatures[0]
        drafts = {}
        for temperature in temperatures:
            shared = profile.acceptance.get((0, temperature))
            reached = shared.reached if shared else [0.0] * profile.branches[0]
            rates = hoped(profile.rates(0, temperature), reached, TASTE)
            drafts[temperature] = expected_tokens(rates)[-1]
        return max(drafts, key=drafts.__getitem__)

    def _next(self) -> DraftPlan:
        profile = self.profile
        nothing = (0,) * len(profile.branches)
        self.lost = 0.0
        if not profile.draft_len:
            return DraftPlan(nothing)
        costs = profile.costs_of(self.rows)
        curve = costs.score.medians
        if 1 not in curve:
            lengths = nothing if curve else tuple(min(FIRST, n) for n in profile.branches)
            return DraftPlan(lengths, self.temperature)
        if self.drafting % TRIAL == 0:
            self.temperature = self._best_temperature()
        rates = self.rates()
        best = max(rates, key=rates.__getitem__)
        lengths = best
        gain = rates[best] / rates[nothing]
        if profile.loss <= SHARE * profile.seconds + FIRST_LOSS * curve[1]:
            if best != nothing and self.drafting >= REFRESH and gain < CLEAR:
                lengths = nothing
            else:
                hopes = self.rates(hope=True)
                lengths = max(hopes, key=hopes.__getitem__)
        self.lost = 1 - rates[lengths] / rates[best]
        return DraftPlan(lengths, self.temperature)


def expected_tokens(rates: Sequence[float]) -> list[float]:
    """Of a round, by draft length: 1 + a_0 + a_0 a_1 + ..."""
    total = chance = 1.0
    expected = [total]
    for rate in rates:
        chance *= min(rate, CERTAIN)
        total += chance
        expected.append(total)
    return expected


def hoped(rates: Sequence[float], reached: Sequence[float], deviations: float) -> list[float]:
    """Rates some standard deviations better, as far as the counts leave room for it."""
    return [
        min(rate + deviations * (rate * (1 - rate) / (n + TRUST)) ** 0.5, CERTAIN)
        for rate, n in zip(rates, reached, strict=True)
    ]


def _mixed_rate(
    lengths: tuple[int, int],
    tokens: Sequence[Sequence[float]],
    shares: Sequence[float],
    rows: int,
    score: Sequence[float],
    draft: Sequence[float],
) -> float:
    """Tokens a second where each row is drafted by one of two branches.

    The first branch's draft takes time if any row needs it, and the longest draft of the round
    decides how many positions are scored.
    """
    first, second = lengths
    if not first and not second:
        return 1 / score[0]
    share = shares[1] if second else 0.0
    alone = (1 - share) ** rows
    never = share**rows
    network = score[first] + draft[first]
    lookup = score[second] + draft[0]
    both = score[max(first, second)] + draft[first]
    seconds = alone * network + never * lookup + (1 - alone - never) * both
    expected = (1 - share) * tokens[0][first] + share * tokens[1][second]
    return expected / seconds


def free_of_drafts(verifier: str, *, greedy: bool) -> bool:
    """Whether a seed's text depends on no draft, and so on no draft length."""
    return greedy or verifier.startswith("match")


def profile_of(drafter: Drafter[Any]) -> Profile:
    """An empty profile of a drafter."""
    return Profile(drafter.draft_len, drafter.branches, drafter.temperatures)


def draft_length(
    value: int | str | None,
    drafter: Drafter[Any],
    *,
    steady: bool,
    greedy: bool = False,
    profile: Profile | None = None,
) -> int | Controller:
    """K, or a Controller, for a caller's `draft_len`; 0 for a drafter that never drafts.

    Args:
        value: a number, "auto", or None: "auto", but the drafter's own K if `steady`.
        steady: the text must not depend on clocks.
        greedy: the temperature is 0.
        profile: of the target and `drafter`, which earlier requests have filled; None: a new one.

    Raises UsageError for any other value.
    """
    if value not in (None, "auto") and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise UsageError(
            f"draft_len must be a whole number of at least 1 or 'auto', not {value!r}",
            param="draft_len",
        )
    if isinstance(value, Integral) and int(value) < 1:
        raise UsageError(
            f"draft_len must be at least 1, not {value}; for plain decoding use the drafter 'none'",
            param="draft_len",
        )
    if drafter.draft_len == 0:
        return 0
    if value == "auto" or (value is None and not steady):
        return Controller(profile or profile_of(drafter), greedy)
    return drafter.draft_len if value is None else int(value)
