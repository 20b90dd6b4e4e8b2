"""Small exact drafters with laws that can be enumerated, and variants with one planted bug each.

Shapes: B rows, K drafted tokens, N = K + 1, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff import verify
from specdiff.diffusion.process import Absorbing, Process
from specdiff.diffusion.schedule import Schedule
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.base import Drafter, DrafterWrapper
from specdiff.drafters.denoising import Denoiser, DenoisingDrafter
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw, probabilities
from specdiff.targets.base import Target, TargetWrapper
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, TargetOutput, Verification


class ToyDenoiser(Denoiser[None]):
    """A denoiser made of tables.

    logits[k] = position[k] + anchor[last committed] + left and right[nearest revealed token].
    Reading to the right costs exact orders nothing (nothing there is revealed yet) and makes any
    other order pay.
    """

    def __init__(
        self, vocab_size: int, seed: int = 0, sharpness: float = 1.5, draft_len: int = 3
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mask_id = vocab_size
        self.draft_len = draft_len
        shape = {
            "position": 16,
            "anchor": vocab_size,
            "left": vocab_size + 1,
            "right": vocab_size + 1,
        }
        self.tables = {
            name: sharpness
            * torch.randn(rows, vocab_size, dtype=torch.float64, generator=generator)
            for name, rows in shape.items()
        }

    def denoise(
        self,
        context: Context,
        state: None,
        canvas: Int[Tensor, "B K"],
        revealed: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "B K V"]:
        left = self._nearest(canvas, revealed)
        right = self._nearest(canvas.flip(1), revealed.flip(1)).flip(1)
        table = self.tables
        anchor = table["anchor"][context.batch.anchor][:, None]
        return (
            table["position"][: canvas.shape[1]]
            + anchor
            + table["left"][left]
            + table["right"][right]
        )

    def _nearest(
        self, canvas: Int[Tensor, "B K"], revealed: Bool[Tensor, "B K"]
    ) -> Int[Tensor, "B K"]:
        """The last revealed token up to each position, MASK where there is none."""
        at = torch.where(revealed, torch.arange(canvas.shape[1]), -1).cummax(1).values
        return torch.where(at < 0, self.mask_id, canvas.gather(1, at.clamp(min=0)))


class ToyScorer(ToyDenoiser):
    """A score made of tables, of either process: every token weighs on its neighbors on both sides.

    Where the score has no MASK, every token counts as revealed; the score at a token's own place
    is 1. With `coupling` above 1 tokens depend more on neighbors, less on position and anchor.
    """

    def __init__(
        self, process: Process, schedule: Schedule, seed: int = 0, coupling: float = 1.0
    ) -> None:
        super().__init__(process.tokens, seed)
        for name, table in self.tables.items():
            table.mul_(coupling if name in ("left", "right") else coupling**-2)
        self.process = process
        self.schedule = schedule

    def start(self, context: Context, draft_len: int) -> Float[Tensor, "B"]:
        return context.batch.length.double().reciprocal().clamp(max=0.8)

    def log_score(
        self, context: Context, state: None, canvas: Int[Tensor, "B K"], sigma: Float[Tensor, "B"]
    ) -> Float[Tensor, "B K V"]:
        revealed = canvas < self.mask_id
        mask = self.mask_id
        left = self._nearest(
            torch.nn.functional.pad(canvas, (1, 0), value=mask)[:, :-1],
            torch.nn.functional.pad(revealed, (1, 0))[:, :-1],
        )
        right = self._nearest(
            torch.nn.functional.pad(canvas, (0, 1), value=mask)[:, 1:].flip(1),
            torch.nn.functional.pad(revealed, (0, 1))[:, 1:].flip(1),
        ).flip(1)
        table = self.tables
        logits = (
            table["position"][: canvas.shape[1]]
            + table["anchor"][context.batch.anchor][:, None]
            + table["left"][left]
            + table["right"][right]
        )
        if isinstance(self.process, Absorbing):
            logits = torch.nn.functional.pad(
                logits.log_softmax(-1) - torch.expm1(sigma)[:, None, None].log(), (0, 1)
            )
        return (logits - logits.gather(-1, canvas[..., None])).scatter(-1, canvas[..., None], 0.0)


class PointMasses(Drafter[None]):
    """Random tokens without probabilities, a random number a row: valid under every verifier."""

    draft_len = 3

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        tokens = (noise.uniform(Purpose.DRAFT, draft_len, index=0) * self.vocab_size).long()
        size = (noise.uniform(Purpose.DRAFT, 1, index=1)[:, 0] * (draft_len + 1)).long()
        return Draft(tokens, None, size)


# ---- planted bugs: drafters ----


class AnyOrder(Drafter[None]):
    """BUG: unmasks right to left, one pass a position; stores each q at the time of its draw."""

    def __init__(self, denoiser: ToyDenoiser) -> None:
        self.denoiser = denoiser
        self.draft_len = denoiser.draft_len

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        canvas = torch.full(uniform.shape, self.denoiser.mask_id)
        probs = torch.zeros(*uniform.shape, self.denoiser.mask_id, dtype=torch.float64)
        for k in reversed(range(draft_len)):
            revealed = (torch.arange(draft_len) > k).expand_as(canvas)
            q = probabilities(
                self.denoiser.denoise(context, None, canvas, revealed), context.batch.params
            )[:, k]
            canvas[:, k] = draw(q, uniform[:, k])
            probs[:, k] = q
        return Draft(canvas, probs)


class StoresProbabilities(Drafter[None]):
    """BUG: SEDD's sampler with the paper's recipe taken literally.

    Each token's probabilities are those at the time of its draw.
    """

    def __init__(self, inner: AnyOrderDrafter[None]) -> None:
        self.inner = inner
        self.draft_len = inner.draft_len

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        scorer = self.inner.scorer
        calls = []

        def listening(canvas: Tensor, sigma: Tensor) -> Tensor:
            calls.append((canvas, scorer.log_score(context, None, canvas, sigma)))
            return calls[-1][1]

        listener = copy.copy(scorer)
        listener.log_score = lambda context, state, canvas, sigma: listening(canvas, sigma)
        drafter = AnyOrderDrafter(listener, steps=self.inner.steps, sampler=self.inner.sampler)
        tokens = drafter.propose(context, None, noise, draft_len).tokens
        probs = torch.zeros(*tokens.shape, scorer.mask_id, dtype=torch.float64)
        for canvas, log_score in calls:
            law = probabilities(log_score[..., : scorer.mask_id], context.batch.params)
            probs = torch.where((canvas == scorer.mask_id)[..., None], law, probs)
        return Draft(tokens, probs)


class LengthFromThePast(DrafterWrapper[Any]):
    """Drafts one token after a round that accepted none, and all after others: exact, as the length
    is known before the round's draws."""

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = super().propose(context, state, noise, draft_len)
        sizes = draft.sizes
        if context.previous is None:
            return draft
        missed = context.previous.verification.accepted == 0
        return replace(draft, size=torch.where(missed & (context.batch.round > 0), 1, sizes))


