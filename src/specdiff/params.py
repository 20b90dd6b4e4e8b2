"""Sampling parameters: of one request, and of a batch with one entry a row.

Shapes: B rows, R joining rows, E entries of the longest row of a list.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.arguments import LARGEST, bias_pairs, number, token_id_tuple, whole
from specdiff.errors import UsageError

PADDING = -1  # fills up lists of token ids; no token has this id
TOP_LOGPROBS = 20  # maximum top-logprobs per position
# A float32 temperature below the smallest normal number is greedy. The distribution would differ in
# ties only: float32 logits that differ at all, and are not themselves below 1e-28, differ by more
# than 104 such temperatures, and exp(-104) is 0. Subnormal divisors are slow, and 0 where a device
# flushes them.
COLD = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off, and so are a repetition penalty
    of 1 and presence and frequency penalties of 0.

    Applied in this order (vLLM's; transformers' for what it has): allowed ids, bias, repetition,
    frequency and presence penalty (see logits_processors.py), temperature, top-k, top-p, min-p.
    `logit_bias` holds (token id, value) pairs. `logprobs` N reports the log probability of each
    token and the top N alternatives, before any of these options.

    Raises UsageError naming the bad value.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Numbers of any library become Python's, lists tuples; then each is checked."""
        for name, convert in _CONVERTERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, convert(name, value))
        for name, (valid, allowed) in _RANGES.items():
            value = getattr(self, name)
            if not valid(value):  # NaN satisfies no comparison, so it ends here too
                raise UsageError(f"{name} must be {allowed}, not {value!r}", param=name)


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_OTHERS = ("top_k", "logit_bias", "allowed_token_ids")
_HOST = ("active", "logprobs", "all_greedy")  # fields of Params that are no tensors
_OPTIONAL = ("allowed_token_ids", "logprobs")
_CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": whole,
    "top_k": whole,
    **dict.fromkeys(_NUMBERS, number),
    "stop_token_ids": token_id_tuple,
    "logit_bias": bias_pairs,
    "allowed_token_ids": token_id_tuple,
    "logprobs": whole,
}
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda n: 1 <= n <= LARGEST, "at least 1"),
    "temperature": (lambda x: 0 <= x < math.inf, "a finite number >= 0 (0 is greedy)"),
    "top_k": (lambda n: 0 <= n <= LARGEST, ">= 0 (0 is off)"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1] (1 is off)"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1] (0 is off)"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a finite number > 0 (1 is off)"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "in [-2, 2] (0 is off)"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "in [-2, 2] (0 is off)"),
    "allowed_token_ids": (lambda ids: ids is None or len(ids) > 0, "one token id >= 0 at least"),
    "logprobs": (
        lambda n: n is None or 0 <= n <= TOP_LOGPROBS,
        f"in [0, {TOP_LOGPROBS}], or None (off)",
    ),
}


