"""The nouns of specdiff: requests, batches, drafts, scores, verdicts and rounds.

All are frozen dataclasses of plain tensors; only `decode` advances a Batch.

Shapes: B rows, S slots (positions a row may reach), K drafted tokens, N = K + 1 scored positions,
V target vocabulary, C columns of a draft's probabilities (V, or a draft vocabulary), D tapped
feature width, E entries of the longest row of a list, T top tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.arguments import int64
from specdiff.grammar import Grammar
from specdiff.params import PADDING as PADDING
from specdiff.params import TOP_LOGPROBS as TOP_LOGPROBS
from specdiff.params import Params as Params
from specdiff.params import SamplingParams as SamplingParams
from specdiff.params import check_grammar as check_grammar
from specdiff.params import tempered as tempered


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
        params = self.params.with_rows(rows, joined.params)
        grammars = self.grammars
        if grammars or joined.grammars:
            places = rows.tolist()
            grammars = {row: grammar for row, grammar in grammars.items() if row not in places}
            grammars |= {places[i]: grammar for i, grammar in joined.grammars.items()}
        ids = self.ids.index_copy(0, rows, ids)
        return replace(self, ids=ids, params=params, grammars=grammars, **changed)


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
    `branches`: which of the drafter's branches drafted for each row, on the host (empty: the
    first).
    """

    tokens: Int[Tensor, "B K"]
    probs: Float[Tensor, "B K C"] | None = None
    size: Int[Tensor, "B"] | None = None
    parents: Int[Tensor, "B K"] | None = None
    columns: Int[Tensor, "C"] | None = None
    branches: tuple[int, ...] = ()

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
class DraftPlan:
    """What is decided of a round's drafts before anything of them is drawn.

    `lengths`: the most tokens of a draft by each branch of the drafter (one number: by any).
    `temperature` multiplies the drafter's own (0: greedy drafts). With a `confidence`, a draft ends
    before the first position whose most likely token has a lower probability in `Draft.probs`.
    """

    lengths: tuple[int, ...]
    temperature: float = 1.0
    confidence: float = 0.0

    def length(self, branch: int) -> int:
        """The most tokens of a draft by this branch."""
        return self.lengths[branch] if len(self.lengths) > 1 else self.lengths[0]

    @property
    def longest(self) -> int:
        """The most tokens of any draft; 0: the round is a plain one."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True)
class Context:
    """All that a drafter may see.

    `features[b, :feature_size[b]]` belong to the positions that entered the target's cache since
    the row's last propose (prompt[:-1] on admission). `previous` is valid where `batch.round > 0`.
    `plan` is the round's, with a length for each of the drafter's branches; its temperature is in
    the batch's parameters already (None: `draft_len` is all that was decided).
    """

    batch: Batch
    features: Float[Tensor, "B N D"] | None
    feature_size: Int[Tensor, "B"]
    previous: Round | None
    plan: DraftPlan | None = None


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