class DropsUnlikely(Drafter[None]):
    """BUG: cuts its draft before the first token it finds unlikely itself.

    That drops a token because of what it is.
    """

    def __init__(self, inner: DenoisingDrafter[None], floor: float) -> None:
        self.inner = inner
        self.floor = floor
        self.draft_len = inner.draft_len

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        draft = self.inner.propose(context, None, noise, draft_len)
        if draft.probs is None:  # greedy
            return draft
        sure = draft.probs.gather(-1, draft.tokens[..., None])[..., 0] >= self.floor
        return replace(draft, size=sure.long().cumprod(1).sum(1))


class Misreported(Drafter[None]):
    """BUG: draws from sharpened probabilities, hands on the raw ones."""

    def __init__(self, denoiser: ToyDenoiser, draft_temperature: float) -> None:
        self.drawn = DenoisingDrafter(denoiser, draft_temperature=draft_temperature)
        self.raw = DenoisingDrafter(denoiser)
        self.draft_len = denoiser.draft_len

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        tokens = self.drawn.propose(context, None, noise, draft_len).tokens
        return replace(self.raw.propose(context, None, noise, draft_len), tokens=tokens)


class Forgetful(Drafter[None]):
    """BUG: draws under the request's penalties, returns the probabilities without them."""

    def __init__(self, denoiser: ToyDenoiser) -> None:
        self.inner = DenoisingDrafter(denoiser)
        self.draft_len = denoiser.draft_len

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        plain = replace(context.batch, params=replace(context.batch.params, active=frozenset()))
        unpenalized = self.inner.propose(replace(context, batch=plain), None, noise, draft_len)
        return replace(
            unpenalized, tokens=self.inner.propose(context, None, noise, draft_len).tokens
        )


