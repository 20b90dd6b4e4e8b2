"""Infilling: text from the diffusion network alone, between an optional prefix and suffix.

Its perplexity under the target measures how close the network's distribution is to the target's.

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
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.errors import UsageError
from specdiff.noise import Noise, Purpose, row_seed
from specdiff.targets.base import Target
from specdiff.text.lm import SpeculativeLM
from specdiff.text.prompts import Prompt
from specdiff.types import Batch, Context, Draft, SamplingParams

CHUNK = 128  # tokens scored per pass of the target


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: the new `token_ids`, and the whole `text` with prefix and suffix.

    `text` is None without a tokenizer. `perplexity` is the target's, of the new tokens given the
    prefix but not the suffix; without a prefix the first token does not count. None if no token is
    left to score.
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
    """Draw `count` samples of `length` tokens from the network of `lm`'s drafter.

    Each sample takes `steps` (T) network passes. Prefix and suffix are fixed by projection; the
    sampler starts at the time that matches the share of masked tokens (1 if all are masked).

    Raises UsageError for a drafter that is not a SEDD network, for a suffix that it cannot see, and
    for a canvas that is longer than its context.
    """
    scorer = _scorer(lm)
    length = _positive("length", length)
    steps = _positive("steps", steps)
    count = _positive("count", count)
    if sampler not in reverse.SAMPLERS:
        names = ", ".join(reverse.SAMPLERS)
        raise UsageError(f"unknown sampler {sampler!r}; known are {names}", param="sampler")
    before = _encode(lm, "prefix", prefix)
    after = _encode(lm, "suffix", suffix)
    if after and scorer.cached:
        raise UsageError(
            "this drafter's context is causal, so it cannot see a suffix; "
            "use a bidirectional one (SEDD's or MDLM's own)",
            param="suffix",
        )
    root = secrets.randbits(63) if seed is None else whole("seed", seed)
    seeds = [row_seed(root, i) for i in range(count)]
    rows = _sample_rows(scorer, before, length, after, steps, sampler, seeds)
    return [
        Sample(_text(lm, [*before, *row, *after]), row, perplexity(lm.target, before, row))
        for row in rows
    ]


def _positive(name: str, value: int) -> int:
    value = whole(name, value)
    if value < 1:
        raise UsageError(f"{name} must be at least 1, not {value}", param=name)
    return value


def _encode(lm: SpeculativeLM, name: str, part: Prompt) -> list[int]:
    part = part if isinstance(part, str) else token_ids(name, part)
    return lm.encode(part, raw=True) if part else []


def _scorer(lm: SpeculativeLM) -> SEDDDenoiser:
    """The SEDD network of `lm`'s drafter."""
    drafter = lm.drafter
    if isinstance(drafter, CascadeDrafter):
        drafter = drafter.inner
    network: object = None
    if isinstance(drafter, AnyOrderDrafter):
        network = drafter.scorer
    elif isinstance(drafter, DenoisingDrafter):
        network = drafter.denoiser
    if not isinstance(network, SEDDDenoiser):
        name = lm.spec or type(drafter).__name__
        raise UsageError(
            f"only a SEDD drafter can infill, and {name!r} is not one; give the folder of one",
            param="drafter",
        )
    return network


@torch.inference_mode()
def _sample_rows(
    scorer: SEDDDenoiser,
    before: list[int],
    length: int,
    after: list[int],
    steps: int,
    sampler: str,
    seeds: list[int],
) -> list[list[int]]:
    """The new tokens of each row.

    A causal network reads the prefix once, as context; a bidirectional one has it on the canvas.
    """
    prefix = before if scorer.cached else []
    begin = len(before) - len(prefix)
    row = [*before[len(prefix) :], *[0] * length, *after]
    if scorer.longest is not None and len(row) > scorer.longest:
        raise UsageError(
            f"prefix, {length} new tokens and suffix are {len(row)}, "
            f"but this drafter's canvas has {scorer.longest} positions",
            param="length",
        )
    count = len(seeds)
    params = SamplingParams(len(row))
    batch = Batch.of([prefix] * count, [params] * count, seeds, device=scorer.device)
    context = Context(batch, None, torch.zeros_like(batch.length), None)
    noise = Noise.of(batch)
    state = scorer.open(count, len(prefix) + len(row) + 1)
    at = torch.arange(len(row), device=scorer.device)
    free = ((at >= begin) & (at < begin + length)).expand(count, -1)
    canvas = reverse.sample(
        lambda canvas, sigma: scorer.log_score(context, state, canvas, sigma),
        scorer.process,
        scorer.schedule,
        torch.tensor(row, device=scorer.device).expand(count, -1),
        free,
        steps,
        lambda i: noise.uniform(Purpose.DRAFT, len(row), index=i),
        start=scorer.schedule.time_of_masked_share(length / (len(prefix) + len(row))),
        sampler=sampler,
    )
    return [ids.tolist() for ids in canvas[:, begin : begin + length]]


@torch.inference_mode()
def perplexity(target: Target[Any], prefix: list[int], tokens: list[int]) -> float | None:
    """exp of the mean negative log-likelihood of `tokens` given `prefix`.

    Without a prefix the first token does not count; None if no token is left. The target scores the
    tokens as one long draft, CHUNK at a time.

    Raises UsageError if there are more tokens than the target has positions.
    """
    size = len(prefix) + len(tokens)
    begin = max(1, len(prefix))
    if size <= begin:
        return None
    if size > target.info.max_positions:
        raise UsageError(
            f"{size} tokens are more than the {target.info.max_positions} positions "
            f"of the target {target.info.name!r}",
            param="length",
        )
    ids = torch.tensor([*prefix, *tokens], device=target.info.device)
    cache = target.open(1, size + 1)
    row = torch.zeros(1, dtype=torch.long, device=ids.device)
    target.admit(cache, row, [ids[:begin]], torch.zeros_like(row))
    nats = sum(_nats(target, cache, ids, at) for at in range(begin, size, CHUNK))
    return math.exp(nats / (size - begin))


def _nats(target: Target[Any], cache: Any, ids: Int[Tensor, "L"], at: int) -> float:
    draft = ids[at : at + CHUNK]
    batch = Batch.of([ids[:at].tolist()], [SamplingParams(len(draft))], [0], device=ids.device)
    logits = target.score(cache, batch, Draft(draft[None])).logits[0, :-1]
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return -float(exact.log_softmax(-1).gather(-1, draft[:, None]).sum())


def _text(lm: SpeculativeLM, ids: list[int]) -> str | None:
    return None if lm.tokenizer is None else str(lm.tokenizer.decode(ids))
