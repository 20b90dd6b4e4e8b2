"""Text from the diffusion network alone: unconditional, behind a prefix, before a suffix, or between both; judged by the target.

The premise of speculating with diffusion is that such text, made in a few passes, is nearly the target's own: its perplexity
under the target says how nearly.

Shapes: N samples, L canvas positions, V vocabulary.
"""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.arguments import token_ids, whole
from specdiff.diffusion import reverse
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.errors import UsageError
from specdiff.noise import Noise, Purpose, row_seed
from specdiff.targets.base import Target
from specdiff.text.lm import Prompt, SpeculativeLM
from specdiff.types import Batch, Context, Draft, SamplingParams

CHUNK = 128  # tokens judged in one pass of the target


@dataclass(frozen=True, slots=True)
class Sample:
    """`token_ids` are the new ones; `text` is the whole, with prefix and suffix (None without a tokenizer).

    `perplexity` is the target's, of the new tokens given the prefix and the new ones before them; the suffix is hidden from
    it, and without a prefix so is the first token's chance. None where nothing is left to judge.
    """

    text: str | None
    token_ids: list[int]
    perplexity: float | None


def infill(
    lm: SpeculativeLM,
    *,
    length: int = 64,
    prefix: Prompt = "",
    suffix: Prompt = "",
    steps: int = 32,
    sampler: str = "analytic",
    count: int = 1,
    seed: int | None = None,
) -> list[Sample]:
    """`count` samples of `length` tokens from the network of `lm`'s drafter, each in `steps` (T) network passes.

    Given tokens stay by projection; the sampler starts at the time of the canvas (1 where all of it is noise).

    Raises UsageError for a drafter that is no SEDD network, a suffix it cannot see, or a canvas it has no room for.
    """
    scorer = _scorer(lm)
    length, steps, count = (
        whole(name, value)
        for name, value in (("length", length), ("steps", steps), ("count", count))
    )
    for name, value in {"length": length, "steps": steps, "count": count}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if sampler not in reverse.SAMPLERS:
        raise UsageError(f"unknown sampler {sampler!r}; known are {', '.join(reverse.SAMPLERS)}")
    before, after = (_part(lm, part) for part in (prefix, suffix))
    if after and scorer.cached:
        raise UsageError(
            "this drafter's context is causal, so it cannot see a suffix; use a bidirectional one (SEDD's or MDLM's own)"
        )
    root = secrets.randbits(63) if seed is None else whole("seed", seed)
    new = _sampled(
        scorer, before, length, after, steps, sampler, [row_seed(root, i) for i in range(count)]
    )
    judged = [perplexity(lm.target, before, row) for row in new]
    return [
        Sample(_text(lm, [*before, *row, *after]), row, p)
        for row, p in zip(new, judged, strict=True)
    ]


def _part(lm: SpeculativeLM, part: Prompt) -> list[int]:
    part = part if isinstance(part, str) else token_ids("prefix and suffix", part)
    return lm.encode(part, raw=True) if part else []


def _scorer(lm: SpeculativeLM) -> SEDDDenoiser:
    drafter = lm.drafter
    inner = (
        drafter.scorer
        if isinstance(drafter, AnyOrderDrafter)
        else drafter.denoiser
        if isinstance(drafter, DenoisingDrafter)
        else None
    )
    if not isinstance(inner, SEDDDenoiser):
        raise UsageError(
            f"only a SEDD drafter writes text of its own, and {lm.spec or type(drafter).__name__!r} is none; name one's folder"
        )
    return inner


@torch.inference_mode()
def _sampled(
    scorer: SEDDDenoiser,
    before: list[int],
    length: int,
    after: list[int],
    steps: int,
    sampler: str,
    seeds: list[int],
) -> list[list[int]]:
    """A causal context is read once, in front of the canvas; a bidirectional network has all on the canvas."""
    context, shown = (before, []) if scorer.cached else ([], before)
    row = [*shown, *[0] * length, *after]
    if scorer.longest is not None and len(row) > scorer.longest:
        raise UsageError(
            f"prefix, {length} new tokens and suffix are {len(row)}, but this drafter's canvas has {scorer.longest} positions"
        )
    batch = Batch.of(
        [context] * len(seeds), [SamplingParams(len(row))] * len(seeds), seeds, device=scorer.device
    )
    seen, noise = Context(batch, None, torch.zeros_like(batch.length), None), Noise.of(batch)
    state = scorer.open(len(seeds), len(context) + len(row) + 1)
    at = torch.arange(len(row), device=scorer.device)
    free = ((at >= len(shown)) & (at < len(shown) + length)).expand(len(seeds), -1)
    out = reverse.sample(
        lambda canvas, sigma: scorer.log_score(seen, state, canvas, sigma),
        scorer.process,
        scorer.schedule,
        torch.tensor(row, device=scorer.device).expand(len(seeds), -1),
        free,
        steps,
        lambda i: noise.uniform(Purpose.DRAFT, len(row), index=i),
        start=scorer.schedule.time_of_masked_share(length / (len(context) + len(row))),
        sampler=sampler,
    )
    return [ids.tolist() for ids in out[:, len(shown) : len(shown) + length]]


@torch.inference_mode()
def perplexity(target: Target[Any], prefix: list[int], tokens: list[int]) -> float | None:
    """exp of the mean negative log-likelihood of `tokens` given `prefix` (of all but the first without one); None if none is left.

    The target reads them as one long draft, CHUNK at a time. Raises UsageError where they are more than its positions.
    """
    ids, known = [*prefix, *tokens], max(1, len(prefix))
    if len(ids) <= known:
        return None
    if len(ids) > target.info.max_positions:
        raise UsageError(
            f"{len(ids)} tokens are more than the {target.info.max_positions} positions of the target {target.info.name!r}"
        )
    whole = torch.tensor(ids, device=target.info.device)
    cache = target.open(1, len(ids) + 1)
    row = torch.zeros(1, dtype=torch.long, device=whole.device)
    target.admit(cache, row, [whole[:known]], torch.zeros_like(row))
    nats = sum(_nats(target, cache, whole, at) for at in range(known, len(ids), CHUNK))
    return math.exp(nats / (len(ids) - known))


def _nats(target: Target[Any], cache: Any, ids: Int[Tensor, "L"], at: int) -> float:
    draft = ids[at : at + CHUNK]
    batch = Batch.of([ids[:at].tolist()], [SamplingParams(len(draft))], [0], device=ids.device)
    logits = target.score(cache, batch, Draft(draft[None])).logits[0, :-1]
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return -float(exact.log_softmax(-1).gather(-1, draft[:, None]).sum())


def _text(lm: SpeculativeLM, ids: list[int]) -> str | None:
    return None if lm.tokenizer is None else str(lm.tokenizer.decode(ids))
