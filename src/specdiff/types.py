"""The nouns every room speaks: what is asked for, what is drafted, scored, verified, and what came of a round.

Shapes: B rows, S slots (positions a row may reach), K drafted tokens, N = K + 1 scored positions, V target vocabulary,
D tapped feature width, E entries of the longest row of a list, T top tokens. All are plain tensors in frozen dataclasses; only
`decode` advances a Batch.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.arguments import brief, number, token_ids, whole
from specdiff.errors import UsageError

PADDING = -1  # fills up lists of token ids; no token has this id
TOP_LOGPROBS = 20  # most alternatives told of a position
BIASES = 300  # most entries of a logit bias
LARGEST = 2**63 - 1  # that a tensor of whole numbers holds


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks for. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off, and so are penalties of 1, 0 and 0.

    Applied in this order (vLLM's; transformers' for what it has): allowed ids, bias, repetition, frequency and presence penalty
    (see penalties.py), temperature, top-k, top-p, min-p. `logit_bias` holds (token id, value) pairs. `logprobs` asks for the log
    probability of each token and of so many of the likeliest ones beside it, before any of that. Raises UsageError naming the bad value.
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
        for name in ("max_tokens", "top_k"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        for name in _NUMBERS:
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if self.allowed_token_ids is not None:
            object.__setattr__(
                self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids)
            )
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", whole("logprobs", self.logprobs))
        _demand(self, "max_tokens", 1 <= self.max_tokens <= LARGEST, "at least 1")
        _demand(
            self,
            "temperature",
            0 <= self.temperature < math.inf,
            "a finite number >= 0 (0 is greedy)",
        )
        _demand(self, "top_k", 0 <= self.top_k <= LARGEST, ">= 0 (0 is off)")
        _demand(self, "top_p", 0 < self.top_p <= 1, "in (0, 1] (1 is off)")
        _demand(self, "min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 is off)")
        _demand(
            self,
            "repetition_penalty",
            0 < self.repetition_penalty < math.inf,
            "a finite number > 0 (1 is off)",
        )
        _demand(self, "presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2] (0 is off)")
        _demand(
            self, "frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2] (0 is off)"
        )
        allowed = self.allowed_token_ids
        _demand(
            self,
            "allowed_token_ids",
            allowed is None or len(allowed) > 0,
            "one token id >= 0 at least",
        )
        wanted = self.logprobs
        _demand(
            self,
            "logprobs",
            wanted is None or 0 <= wanted <= TOP_LOGPROBS,
            f"in [0, {TOP_LOGPROBS}], or None (off)",
        )


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = token_ids(name, sorted(value) if isinstance(value, Set) else value)
    if ids and min(ids) < 0:
        raise UsageError(f"{name} must be token ids >= 0, not {brief(value)}")
    if ids and max(ids) > LARGEST:
        raise UsageError(f"{name} must be token ids below 2**63, not {brief(value)}")
    return tuple(ids)


def _pairs(value: Any) -> tuple[tuple[int, float], ...]:
    """The entries of a logit bias, given as pairs or as a mapping."""
    if not isinstance(value, (Mapping, Sequence)) or isinstance(value, str):
        raise UsageError(f"logit_bias must be a mapping or a list of pairs, not {brief(value)}")
    entries = list(value.items() if isinstance(value, Mapping) else value)
    if len(entries) > BIASES:
        raise UsageError(f"logit_bias may hold at most {BIASES} entries, not {len(entries)}")
    pairs: dict[int, float] = {}
    for entry in entries:
        if not isinstance(entry, Sequence) or len(entry) != 2:
            raise UsageError(
                f"logit_bias must hold pairs of token id and value, not {brief(entry)}"
            )
        token, bias = entry
        key = (
            int(token)
            if isinstance(token, str) and token.isdecimal()
            else whole("each token id of logit_bias", token)
        )
        amount = number(f"the logit_bias of token {key}", bias)
        if not (0 <= key <= LARGEST and -100 <= amount <= 100):
            raise UsageError(
                f"logit_bias must map token ids >= 0 to numbers in [-100, 100], not {key!r} to {amount!r}"
            )
        if key in pairs:
            raise UsageError(f"logit_bias names token {key} twice")
        pairs[key] = amount
    return tuple(pairs.items())


def _demand(owner: object, name: str, met: bool, allowed: str) -> None:
    if not met:  # NaN meets no comparison, so it ends here too
        raise UsageError(f"{name} must be {allowed}, not {getattr(owner, name)!r}")


@dataclass(frozen=True, slots=True)
class Params:
    """SamplingParams of a whole batch, one entry a row, with each row's length limit; lists are filled up with PADDING (bias: 0).

    `active` names the options some row really uses, `logprobs` the most alternatives any row wants told: known on the host, so
    that unused options cost neither work nor a sync.
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

    @classmethod
    def stack(
        cls,
        rows: Sequence[SamplingParams],
        limit: Int[Tensor, "B"],
        device: torch.device | str = "cpu",
    ) -> Self:
        """One row per request; `limit` is the length (prompt included) at which it must end."""
        off = SamplingParams()
        numbers = {
            name: torch.tensor([getattr(r, name) for r in rows], dtype=torch.float32)
            for name in _NUMBERS
        }
        # A float32 temperature below the smallest normal number is greedy. The law would be the same but for ties: logits of
        # float32 that differ at all, and are not themselves below 1e-28, differ by more than 104 such temperatures, and exp(-104)
        # is 0. Subnormal divisors are slow, and 0 where a device flushes them.
        cold = numbers["temperature"] < torch.finfo(torch.float32).tiny
        numbers["temperature"] = numbers["temperature"].masked_fill(cold, 0.0)
        used = {"greedy": bool(cold.any())}
        used |= {
            name: any(getattr(r, name) != getattr(off, name) for r in rows)
            for name in (*_NUMBERS, *_OTHERS)
        }
        lists = {
            "stop_ids": _table([r.stop_token_ids for r in rows], PADDING),
            "bias_ids": _table([[token for token, _ in r.logit_bias] for r in rows], PADDING),
            "bias": _table([[bias for _, bias in r.logit_bias] for r in rows], 0.0),
            "allowed_ids": _table([r.allowed_token_ids or () for r in rows], PADDING),
        }
        return cls(
            top_k=torch.tensor([r.top_k for r in rows], device=device),
            limit=limit.to(device),
            active=frozenset(name for name, on in used.items() if on),
            logprobs=max((r.logprobs for r in rows if r.logprobs is not None), default=None),
            **{name: value.to(device) for name, value in (numbers | lists).items()},
        )


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_OTHERS = ("top_k", "logit_bias", "allowed_token_ids")


