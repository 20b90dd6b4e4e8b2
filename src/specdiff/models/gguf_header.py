"""GGUF metadata, compared with the model that transformers builds from the file.

transformers drops metadata and tensors that it has no place for, and takes a config class's
defaults for keys that it does not read. So every key of the file's architecture must either agree
with the finished config or be known not to matter, and every tensor must have a parameter. Names
are llama.cpp's.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from specdiff.errors import UnsupportedModelError, WeightsError
from specdiff.weights import few

# The architectures whose models the tests rebuild bit for bit.
ARCHITECTURES = ("gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3")
# the divisor of each rotary frequency, in models that scale them unevenly
ROPE_FREQS = "rope_freqs.weight"
REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
)
HARMLESS = ("context_length", "rope.scaling.finetuned", "tensor_data_layout")
# Gemmas whose attention scale llama.cpp derives from their depth; the file does not state it.
UNEVEN_SCALE = {("gemma2", 46), ("gemma3", 62)}


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    kind: str  # the name of its type: F32, Q4_1, ...
    shape: tuple[int, ...]  # of its numbers
    offset: int  # bytes
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """The metadata and the tensor table of a file.

    `fields` holds the keys of its architecture, without that prefix.
    """

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    places: Mapping[str, Place]  # of each tensor
    rope_freqs: tuple[float, ...]

    @classmethod
    def read(cls, path: Path, source: Path) -> Self:
        """Read `source`, which errors call `path`.

        Raises WeightsError for a part of a model or an adapter, UnsupportedModelError for an
        architecture that is not served.
        """
        from gguf import MODEL_ARCH_NAMES, GGUFReader
        from transformers.integrations.gguf import read_gguf_metadata

        # first, as GGUFReader would follow the lengths of a damaged file forever
        read_gguf_metadata(str(source))
        reader: Any = GGUFReader(source)

        def value(key: str) -> Any:
            field = reader.get_field(key)
            return None if field is None else field.contents()

        parts = int(value("split.count") or 1)
        if parts > 1:
            part = int(value("split.no") or 0) + 1
            raise WeightsError(
                f"{path} is part {part} of a model split into {parts} files; "
                "join them with llama-gguf-split --merge"
            )
        kind = value("general.type") or "model"
        if kind != "model":
            raise WeightsError(f"{path} holds no model: its general.type is {kind!r}")
        architecture = value("general.architecture")
        if architecture not in MODEL_ARCH_NAMES.values():
            raise ValueError(f"there is no GGUF architecture {architecture!r}")
        if architecture not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise UnsupportedModelError(
                f"{path}: GGUF architecture {architecture!r} is not served; served are {names}"
            )
        prefix = f"{architecture}."
        fields = {
            key.removeprefix(prefix): value(key) for key in reader.fields if key.startswith(prefix)
        }
        places = {tensor.name: _place(tensor) for tensor in reader.tensors}
        rope_freqs: tuple[float, ...] = ()
        for tensor in reader.tensors:
            if tensor.name == ROPE_FREQS:
                rope_freqs = tuple(tensor.data.tolist())
        header = cls(path, architecture, fields, places, rope_freqs)
        header._check_keys()
        return header

    def adapted(self, config: Any) -> Any:
        """transformers' config of this file, plus the rotary scaling and the length that it omits.

        Raises UnsupportedModelError naming the key that the config contradicts or does not know.
        """
        layers = self.fields["block_count"]
        if (self.architecture, layers) in UNEVEN_SCALE:
            raise UnsupportedModelError(
                f"{self.path}: a {self.architecture} of {layers} layers scales attention in a way "
                "that GGUF does not state; load its safetensors instead"
            )
        config.max_position_embeddings = self.fields["context_length"]
        implied = _implied(config)
        for key, value in {**self._defaults(implied), **self.fields}.items():
            if key in HARMLESS or self._agrees(key, value, implied.get(key)):
                continue
            problem = "that key is not understood"
            if key in implied:
                problem = f"transformers builds {implied[key]!r}"
            raise UnsupportedModelError(
                f"{self.path}: {self.architecture}.{key} is {value!r}, but {problem}; "
                "load the model's safetensors instead"
            )
        if self._scales_frequencies():
            config.rope_parameters = self._rope(config, implied)
        return config

    def tensors(self, parameters: Mapping[str, int]) -> dict[str, Place]:
        """The tensor of each of the model's parameters (name -> elements), one to one.

        Raises WeightsError naming those that do not match.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = get_tensor_name_map(arch, self.fields["block_count"])
        expected = {}
        for parameter in parameters:
            stem, _, suffix = parameter.rpartition(".")
            if stem == "lm_head" and "output.weight" not in self.places:
                continue  # the head is the embedding
            expected[parameter] = f"{names.get_name(stem) or stem}.{suffix}"
        present = set(self.places)
        if self._scales_frequencies():
            present.remove(ROPE_FREQS)
        missing = sorted({*expected.values()} - present)
        surplus = sorted(present - {*expected.values()})
        problems = [f"lacks {few(missing)}"] * bool(missing)
        problems += [f"holds {few(surplus)}, which the model has no place for"] * bool(surplus)
        if problems:
            raise WeightsError(
                f"{self.path} {' and '.join(problems)}; "
                f"it cannot be loaded as a {self.architecture} model"
            )
        for parameter, name in expected.items():
            elements = math.prod(self.places[name].shape)
            if elements != parameters[parameter]:
                raise WeightsError(
                    f"{self.path}: {name} holds {elements} numbers, "
                    f"but its metadata asks for {parameters[parameter]}"
                )
        return {parameter: self.places[name] for parameter, name in expected.items()}

    def _check_keys(self) -> None:
        """Every key that llama.cpp requires is present, and each value is one for all layers."""
        missing = [key for key in (*REQUIRED, *self._own_keys()) if key not in self.fields]
        if missing:
            raise WeightsError(
                f"{self.path} lacks the metadata key {self.architecture}.{missing[0]}"
            )
        for key, value in self.fields.items():
            if isinstance(value, list):
                raise UnsupportedModelError(
                    f"{self.path}: {self.architecture}.{key} is {value}, one value for each "
                    "layer, which is not served; load the model's safetensors instead"
                )

    def _own_keys(self) -> tuple[str, ...]:
        """Further keys without which llama.cpp refuses a file of this architecture."""
        if self.architecture == "gpt2":
            return ("attention.layer_norm_epsilon",)
        window = ("attention.sliding_window",) if self.architecture.startswith("gemma") else ()
        return ("attention.layer_norm_rms_epsilon", *window)

    def _defaults(self, implied: Mapping[str, Any]) -> dict[str, Any]:
        """llama.cpp's defaults for keys that the file lacks."""
        heads = self.fields["attention.head_count"]
        head_dim = self.fields.get("attention.key_length", self.fields["embedding_length"] // heads)
        defaults = {
            "attention.head_count_kv": heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.scale": head_dim**-0.5,
            "attention.sliding_window": 0,
        }
        if implied["rope.freq_base"] is not None:
            defaults |= {"rope.freq_base": 10000.0, "rope.dimension_count": head_dim}
            defaults |= {"rope.scaling.type": "none", "rope.scaling.factor": 1.0}
        return defaults

    def _agrees(self, key: str, value: Any, implied: Any) -> bool:
        """Whether a value of the file agrees with the finished config."""
        if key == "attention.sliding_window":
            return self._window(value) == self._window(implied)
        if isinstance(value, float) and isinstance(implied, int | float):
            return math.isclose(value, implied, rel_tol=1e-6)
        return bool(value == implied)

    def _window(self, size: Any) -> int:
        """A sliding window, or 0 for one that never cuts anything off."""
        unbounded = size is None or size >= self.fields["context_length"]
        return 0 if unbounded else int(size)

    def _scales_frequencies(self) -> bool:
        return self.architecture == "llama" and bool(self.rope_freqs)

    def _rope(self, config: Any, implied: Mapping[str, Any]) -> dict[str, Any]:
        """The scaling of Llama 3 with this file's frequencies.

        Raises UnsupportedModelError if there is none.
        """
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        theta = float(implied["rope.freq_base"])
        width = implied["rope.dimension_count"]
        scaled = copy.deepcopy(config)
        scaled.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": max(self.rope_freqs),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
        plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        divisors = torch.tensor(self.rope_freqs, dtype=torch.float64)
        if divisors.shape != plain.shape or not torch.allclose(
            frequencies.double(), plain / divisors, rtol=1e-5, atol=0
        ):
            raise UnsupportedModelError(
                f"{self.path}: the rotary scaling of {ROPE_FREQS} is not that of Llama 3; "
                "load the model's safetensors instead"
            )
        rope: dict[str, Any] = scaled.rope_parameters
        return rope


def _place(tensor: Any) -> Place:
    """A tensor of gguf's reader, whose shape begins with the fastest dimension."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return Place(tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes))


def _implied(config: Any) -> dict[str, Any]:
    """A finished config under the file's names; None for a key that it has no field for."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ropes = getattr(config, "rope_parameters", None) or {}
    rope = ropes.get("full_attention", ropes)  # where each kind of layer has its own
    rope_type = rope.get("rope_type", "default")
    rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else None
    scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim
    inner = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    return {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner,
        "vocab_size": config.vocab_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.scale": scalar**-0.5,
        "attention.causal": True,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "layer_norm_epsilon", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": ropes.get("sliding_attention", rope).get("rope_theta"),
        "rope.dimension_count": rotary,
        "rope.scaling.type": "none" if rope_type == "default" else rope_type,
        "rope.scaling.factor": rope.get("factor", 1.0),
        "rope.scaling.original_context_length": config.max_position_embeddings,
        "expert_count": 0,
        "expert_used_count": 0,
    }
