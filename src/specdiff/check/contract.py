"""The contract: token k was drawn from exactly `Draft.probs[k]`, given all that rows 0..k used.

Proof by the randomized probability-integral transform: if x was drawn from q, then u = q(tokens
ranked before x) + v q(x), with v uniform, is uniform in [0, 1) *whatever else is known that went
into q_0..q_k*. So every polynomial of u that has mean 0 under uniformity is uncorrelated with every
feature of the ancestors, of q_0..q_k and of the past; each such pair gives one score that is
standard normal for a lawful drafter. The marginal alone would miss drafts revealed in any order,
where x_k is a fair draw from q_k, yet an earlier q_j already knew x_k.

Shapes: B rows, K drafted tokens, V target vocabulary, C token classes, O rankings, P polynomials
(four a ranking), F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.check.findings import Finding, critical
from specdiff.noise import Noise, Purpose
from specdiff.types import Context, Draft

SMALL = 12  # a vocabulary up to this size has a class per token; larger ones are hashed
BITS = 6
HIGHEST = 3.0  # what the polynomials reach
CONTRACT = (
    "Draft.probs[k] must be P(x_k | x_<k, R_k), R_k being all that was used to compute rows 0..k "
    "of it (README, 'What lossless means here')"
)
CAUSES = {
    "law": (
        "do not follow the probabilities reported for it",
        "those are not the law they were drawn from. Were they taken before a temperature or "
        "filter, one position late, or not renormalized, or are the tokens of another draw?",
    ),
    "ancestors": (
        "depend on the tokens drafted before it in a way its probabilities do not show",
        "is one uniform used for several positions, or were the probabilities computed for other "
        "ancestors? Give every draw its own entry of noise.uniform(Purpose.DRAFT, ...) and "
        "condition on the tokens that are handed on.",
    ),
    "earlier laws": (
        "can be predicted from the probabilities reported for an earlier position, so these were "
        "computed after it had been revealed",
        "positions filled in any other order than left to right do this. The probability stored "
        "when the token was drawn is then not its law given all that q_0..q_k know; draw left to "
        "right, or hand tokens revealed early on as point masses (probs None).",
    ),
    "past rounds": (
        "go with the draws of the round before",
        "a position that is drafted again must get a fresh draw; noise.uniform has the round in "
        "its key.",
    ),
    "verifier": (
        "go with the uniforms that decide whether they are accepted",
        "draw them with Purpose.DRAFT only: verifier and draft need independent randomness.",
    ),
}


@dataclass(slots=True)
class Sums:
    """Running sums of features f [F], polynomials d [P] and their products, at one position."""

    f: Float[Tensor, "F"]
    ff: Float[Tensor, "F"]
    peak: Float[Tensor, "F"]
    d: Float[Tensor, "P"]
    fd: Float[Tensor, "F P"]
    n: int = 0

    @classmethod
    def empty(cls, features: int, shapes: int) -> "Sums":
        zero = torch.zeros(features, dtype=torch.float64)
        return cls(zero, zero, zero, zero.new_zeros(shapes), zero.new_zeros(features, shapes))

    def add(self, f: Float[Tensor, "B F"], d: Float[Tensor, "B P"]) -> None:
        if not len(f):
            return
        self.f = self.f + f.sum(0)
        self.ff = self.ff + f.square().sum(0)
        self.d = self.d + d.sum(0)
        self.fd = self.fd + f.T @ d
        self.n += len(f)
        self.peak = torch.maximum(self.peak, f.abs().amax(0))

    def scores(self) -> Float[Tensor, "F P"]:
        """z = sum((f - mean) d) / sqrt(sum (f - mean)^2), shrunk by Freedman's bound.

        So few or uneven drafts cannot raise an alarm.
        """
        n = max(self.n, 1)
        mean = self.f / n
        spread = self.ff - n * mean.square()
        constant = spread <= 1e-9 * self.ff.clamp(min=1e-30)
        spread = torch.where(constant, self.ff, spread).clamp(min=1e-12)[:, None]
        covariance = torch.where(constant[:, None], self.fd, self.fd - mean[:, None] * self.d)
        z = covariance / spread.sqrt()
        heaviest = HIGHEST * (self.peak + mean.abs() * ~constant)[:, None] / spread.sqrt()
        return z.abs() / (1 + heaviest * z.abs() / 3).sqrt()


@dataclass(slots=True)
class Scores:
    """All drafts, folded into Sums by kind of feature, draft length and position.

    Features are at most about 1 in size.
    """

    vocab_size: int
    sums: dict[tuple[str, int, int], Sums] = field(default_factory=dict)
    last: dict[int, tuple[int, Float[Tensor, "K P"]]] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def look(self, context: Context, noise: Noise, draft: Draft) -> None:
        """Add one round's drafts."""
        rows = (~context.batch.done).nonzero()[:, 0]
        probs = draft.full_probs(self.vocab_size)
        if probs is None or not len(rows) or not draft.tokens.shape[1]:
            return  # a point mass has no law to miss
        tokens = draft.tokens[rows].cpu()
        q = probs[rows].double().cpu()
        shapes = polynomials(transforms(tokens, q, self.generator))
        before = self._before(context, rows, shapes)
        K = tokens.shape[1]
        size = draft.sizes[rows].cpu()
        classes = self._classes()
        anchors = classes[context.batch.anchor[rows].cpu()]
        ratio = noise.uniform(Purpose.RATIO, K)[rows].double().cpu() * 2 - 1
        residual = noise.uniform(Purpose.RESIDUAL, 1)[rows].double().cpu() * 2 - 1
        laws = torch.cat([q @ classes, q.amax(-1, keepdim=True)], dim=-1)
        one = torch.ones(len(tokens), 1, dtype=torch.float64)
        for k in range(K):
            counted = size > k
            ancestors = [classes[tokens[:, :k]].flatten(1), shapes[:, :k, :, :2].flatten(1)]
            features = {
                "law": torch.cat([one, anchors, laws[:, k]], 1),
                "ancestors": torch.cat(ancestors, 1),
                "earlier laws": laws[:, :k].flatten(1),
                "past rounds": before[:, k],
                "verifier": torch.cat([ratio[:, k : k + 1], ratio[:, :1], residual], 1),
            }
            for kind, f in features.items():
                d = shapes[counted, k].flatten(1)
                sums = self.sums.setdefault((kind, K, k), Sums.empty(f.shape[1], d.shape[1]))
                sums.add(f[counted], d)

    def _classes(self) -> Float[Tensor, "V C"]:
        """Centered: a class is as often above as below 0."""
        if self.vocab_size <= SMALL:
            return torch.eye(self.vocab_size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        bits = torch.randint(2, (self.vocab_size, BITS), generator=generator)
        return bits.double() * 2 - 1

    def _before(
        self, context: Context, rows: Int[Tensor, "R"], shapes: Float[Tensor, "R K O D"]
    ) -> Float[Tensor, "R K F"]:
        """The first two polynomials of the previous round's draw at the same absolute position.

        0 where there was none.
        """
        earlier = torch.zeros_like(shapes[..., :2])
        starts = context.batch.length[rows].tolist()
        seeds = context.batch.seed[rows].tolist()
        for row, (start, seed) in enumerate(zip(starts, seeds, strict=True)):
            was, drawn = self.last.get(seed, (start, shapes[row, :0]))
            overlap = drawn[start - was : start - was + shapes.shape[1], :, :2]
            earlier[row, : len(overlap)] = overlap
            self.last[seed] = (start, shapes[row])
        return earlier.flatten(2)

    def findings(self) -> Iterator[Finding]:
        """One Finding a kind of feature, over all positions."""
        if not self.sums:
            message = (
                "the drafts are point masses (or none): nothing they could be drawn from wrongly"
            )
            yield Finding("contract", True, message)
            return
        for kind in CAUSES:
            scores = {
                (K, k): sums.scores()
                for (name, K, k), sums in self.sums.items()
                if name == kind and sums.f.numel()
            }
            yield self._finding(kind, scores)

    def _finding(self, kind: str, scores: dict[tuple[int, int], Float[Tensor, "F P"]]) -> Finding:
        name = f"contract: {kind}"
        tests = sum(z.numel() for z in scores.values())
        if not tests:
            return Finding(name, True, "one position only: nothing before it")
        threshold = critical(tests)
        worst = {k: float(z.max()) for k, z in scores.items()}
        K, k = at = max(worst, key=worst.__getitem__)
        drafts = self.sums[kind, K, k].n
        if worst[at] <= threshold:
            message = f"{tests} scores over up to {drafts} drafts"
            return Finding(name, True, message, worst[at], threshold)
        what, why = CAUSES[kind]
        message = (
            f"position {k}'s tokens {what}: {why} (score {worst[at]:.1f} over {drafts} drafts of "
            f"{K}). {CONTRACT}"
        )
        return Finding(name, False, message, worst[at], threshold)


def transforms(
    tokens: Int[Tensor, "B K"], q: Float[Tensor, "B K V"], generator: torch.Generator
) -> Float[Tensor, "B K O"]:
    """The randomized transform under three rankings of the vocabulary: id, probability, shuffled.

    Ties are one atom.
    """
    V = q.shape[-1]
    shuffled = torch.randperm(V, generator=torch.Generator().manual_seed(2)).double()
    q = q / q.sum(-1, keepdim=True)
    values = []
    for rank in (torch.arange(V).double().expand_as(q), -q, shuffled.expand_as(q)):
        own = rank.gather(-1, tokens[..., None])
        below = (q * (rank < own)).sum(-1)
        atom = (q * (rank == own)).sum(-1)
        v = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
        values.append(below + atom * v)
    return torch.stack(values, dim=-1).clamp(0, 1)


def polynomials(u: Float[Tensor, "B K O"]) -> Float[Tensor, "B K O D"]:
    """Legendre polynomials 1 to 4 on [0, 1]: uncorrelated, mean 0, variance 1, if u is uniform."""
    t = 2 * u - 1
    legendre = [t, (3 * t**2 - 1) / 2, (5 * t**3 - 3 * t) / 2, (35 * t**4 - 30 * t**2 + 3) / 8]
    return torch.stack([(2 * n + 1) ** 0.5 * p for n, p in enumerate(legendre, start=1)], dim=-1)