def _table(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """[B, E], as wide as the longest row."""
    width = max((len(row) for row in rows), default=0)
    full = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(full, dtype=torch.long if isinstance(fill, int) else torch.float32).view(
        len(rows), width
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """The committed tokens. `ids[b, :length[b]]` never changes; what lies beyond is scratch.

    `round` counts the rounds a row has run, `seed` keys its randomness, `done` rows are computed but no longer advance.
    """

    ids: Int[Tensor, "B S"]
    length: Int[Tensor, "B"]
    prompt_length: Int[Tensor, "B"]
    round: Int[Tensor, "B"]
    done: Bool[Tensor, "B"]
    seed: Int[Tensor, "B"]
    params: Params

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        *,
        slots: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A fresh batch, one prompt a row. `slots` defaults to what the longest row can reach."""
        length = torch.tensor([len(p) for p in prompts])
        limit = length + torch.tensor([p.max_tokens for p in params])
        ids = torch.zeros(len(prompts), slots or int(limit.max()), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        length, zero = length.to(device), torch.zeros(len(prompts), dtype=torch.long, device=device)
        signed = [s - (1 << 64) if s >= 1 << 63 else s for s in (s % (1 << 64) for s in seeds)]
        seed = torch.tensor(signed, dtype=torch.long, device=device)
        return cls(
            ids.to(device),
            length,
            length.clone(),
            zero,
            zero.bool(),
            seed,
            Params.stack(params, limit, device),
        )

    @property
    def anchor(self) -> Int[Tensor, "B"]:
        """The last committed token of each row."""
        return self.ids.gather(1, self.length[:, None] - 1)[:, 0]

    def with_rows(self, rows: Int[Tensor, "R"], joined: "Batch") -> "Batch":
        """This batch with `joined`'s rows (in order) put at `rows`: how requests join a running batch."""
        width = self.ids.shape[1]
        ids = torch.nn.functional.pad(
            joined.ids[:, :width], (0, max(0, width - joined.ids.shape[1]))
        )
        names = [f.name for f in fields(self) if f.name not in ("ids", "params")]
        changed = {
            name: getattr(self, name).index_copy(0, rows, getattr(joined, name)) for name in names
        }
        return replace(
            self,
            ids=self.ids.index_copy(0, rows, ids),
            params=_join(self.params, rows, joined.params),
            **changed,
        )


def _join(params: Params, rows: Int[Tensor, "R"], joined: Params) -> Params:
    changed = {}
    for name in (f.name for f in fields(params) if f.name not in ("active", "logprobs")):
        old, new = getattr(params, name), getattr(joined, name)
        if old.dim() == 2:
            width, fill = (
                max(old.shape[1], new.shape[1]),
                0.0 if old.is_floating_point() else PADDING,
            )
            old, new = (
                torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in (old, new)
            )
        changed[name] = old.index_copy(0, rows, new)
    wanted = [n for n in (params.logprobs, joined.logprobs) if n is not None]
    return Params(
        active=params.active | joined.active, logprobs=max(wanted, default=None), **changed
    )


@dataclass(frozen=True, slots=True)
class Draft:
    """K proposed tokens a row and the law each was *really drawn from*.

    `probs[b, k]` must be P(x_k | x_<k, R_k), with R_k everything that was used to compute rows 0..k of it (LOSSLESS: the
    contract); None is a point mass on each token. `size` is how many of the K count in each row (None: all).
    `parents[b, k]` makes a tree: the node each node continues, -1 for the anchor (None: a chain).
    """

    tokens: Int[Tensor, "B K"]
    probs: Float[Tensor, "B K V"] | None = None
    size: Int[Tensor, "B"] | None = None
    parents: Int[Tensor, "B K"] | None = None

    @classmethod
    def empty(cls, batch: Batch) -> Self:
        """No draft: the round is a plain one."""
        return cls(batch.ids[:, :0])


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What one scoring pass returns. Row 0 is at the anchor, row k after k draft tokens."""

    logits: Float[Tensor, "B N V"]
    features: Float[Tensor, "B N D"] | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the emitted tokens, and of the T likeliest in their place: log-softmax of the target's own logits.

    Raw ones, before any option of the request (vLLM's default): an option may emit a token that is unlikely here.
    """

    tokens: Float[Tensor, "B N"]
    top_ids: Int[Tensor, "B N T"]
    top: Float[Tensor, "B N T"]


@dataclass(frozen=True, slots=True)
class Verification:
    """`accepted` draft tokens, then one of the target's own: `tokens[b, :accepted[b] + 1]`, zeros behind.

    `path[b, k]` is the scored row at which token k was judged or drawn (a chain: 0..K). The loop adds `logprobs` where asked.
    """

    accepted: Int[Tensor, "B"]
    tokens: Int[Tensor, "B N"]
    path: Int[Tensor, "B N"]
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of draft, score, verify, commit. `batch` is as it stands afterwards.

    `emitted[b]` tokens were committed: accepted + 1, fewer where a stop id or the length limit fell inside, 0 for done rows.
    `disabled` rows draft no more before their next request, because the drafter broke in this one (in this round or before).
    `failed[b]` is the absolute position at which the target's logits are NaN or infinite, so that nothing can be drawn there: the
    row committed nothing in this round and is done. -1 where all is well.
    """

    draft: Draft
    verification: Verification
    emitted: Int[Tensor, "B"]
    batch: Batch
    seconds: Mapping[str, float]
    disabled: Bool[Tensor, "B"]
    failed: Int[Tensor, "B"]


@dataclass(frozen=True, slots=True)
class Context:
    """All that a drafter may see.

    `features[b, :feature_size[b]]` belong to the positions that entered the target's cache since the row's last propose
    (prompt[:-1] on admission). `previous` is valid where `batch.round > 0`.
    """

    batch: Batch
    features: Float[Tensor, "B N D"] | None
    feature_size: Int[Tensor, "B"]
    previous: Round | None


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What a drafter may know of its target. `embedding` and `head` [V, hidden] are None where the target has none."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor | None = None
    head: Tensor | None = None
