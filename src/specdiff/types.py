"""The nouns of specdiff: requests, batches, drafts, scores, verdicts and rounds.

All are frozen dataclasses of plain tensors; only `decode` advances a Batch.

Shapes: B rows, S slots (positions a row may reach), K drafted tokens, N = K + 1 scored positions,
V target vocabulary, C columns of a draft's probabilities (V, or a draft vocabulary), D tapped
feature width, E entries of the longest row of a list, T top tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.arguments import LARGEST, bias_pairs, int64, number, token_id_tuple, whole
from specdiff.errors import UsageError
from specdiff.grammar import Grammar

PADDING = -1  # fills up lists of token ids; no token has this id
TOP_LOGPROBS = 20  # maximum top-logprobs per position


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
        columns = {
            name: torch.tensor(_column(rows, name), dtype=torch.float32) for name in _NUMBERS
        }
        # A float32 temperature below the smallest normal number is greedy. The distribution would
        # differ in ties only: float32 logits that differ at all, and are not themselves below
        # 1e-28, differ by more than 104 such temperatures, and exp(-104) is 0. Subnormal divisors
        # are slow, and 0 where a device flushes them.
        cold = columns["temperature"] < torch.finfo(torch.float32).tiny
        columns["temperature"] = columns["temperature"].masked_fill(cold, 0.0)
        biases = [dict(r.logit_bias) for r in rows]
        columns["stop_ids"] = _table([r.stop_token_ids for r in rows], PADDING)
        columns["bias_ids"] = _table([list(bias) for bias in biases], PADDING)
        columns["bias"] = _table([list(bias.values()) for bias in biases], 0.0)
        columns["allowed_ids"] = _table([r.allowed_token_ids or () for r in rows], PADDING)
        active = {name for name in (*_NUMBERS, *_OTHERS) if _in_use(rows, name)}
        if bool(cold.any()):
            active.add("greedy")
        return cls(
            top_k=torch.tensor([r.top_k for r in rows], device=device),
            limit=limit.to(device),
            active=frozenset(active),
            logprobs=max((r.logprobs for r in rows if r.logprobs is not None), default=None),
            all_greedy=bool(cold.all()),
            **{name: column.to(device) for name, column in columns.items()},
        )


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


@dataclass(frozen=True, slots=True)
class Batch:
    """The committed tokens. `ids[b, :length[b]]` never changes; what lies beyond is scratch.

    `round` counts the rounds a row has run, `seed` keys its randomness, `done` rows are computed
    but no longer advance.

    `grammars` holds those of the rows that have one. `next_mask` is for the drafter alone: the
    tokens that the grammars allow next (None: all).
    """

    ids: Int[Tensor, "B S"]
    length: Int[Tensor, "B"]
    prompt_length: Int[Tensor, "B"]
    round: Int[Tensor, "B"]
    done: Bool[Tensor, "B"]
    seed: Int[Tensor, "B"]
    params: Params
    grammars: Mapping[int, Grammar] = field(default_factory=dict)
    next_mask: Bool[Tensor, "B V"] | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        *,
        slots: int | None = None,
        device: torch.device | str = "cpu",
        grammars: Sequence[Grammar | None] = (),
    ) -> Self:
        """A fresh batch, one prompt a row. `slots` defaults to what the longest row can reach.

        `grammars`: one a row, None for none. Raises UsageError for a row with a grammar and
        allowed ids.
        """
        length = torch.tensor([len(p) for p in prompts])
        limit = length + torch.tensor([p.max_tokens for p in params])
        ids = torch.zeros(len(prompts), slots or int(limit.max()), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        length = length.to(device)
        zero = torch.zeros_like(length)
        seed = torch.tensor([int64(s) for s in seeds], dtype=torch.long, device=device)
        options = Params.stack(params, limit, device)
        by_row = {row: grammar for row, grammar in enumerate(grammars) if grammar is not None}
        for row in by_row:
            check_grammar(params[row])
        return cls(ids.to(device), length, length.clone(), zero, zero.bool(), seed, options, by_row)

    @property
    def anchor(self) -> Int[Tensor, "B"]:
        """The last committed token of each row."""
        return self.ids.gather(1, self.length[:, None] - 1)[:, 0]

    def with_rows(self, rows: Int[Tensor, "R"], joined: "Batch") -> "Batch":
        """This batch with `joined`'s rows (in order) at `rows`: how requests join it."""
        width = self.ids.shape[1]
        padding = max(0, width - joined.ids.shape[1])
        ids = torch.nn.functional.pad(joined.ids[:, :width], (0, padding))
        others = ("ids", "params", "grammars", "next_mask")
        names = [f.name for f in fields(self) if f.name not in others]
        changed = {
            name: getattr(self, name).index_copy(0, rows, getattr(joined, name)) for name in names
        }
        params = _join(self.params, rows, joined.params)
        grammars = self.grammars
        if grammars or joined.grammars:
            places = rows.tolist()
            grammars = {row: grammar for row, grammar in grammars.items() if row not in places}
            grammars |= {places[i]: grammar for i, grammar in joined.grammars.items()}
        ids = self.ids.index_copy(0, rows, ids)
        return replace(self, ids=ids, params=params, grammars=grammars, **changed)


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


