"""Forecasts: how fast a target writes its corpus, measured by a short trial."""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from specdiff.data.generate import CorpusSettings, about, serve, slots
from specdiff.data.sources import Source, first_prompt
from specdiff.engine import Request
from specdiff.text.lm import SpeculativeLM
from specdiff.types import SamplingParams

BATCH_SIZES = (8, 32, 64, 128, 256, 512)
TRIAL_SECONDS = 20.0  # no further batch size is tried afterwards
TRIAL_ROUNDS = 3
MIN_GAIN = 1.1  # of a larger batch, to be preferred
MAX_FAILURES = 2  # larger batches without this gain before the trial ends


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows written at a time, and generated tokens per second at that number."""

    rows: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class CorpusForecast:
    """What writing a corpus would take; `about` goes to its manifest."""

    tokens: int
    disk_bytes: int
    estimated_seconds: int
    rows_at_a_time: int
    trial_tokens_per_second: float
    about: dict[str, Any]


def forecast(
    lm: SpeculativeLM,
    source: Source,
    settings: CorpusSettings,
    *,
    tokens: int,
    rows: int | None = None,
    features: bool = False,
    layers: int = 0,
) -> CorpusForecast:
    """Time and disk space of a corpus, with `features` and the states of that many `layers`.

    `rows` and errors: as for `trial`.
    """
    result = trial(lm, source, settings, rows)
    rate = round(result.tokens_per_second, 1)
    info = lm.target.info
    token_bytes = 2 if info.vocab_size <= 1 << 16 else 4
    feature_bytes = 2 * info.hidden_size * (1 + layers) + 4 if features else 0
    return CorpusForecast(
        tokens=tokens,
        disk_bytes=tokens * (token_bytes + feature_bytes),
        estimated_seconds=round(tokens / rate),
        rows_at_a_time=result.rows,
        trial_tokens_per_second=rate,
        about=about(lm, source, settings),
    )


def trial(
    lm: SpeculativeLM, source: Source, settings: CorpusSettings, rows: int | None = None
) -> Trial:
    """The speed at `rows` rows, or at the fewest rows that more rows do not beat by a tenth.

    The fastest round counts: on a shared machine the slower ones measure other processes.

    Raises UsageError for a source without prompts, or if the target has too few positions.
    """
    room = slots(lm, source, settings)
    ids = first_prompt(source).ids
    params = SamplingParams(max(2, min(TRIAL_ROUNDS + 1, settings.max_tokens)))
    if rows is not None:
        return Trial(rows, _rate(lm, ids, params, room, rows))
    memory = _free_bytes(lm.target.info.device) / 3
    begin = time.monotonic()
    best = Trial(0, 0.0)
    failures = 0
    for size in BATCH_SIZES:
        too_large = size * room * _position_bytes(lm) > memory
        late = time.monotonic() - begin > TRIAL_SECONDS
        if best.rows and (too_large or late or failures == MAX_FAILURES):
            break
        rate = _rate(lm, ids, params, room, size)
        if rate >= MIN_GAIN * best.tokens_per_second:
            best = Trial(size, rate)
            failures = 0
        else:
            failures += 1
    return best


def _rate(
    lm: SpeculativeLM, ids: tuple[int, ...], params: SamplingParams, room: int, rows: int
) -> float:
    """Tokens per second of the fastest round but the first."""
    requests = iter([Request(ids, params, seed) for seed in range(rows)])
    rate = 0.0
    last = 0.0
    for step in serve(lm, requests, room, rows):
        tokens = int(step.round.emitted.sum())  # waits for the device, so it precedes the clock
        now = time.perf_counter()
        if last:
            rate = max(rate, tokens / (now - last))
        last = now
    return rate


def _position_bytes(lm: SpeculativeLM) -> int:
    """Bytes of keys and values per position and row."""
    info = lm.target.info
    config = getattr(getattr(lm.target, "model", None), "config", None)
    text = config.get_text_config() if config is not None else None
    heads = getattr(text, "num_attention_heads", None) or 1
    share = (getattr(text, "num_key_value_heads", None) or heads) / heads
    return int(2 * info.layers * info.hidden_size * share * info.dtype.itemsize)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30