class Through(Drafter[None]):
    """A stateless drafter that is handed other noise than the round's."""

    def __init__(self, inner: Drafter[None], change: Callable[[Noise], Noise]) -> None:
        self.inner = inner
        self.change = change
        self.draft_len = inner.draft_len

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return self.inner.propose(context, state, self.change(noise), draft_len)


def every_round_alike(noise: Noise) -> Noise:
    """BUG: a position drafted again gets the draw it had in the round before."""
    return replace(noise, round=torch.zeros_like(noise.round))


@dataclass(frozen=True, slots=True)
class OneUniform(Noise):
    """BUG: every position and so every diffusion step draws with one and the same uniform."""

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Float[Tensor, "B n"]:
        return Noise.uniform(self, purpose, 1, index).repeat(1, n)


@dataclass(frozen=True, slots=True)
class OneStream(Noise):
    """BUG: the draft is drawn with the very uniforms that then decide whether it stands."""

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Float[Tensor, "B n"]:
        return Noise.uniform(self, Purpose.RATIO, n, index)


@dataclass(frozen=True, slots=True)
class ThreeUniforms(Noise):
    """BUG: from the fourth position on, draws share the uniforms of the first three.

    No draft of three shows it.
    """

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Float[Tensor, "B n"]:
        return Noise.uniform(self, purpose, 3, index).repeat(1, -(-n // 3))[:, :n]


def three_uniforms(noise: Noise) -> Noise:
    return ThreeUniforms(noise.seed, noise.round, noise.position)


def one_uniform(noise: Noise) -> Noise:
    return OneUniform(noise.seed, noise.round, noise.position)


def one_stream(noise: Noise) -> Noise:
    return OneStream(noise.seed, noise.round, noise.position)


# ---- planted bugs: plans, and verifiers that draw from them ----

PlanFunction = Callable[[Draft, Float[Tensor, "B N V"]], Any]


@dataclass(frozen=True, slots=True)
class Tampered:
    """A plan's thresholds with another law for the token after them."""

    thresholds: Float[Tensor, "B K"]
    residual: Callable[[Int[Tensor, "B"]], Float[Tensor, "B V"]]


def swapped(plan: PlanFunction) -> PlanFunction:
    """BUG: accepts with q/p instead of p/q."""

    def tampered(draft: Draft, p: Float[Tensor, "B N V"]) -> Tampered:
        assert draft.probs is not None
        other = plan(replace(draft, probs=p[:, :-1]), torch.cat([draft.probs, p[:, -1:]], dim=1))
        return Tampered(other.thresholds, plan(draft, p).residual)

    return tampered


def no_residual(plan: PlanFunction) -> PlanFunction:
    """BUG: after a rejection the next token comes from p."""

    def tampered(draft: Draft, p: Float[Tensor, "B N V"]) -> Tampered:
        return Tampered(plan(draft, p).thresholds, lambda rows: p[torch.arange(len(p)), rows])

    return tampered


def early_bonus(plan: PlanFunction) -> PlanFunction:
    """BUG: when all K stand, the bonus token is drawn at row K-1."""

    def tampered(draft: Draft, p: Float[Tensor, "B N V"]) -> Tampered:
        real = plan(draft, p)
        K = draft.tokens.shape[1]
        return Tampered(
            real.thresholds,
            lambda rows: torch.where(
                (rows == K)[:, None], p[:, max(K - 1, 0)], real.residual(rows)
            ),
        )

    return tampered


def verifier_of(plan: PlanFunction, longest: bool) -> verify.Verifier:
    """The draw of a plan: the longest passing prefix (block), or up to the first failure."""

    def verifier(draft: Draft, p: Float[Tensor, "B N V"], noise: Noise) -> Verification:
        planned = plan(draft, p)
        K = draft.tokens.shape[1]
        passed = noise.uniform(Purpose.RATIO, K) < planned.thresholds
        n = (
            (passed * torch.arange(1, K + 1)).amax(1)
            if longest
            else passed.long().cumprod(1).sum(1)
        )
        following = draw(planned.residual(n), noise.uniform(Purpose.RESIDUAL, 1)[:, 0])
        index = torch.arange(K + 1).expand(len(n), -1)
        tokens = torch.where(index < n[:, None], torch.nn.functional.pad(draft.tokens, (0, 1)), 0)
        return Verification(n, torch.where(index == n[:, None], following[:, None], tokens), index)

    return verifier


# ---- planted bugs: targets ----


class Sick(TargetWrapper[Any]):
    """`inner` with logits that are `spoiled` from absolute position `first` on, for one seed."""

    def __init__(
        self, inner: Target[Any], spoil: Callable[[Tensor], Tensor], first: int, seed: int = 0
    ) -> None:
        super().__init__(inner)
        self.spoil = spoil
        self.first = first
        self.seed = seed

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = self.inner.score(cache, batch, draft)
        position = batch.length[:, None] + torch.arange(output.logits.shape[1])
        hit = (position >= self.first) & (batch.seed == self.seed)[:, None]
        return replace(
            output, logits=torch.where(hit[..., None], self.spoil(output.logits), output.logits)
        )


def _one_column(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.index_fill(-1, torch.tensor([1]), value)


SICKNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "all nan": lambda logits: torch.full_like(logits, torch.nan),
    "one nan": _one_column(torch.nan),
    "one +inf": _one_column(torch.inf),
    "all -inf": lambda logits: torch.full_like(logits, -torch.inf),
}


@dataclass(slots=True)
class StaleCache:
    ids: Int[Tensor, "B S"]
    written: Bool[Tensor, "B S"]


class StaleTarget(Target[StaleCache]):
    """BUG: the table target with a faulty cache.

    A slot once written stays as it is (`keeps`), or is written `shift` slots off, or a joining row
    reuses `beyond` positions more than it holds.

    sums: "before last" is the sum of all tokens before, so that every slot matters.
    """

    def __init__(
        self,
        table: Float[Tensor, "V V V"],
        *,
        keeps: bool = False,
        shift: int = 0,
        beyond: int = 0,
        sums: bool = False,
    ) -> None:
        self.table = table
        self.keeps = keeps
        self.shift = shift
        self.beyond = beyond
        self.sums = sums
        self.info = TableTarget(table).info

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> StaleCache:
        return StaleCache(
            torch.zeros(rows, slots + self.shift, dtype=torch.long),
            torch.zeros(rows, slots + self.shift, dtype=torch.bool),
        )

    def admit(
        self,
        cache: StaleCache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> None:
        for row, prompt, k in zip(rows, prompts, prefix_lengths.tolist(), strict=True):
            k += self.beyond if k else 0
            cache.ids[row, k : len(prompt) - 1] = prompt[k:-1]

    def score(self, cache: StaleCache, batch: Batch, draft: Draft) -> TargetOutput:
        at = batch.length[:, None] - 1 + torch.arange(draft.tokens.shape[1] + 1)
        there = at + self.shift
        new = torch.cat([batch.anchor[:, None], draft.tokens], dim=1)
        stays = cache.written.gather(1, there) & self.keeps
        cache.ids.scatter_(1, there, torch.where(stays, cache.ids.gather(1, there), new))
        cache.written.scatter_(1, there, True)
        history = cache.ids.cumsum(1) % len(self.table) if self.sums else cache.ids
        before = torch.where(at > 0, history.gather(1, (at - 1).clamp(min=0)), 0)
        return TargetOutput(self.table[before, cache.ids.gather(1, at)])


# ---- noise with given values ----


@dataclass(frozen=True, slots=True)
class Grid(Noise):
    """Noise with uniforms (and Gumbels) chosen by the test, by purpose."""

    uniforms: dict[Purpose, Float[Tensor, "B n"]]
    gumbels: Float[Tensor, "B n V"] | None = None

    @classmethod
    def holding(cls, rows: int, gumbels: Tensor | None = None, **uniforms: Tensor) -> "Grid":
        zero = torch.zeros(rows, dtype=torch.long)
        return cls(
            zero,
            zero,
            zero,
            {Purpose[name.upper()]: value for name, value in uniforms.items()},
            gumbels,
        )

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Float[Tensor, "B n"]:
        return self.uniforms[purpose][:, :n]

    def shared(self, n: int, vocab_size: int) -> Float[Tensor, "B n V"]:
        assert self.gumbels is not None
        return self.gumbels[:, :n, :vocab_size]
