"""A SEDD checkpoint's config.json: the authors' fields and ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from specdiff import weights
from specdiff.errors import ConfigError
from specdiff.nn.block_config import layer_numbers


@dataclass(frozen=True, slots=True)
class SEDDConfig:
    """Sizes of a SEDD network, under the names of the authors' `config.json`.

    `process` is their "graph". `attention="causal-context"` lets clean context positions see only
    their past (at most `context_window` of it), so that their keys and values never change and can
    be cached; the canvas stays bidirectional. `output` names the training target: "score" (score
    entropy: its exponential is the score), or "denoiser" (cross-entropy, distillation, MDLM:
    softmax is p(x0 | x_t), and the scale is arbitrary). `time_conditioning=False` feeds sigma = 0:
    the optimal absorbing denoiser does not depend on time (Ou et al. 2024). `taps` are the target's
    layers (0 is the first) whose states after them it reads; their width is its own.
    """

    tokens: int
    hidden_size: int
    n_blocks: int
    n_heads: int
    cond_dim: int
    length: int = 1024
    dropout: float = 0.1
    scale_by_sigma: bool = True
    process: str = "absorb"
    schedule: str = "loglinear"
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    borrow_embeddings: bool = False
    draft_vocab_size: int | None = None
    attention: str = "bidirectional"
    context_window: int | None = None
    time_conditioning: bool = True
    output: str = "score"
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for a width that cannot be split into heads of an even size.

        Rotary embedding rotates pairs.
        """
        if self.hidden_size % self.n_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}"
            )
        if self.hidden_size // self.n_heads % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} over n_heads {self.n_heads} gives heads of odd "
                f"size {self.hidden_size // self.n_heads}; it must be even"
            )
        if not self.taps:
            return
        if min(self.taps) < 0:
            raise ConfigError(f"taps must be layer numbers >= 0, not {list(self.taps)}")
        cached = self.attention == "causal-context" and not self.time_conditioning
        if not (cached and self.borrow_embeddings):
            raise ConfigError(
                "taps need attention 'causal-context', time_conditioning false and "
                "borrow_embeddings true"
            )

    @property
    def mask_id(self) -> int | None:
        """The MASK token: one past the vocabulary. The uniform process has none."""
        return self.tokens if self.process == "absorb" else None

    @property
    def vocab_size(self) -> int:
        """V, the width of the log-score."""
        return self.tokens + (self.process == "absorb")

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Self:
        """Read a checkpoint's `config.json`; extra keys are ignored.

        Raises ConfigError naming a missing or bad field.
        """
        model = weights.section(data, "model", where)
        graph = weights.section(data, "graph", where)
        noise = weights.section(data, "noise", where)
        required = {
            key: weights.positive(model, key, where)
            for key in ("hidden_size", "n_blocks", "n_heads", "cond_dim")
        }
        values: dict[str, Any] = {
            "tokens": weights.positive(data, "tokens", where),
            "process": weights.choice(graph, "type", ("absorb", "uniform"), where),
            "schedule": weights.choice(noise, "type", ("loglinear", "geometric"), where),
            **required,
            **_optional(model, {"length": int, "dropout": float, "scale_by_sigma": bool}, where),
            **_optional(noise, {"sigma_min": float, "sigma_max": float}, where),
            **_optional(data, _OURS, where),
        }
        if data.get("taps") is not None:
            values["taps"] = layer_numbers(data, "taps", where)
        try:
            config = cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        weights.choice(
            {"attention": config.attention}, "attention", ("bidirectional", "causal-context"), where
        )
        weights.choice({"output": config.output}, "output", ("score", "denoiser"), where)
        if config.output == "denoiser" and config.process == "uniform":
            raise ConfigError(
                f"{where}: output is 'denoiser', but the uniform process has no MASK to denoise; "
                "it needs 'score'"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that `from_json` reads."""
        model = (
            "hidden_size",
            "n_blocks",
            "n_heads",
            "cond_dim",
            "length",
            "dropout",
            "scale_by_sigma",
        )
        noise: dict[str, Any] = {"type": self.schedule}
        if self.schedule == "geometric":
            noise |= {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return {
            "model_type": "sedd",
            "tokens": self.tokens,
            "graph": {"type": self.process},
            "noise": noise,
            "model": {key: getattr(self, key) for key in model},
            **{key: getattr(self, key) for key in _OURS},
            **({"taps": list(self.taps)} if self.taps else {}),
        }


def _optional(data: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """The keys that are present and not null, checked."""
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        if data.get(key) is None:
            continue
        if kind is int:
            values[key] = weights.positive(data, key, where)
        elif kind is float:
            values[key] = weights.number(data, key, where)
        else:
            values[key] = weights.field(data, key, kind, where)
    return values


_OURS: Mapping[str, type] = {
    "borrow_embeddings": bool,
    "draft_vocab_size": int,
    "attention": str,
    "context_window": int,
    "time_conditioning": bool,
    "output": str,
}