@dataclass(frozen=True, slots=True)
class Params:
    """SamplingParams of a whole batch, one entry a row, with each row's length limit.

    Lists are filled up with PADDING (bias: 0). `active` names the options in use by some row,
    `logprobs` is the most alternatives any row reports, `all_greedy` says that every row has
    temperature 0. They are known on the host, so unused options cost neither work nor a sync.
    """

    temperature: Float[Tensor, "B"]
    top_k: Int[Tensor, "B"]
    top_p: Float[Tensor, "B"]
    min_p: Float[Tensor, "B"]
    limit: Int[Tensor, "B"]
    repetition_penalty: Float[Tensor, "B"]
    presence_penalty: Float[Tensor, "B"]
    frequency_penalty: Float[Tensor, "B"]
    stop_ids: Int[Tensor, "B E"]
    bias_ids: Int[Tensor, "B E"]
    bias: Float[Tensor, "B E"]
    allowed_ids: Int[Tensor, "B E"]
    active: frozenset[str]
    logprobs: int | None
    all_greedy: bool

    @classmethod
    def stack(
        cls,
        rows: Sequence[SamplingParams],
        limit: Int[Tensor, "B"],
        device: torch.device | str = "cpu",
    ) -> Self:
        """One row per request; `limit` is the length (prompt included) at which it must end."""
        columns: dict[str, Any] = {
            name: torch.tensor(_column(rows, name), dtype=torch.float32) for name in _NUMBERS
        }
        cold = columns["temperature"] < COLD
        columns["temperature"] = columns["temperature"].masked_fill(cold, 0.0)
        biases = [dict(r.logit_bias) for r in rows]
        columns["stop_ids"] = _table([r.stop_token_ids for r in rows], PADDING)
        columns["bias_ids"] = _table([list(bias) for bias in biases], PADDING)
        columns["bias"] = _table([list(bias.values()) for bias in biases], 0.0)
        columns["allowed_ids"] = _table([r.allowed_token_ids or () for r in rows], PADDING)
        return cls(
            top_k=torch.tensor([r.top_k for r in rows], device=device),
            limit=limit.to(device),
            **_uses(rows),
            **{name: column.to(device) for name, column in columns.items()},
        )

    def with_rows(self, rows: Int[Tensor, "R"], joined: Self) -> Self:
        """`joined` in place of `rows`."""
        changed = {}
        for name in (f.name for f in fields(self) if f.name not in _HOST):
            old = getattr(self, name)
            new = getattr(joined, name)
            if old.dim() == 2:
                width = max(old.shape[1], new.shape[1])
                old = _padded(old, width)
                new = _padded(new, width)
            changed[name] = old.index_copy(0, rows, new)
        logprobs = [n for n in (self.logprobs, joined.logprobs) if n is not None]
        return type(self)(
            active=self.active | joined.active,
            logprobs=max(logprobs, default=None),
            all_greedy=self.all_greedy and joined.all_greedy,
            **changed,
        )

    def used_by(self, rows: Sequence[SamplingParams]) -> Self:
        """The same tensors, of which only `rows` count: all other requests have ended."""
        return replace(self, **_uses(rows))


def _uses(rows: Sequence[SamplingParams]) -> dict[str, Any]:
    """The fields of Params that the host knows."""
    active = {name for name in (*_NUMBERS, *_OTHERS) if _in_use(rows, name)}
    # on the host, whatever the default device is where a stream ends
    cold = torch.tensor(_column(rows, "temperature"), dtype=torch.float32, device="cpu") < COLD
    if bool(cold.any()):
        active.add("greedy")
    logprobs = [row.logprobs for row in rows if row.logprobs is not None]
    return {
        "active": frozenset(active),
        "logprobs": max(logprobs, default=None),
        "all_greedy": bool(cold.all()),
    }


def _column(rows: Sequence[SamplingParams], name: str) -> list[Any]:
    return [getattr(row, name) for row in rows]


def _in_use(rows: Sequence[SamplingParams], name: str) -> bool:
    off = getattr(SamplingParams(), name)
    return any(value != off for value in _column(rows, name))


def _table(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """[B, E], as wide as the longest row."""
    width = max((len(row) for row in rows), default=0)
    full = [[*row, *[fill] * (width - len(row))] for row in rows]
    dtype = torch.long if isinstance(fill, int) else torch.float32
    return torch.tensor(full, dtype=dtype).view(len(rows), width)


def _padded(table: Tensor, width: int) -> Tensor:
    fill = 0.0 if table.is_floating_point() else PADDING
    return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=fill)


def tempered(params: Params, factor: float) -> Params:
    """The parameters with the draft temperature multiplied in (0: greedy)."""
    if factor == 1.0:
        return params
    return replace(
        params,
        temperature=params.temperature * factor,
        active=params.active | {"temperature", "greedy"},
        all_greedy=params.all_greedy or factor == 0,
    )


def check_grammar(params: SamplingParams) -> None:
    """Raise UsageError for options that a request with a grammar cannot have.

    Allowed ids could leave it no token at all.
    """
    if params.allowed_token_ids is not None:
        raise UsageError(
            "allowed_token_ids cannot be combined with structured output: "
            "a position might allow no token",
            param="allowed_token_ids",
        )
