"""A block drafter's config.json in specdiff's own layout."""

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

    `taps` are target layer numbers (0 is the first layer's output). `window` bounds the context:
    slots see at most that many positions before their anchor. `direct` adds a path from the last
    context feature into every slot. Raises ConfigError for sizes that do not fit together.
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
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that `from_json` reads."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self), "taps": list(self.taps)}


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