def _join(params: Params, rows: Int[Tensor, "R"], joined: Params) -> Params:
    changed = {}
    for name in (f.name for f in fields(params) if f.name not in _HOST):
        old = getattr(params, name)
        new = getattr(joined, name)
        if old.dim() == 2:
            width = max(old.shape[1], new.shape[1])
            old = _padded(old, width)
            new = _padded(new, width)
        changed[name] = old.index_copy(0, rows, new)
    logprobs = [n for n in (params.logprobs, joined.logprobs) if n is not None]
    return Params(
        active=params.active | joined.active,
        logprobs=max(logprobs, default=None),
        all_greedy=params.all_greedy and joined.all_greedy,
        **changed,
    )


def _padded(table: Tensor, width: int) -> Tensor:
    fill = 0.0 if table.is_floating_point() else PADDING
    return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=fill)


@dataclass(frozen=True, slots=True)
class Draft:
    """K proposed tokens a row and the distribution each was *really drawn from*.

    `probs[b, k]` must be P(x_k | x_<k, R_k), with R_k everything that was used to compute rows
    0..k of it (the contract of docs/write-a-drafter.md); None is a point mass on each token.
    `columns` holds the target ids, ascending, whose probabilities the columns of `probs` are: every
    other id has probability 0 (None: all V ids). `size` is how many of the K count in each row
    (None: all). `parents[b, k]` makes a tree: the node each node continues, -1 for the anchor
    (None: a chain). They come before their children, and of all nodes before x_k only its ancestors
    and earlier siblings count in x_<k: siblings drawn without replacement lack each other's tokens.
    """

    tokens: Int[Tensor, "B K"]
    probs: Float[Tensor, "B K C"] | None = None
    size: Int[Tensor, "B"] | None = None
    parents: Int[Tensor, "B K"] | None = None
    columns: Int[Tensor, "C"] | None = None

    @classmethod
    def empty(cls, batch: Batch) -> Self:
        """No draft: the round is a plain one."""
        return cls(batch.ids[:, :0])

    @property
    def sizes(self) -> Int[Tensor, "B"]:
        """How many tokens count in each row: `size`, or K where it is None."""
        if self.size is not None:
            return self.size
        rows, K = self.tokens.shape
        return self.tokens.new_full((rows,), K)

    def full_probs(self, vocab_size: int) -> Float[Tensor, "B K V"] | None:
        """`probs` over all ids, 0 outside `columns`; None for point masses.

        For what is not in the loop: this is large.
        """
        if self.probs is None or self.columns is None:
            return self.probs
        full = self.probs.new_zeros(*self.tokens.shape, vocab_size)
        return full.index_copy_(-1, self.columns, self.probs)

    def token_probs(self) -> Float[Tensor, "B K"] | None:
        """The probability of each drafted token, 0 outside `columns`; None for point masses."""
        if self.probs is None:
            return None
        if self.columns is None:
            return self.probs.gather(-1, self.tokens[..., None])[..., 0]
        index = column_index(self.tokens, self.columns)
        inside = index < len(self.columns)
        at = index.clamp(max=len(self.columns) - 1)[..., None]
        return torch.where(inside, self.probs.gather(-1, at)[..., 0], 0)


def column_index(ids: Int[Tensor, "*B"], columns: Int[Tensor, "C"]) -> Int[Tensor, "*B"]:
    """The place of each id among the ascending `columns`; C for an id that is not one of them."""
    C = len(columns)
    columns = columns.contiguous()
    index = torch.searchsorted(columns, ids.contiguous())
    same = columns[index.clamp(max=C - 1)] == ids
    return torch.where(same, index, C)


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """The result of one scoring pass. Row 0 is at the anchor, row k after k draft tokens."""

    logits: Float[Tensor, "B N V"]
    features: Float[Tensor, "B N D"] | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities of the emitted tokens, and of the T most likely ones at their positions.

    They are the log-softmax of the target's raw logits, before any option of the request (vLLM's
    default): an option may emit a token that is unlikely here.
    """

    tokens: Float[Tensor, "B N"]
    top_ids: Int[Tensor, "B N T"]
    top: Float[Tensor, "B N T"]


@dataclass(frozen=True, slots=True)
class Verification:
    """`accepted` draft tokens, then one of the target's own: `tokens[b, :accepted[b] + 1]`.

    Later tokens are 0. `path[b, k]` is the scored row at which token k was judged or drawn (a
    chain: 0..K). The loop adds `logprobs` for requests with that option.
    """

    accepted: Int[Tensor, "B"]
    tokens: Int[Tensor, "B N"]
    path: Int[Tensor, "B N"]
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One round of draft, score, verify, commit. `batch` is the batch after it.

    `emitted[b]` tokens were committed: accepted + 1, fewer where a stop id or the length limit
    fell inside, 0 for done rows. `disabled` rows draft no more before their next request: the
    drafter failed in this round or an earlier one. `failed[b]` is the absolute position at which
    the target's logits are NaN or infinite and no token can be drawn: the row committed nothing
    in this round and is done. It is -1 for all other rows. `errors` says why, for rows whose
    grammar is at fault.
    """

    draft: Draft
    verification: Verification
    emitted: Int[Tensor, "B"]
    batch: Batch
    seconds: Mapping[str, float]
    disabled: Bool[Tensor, "B"]
    failed: Int[Tensor, "B"]
    errors: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """All that a drafter may see.

    `features[b, :feature_size[b]]` belong to the positions that entered the target's cache since
    the row's last propose (prompt[:-1] on admission). `previous` is valid where `batch.round > 0`.
    """

    batch: Batch
    features: Float[Tensor, "B N D"] | None
    feature_size: Int[Tensor, "B"]
    previous: Round | None


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What a drafter may know of its target.

    `embedding` and `head` [V, hidden] are None if the target has none.
    """

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor | None = None
    head: Tensor | None = None
