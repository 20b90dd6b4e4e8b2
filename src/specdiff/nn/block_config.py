"""A block drafter's sizes and conventions, and its config.json in specdiff's own layout."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from specdiff import weights
from specdiff.errors import ConfigError

MODEL_TYPE = "block"


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """Sizes and conventions of a block denoiser.

    `taps` are target layer numbers (0 is the first layer's output). `direct` adds a path from the
    last context feature into every slot.

    With `sample_from_anchor` slot j predicts the token at anchor + j + 1; without it, slot j
    predicts anchor + j and slot 0 is not read out (z-lab's DFlash).

    `window` bounds the context of every layer but the `full_layers`: slots see at most that many
    positions before their anchor, or, with `window_from` "slot", before (and after) their own
    position. In `causal_layers` a slot sees no later slot.

    `own_embedding` and `own_head` say which tables the checkpoint holds itself; the others are the
    target's. The Markov head's first factor reads the previous token's embedding, or, with
    `markov_table`, is a table of its own. `confidence_head` reads "states", or "states+markov":
    the previous token's Markov vector too.

    Raises ConfigError for sizes that do not fit together.
    """

    tokens: int
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...]
    window: int | None = 256
    draft_vocab_size: int | None = None
    markov_rank: int = 0
    direct: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    sample_from_anchor: bool = True
    window_from: str = "anchor"
    full_layers: tuple[int, ...] = ()
    causal_layers: tuple[int, ...] = ()
    own_embedding: bool = False
    own_head: bool = False
    markov_table: bool = False
    confidence_head: str | None = None

    def __post_init__(self) -> None:
        if self.heads % self.key_value_heads:
            raise ConfigError(
                f"heads {self.heads} is not a multiple of key_value_heads {self.key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if not 0 <= self.mask_token_id < self.tokens:
            raise ConfigError(
                f"mask_token_id {self.mask_token_id} is not one of the {self.tokens} tokens"
            )
        if not self.taps or min(self.taps) < 0:
            raise ConfigError(f"taps must be one or more layer numbers >= 0, not {list(self.taps)}")
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.tokens:
            raise ConfigError(
                f"draft_vocab_size {self.draft_vocab_size} is larger than the vocabulary of "
                f"{self.tokens}"
            )
        for name in ("full_layers", "causal_layers"):
            beyond = [layer for layer in getattr(self, name) if not 0 <= layer < self.layers]
            if beyond:
                raise ConfigError(f"{name} holds {beyond[0]}, but layers is {self.layers}")
        if self.draft_len < 1:
            raise ConfigError("block_size 1 without sample_from_anchor leaves no slot to draft")
        if self.markov_rank == 0 and (self.markov_table or self.confidence_head == "states+markov"):
            raise ConfigError("markov_rank is 0, so there is no Markov vector to read")

    @property
    def first_slot(self) -> int:
        """The first slot that predicts a token: 0, or 1 without `sample_from_anchor`."""
        return 0 if self.sample_from_anchor else 1

    @property
    def draft_len(self) -> int:
        """Tokens that one block predicts."""
        return self.block_size - self.first_slot

    @property
    def uniform(self) -> bool:
        """Whether one mask serves every layer and slot: see `block_masks.layer_masks`."""
        bounded = self.window is not None
        return not (
            self.causal_layers
            or (bounded and self.full_layers)
            or (bounded and self.window_from == "slot")
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Self:
        """Read a `config.json`; extra keys are ignored.

        Raises ConfigError naming a missing or bad field.
        """
        weights.choice(data, "model_type", (MODEL_TYPE,), where)
        values: dict[str, Any] = {key: weights.positive(data, key, where) for key in _SIZES}
        for key in ("mask_token_id", "markov_rank"):
            values[key] = weights.field(data, key, int, where)
            if values[key] < 0:
                raise ConfigError(f"{where}: {key} must be at least 0, not {values[key]}")
        for key in ("window", "draft_vocab_size"):
            unset = data.get(key, 0) is None
            values[key] = None if unset else weights.positive(data, key, where)
        values["taps"] = layer_numbers(data, "taps", where)
        values["direct"] = weights.field(data, "direct", bool, where)
        for key in ("rope_theta", "norm_eps"):
            if key not in data:
                raise ConfigError(f"{where} lacks the key {key!r} (float)")
            values[key] = weights.number(data, key, where)
        values |= _conventions(data, where)
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that `from_json` reads."""
        values = dataclasses.asdict(self)
        lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
        return {"model_type": MODEL_TYPE, **values, **lists}


def _conventions(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that only converted checkpoints need; all are optional."""
    values: dict[str, Any] = {}
    for key in ("sample_from_anchor", "own_embedding", "own_head", "markov_table"):
        if key in data:
            values[key] = weights.field(data, key, bool, where)
    for key in ("full_layers", "causal_layers"):
        if key in data:
            values[key] = layer_numbers(data, key, where)
    for key, allowed in _CHOICES.items():
        if data.get(key) is not None:
            values[key] = weights.choice(data, key, allowed, where)
    return values


def layer_numbers(data: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """`data[key]`, a list of integers."""
    values = weights.field(data, key, list, where)
    if any(type(value) is not int for value in values):
        raise ConfigError(f"{where}: {key} must be a list of layer numbers, not {values!r}")
    return tuple(values)


_SIZES = (
    "tokens",
    "hidden_size",
    "layers",
    "heads",
    "key_value_heads",
    "head_dim",
    "intermediate_size",
    "block_size",
)
_CHOICES = {
    "window_from": ("anchor", "slot"),
    "confidence_head": ("states", "states+markov"),
}
