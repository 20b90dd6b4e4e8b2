"""A GGUF file's model, computed in the file's own 4 and 8 bits.

Blocks that torch has a kernel for (`gguf_blocks`) are repacked; all other tensors are expanded to
bfloat16. Nothing but the file's config, tokenizer and tensor table is cached.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdiff.errors import WeightsError
from specdiff.models import gguf
from specdiff.models.gguf_blocks import READERS
from specdiff.models.gguf_header import Place
from specdiff.models.packed import (
    Groups,
    Int4Linear,
    PackedLinear,
    SplitInt8Linear,
    packable,
)
from specdiff.weights import building, few


class Tensors:
    """The tensors of a file, by the names and in the layout of the model's parameters.

    folder: its entry of `gguf.described`.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        table = json.loads((folder / gguf.TENSORS).read_text(encoding="utf-8"))
        self.path = path
        self.architecture: str = table["architecture"]
        self.places = {name: Place(*place) for name, place in table["tensors"].items()}
        self.config: Any = AutoConfig.from_pretrained(folder)

    @property
    def packable(self) -> bool:
        """Whether any matrix can be computed as it is."""
        return any(place.kind in READERS for place in self.places.values())

    def groups(self, name: str) -> Groups | None:
        """A matrix as [outputs, inputs] in groups; None if its type is not among READERS."""
        reader = READERS.get(self.places[name].kind)
        return None if reader is None else reader(self._rows(name))

    def expanded(self, name: str) -> Tensor:
        """A tensor in float32, as [outputs, inputs] if it is a matrix."""
        from gguf import GGMLQuantizationType, dequantize

        groups = self.groups(name)
        if groups is not None:
            return groups.expanded()
        place = self.places[name]
        tensor = torch.from_numpy(
            dequantize(self._rows(name).numpy(), GGMLQuantizationType[place.kind])
        )
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor - 1
        return tensor.view(place.shape)

    def _rows(self, name: str) -> Tensor:
        """The raw bytes of each row (of a vector: of each number), in the model's order."""
        place = self.places[name]
        raw = np.fromfile(self.path, np.uint8, count=place.size, offset=place.offset)
        if len(raw) != place.size:
            raise WeightsError(f"{self.path} ends within the tensor of {name}")
        rows = torch.from_numpy(raw).view(place.shape[0], -1)
        order = self._order(name, len(rows))
        return rows if order is None else rows[order]

    def _order(self, name: str, rows: int) -> Tensor | None:
        """The order of the rows, where it is not the file's.

        llama.cpp rotates neighboring pairs in Llama models, transformers halves of a head.
        """
        layer = name.split(".")[-2]
        if self.architecture != "llama" or layer not in ("q_proj", "k_proj"):
            return None
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        return torch.arange(rows).view(heads[layer], -1, 2).transpose(1, 2).flatten()


def load_packed(path: Path, options: Mapping[str, Any]) -> tuple[PreTrainedModel, Path] | None:
    """The model of a GGUF file on the CPU, and the folder of its tokenizer.

    options: `attn_implementation`, or nothing.

    None if no tensor of the file can be computed as it is. Raises and warns as `gguf.described`
    does, and warns of matrices that are expanded.
    """
    from accelerate import init_empty_weights

    folder = gguf.described(path)
    tensors = Tensors(path, folder)
    if not tensors.packable:
        return None
    with building(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tensors.config, dtype=torch.bfloat16, **options
        )
    _warn_of_expanded(tensors, _fill(model, tensors))
    return model.eval(), folder


def _fill(model: PreTrainedModel, tensors: Tensors) -> list[str]:
    """Replace layers by packed ones, and load all other parameters.

    Returns the names of the matrices that no kernel computes as they are.
    """
    embedding: Any = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = {"lm_head.weight": f"{names[embedding]}.weight"}
    expanded = []
    for module, name in names.items():
        if type(module) not in (nn.Linear, Conv1D):
            continue
        weight = f"{name}.weight"
        weight = weight if weight in tensors.places else tied[weight]
        layer = _layer(module, weight, tensors) if packable(module) else None
        if layer is None:
            expanded.append(weight)
        else:
            model.set_submodule(name, layer)
    for name, _ in [*model.named_parameters()]:
        stem, _, leaf = name.rpartition(".")
        module = model.get_submodule(stem)
        tensor = tensors.expanded(name)
        if type(module) is Conv1D and leaf == "weight":
            tensor = tensor.t().contiguous()
        setattr(module, leaf, nn.Parameter(tensor.bfloat16(), requires_grad=False))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.is_meta:
        head.weight = embedding.weight
    return expanded


def _layer(module: nn.Module, weight: str, tensors: Tensors) -> PackedLinear | None:
    """The packed layer of a parameter; None if there is no kernel for its type."""
    groups = tensors.groups(weight)
    if groups is None:
        return None
    bias = None
    if getattr(module, "bias", None) is not None:
        bias = tensors.expanded(weight.removesuffix("weight") + "bias")
    wide = tensors.places[weight].kind == "Q8_0"
    return SplitInt8Linear(groups, bias) if wide else Int4Linear(groups, bias)


def _warn_of_expanded(tensors: Tensors, names: list[str]) -> None:
    if not names:
        return
    kinds = sorted({tensors.places[name].kind for name in names})
    warnings.warn(
        f"{tensors.path}: {few(names)} are expanded to bfloat16, as no kernel computes "
        f"{', '.join(kinds)} as it is",
        stacklevel=4,
    )
