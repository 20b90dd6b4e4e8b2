"""Packed weights: linear layers of 4 or 8 bits a weight, computed as such by torch's CPU kernels.

torch's int4 kernel multiplies bfloat16 rows by weights in groups of 32 inputs,
w = (q - 8) scale + zero. That is the layout of GGUF's Q4_0, Q4_1 and Q4_K blocks, so these are
repacked, not rounded again; Q8_0 is two such layers, as an 8-bit number is 16 times its upper half
plus its lower half. What differs from the expanded weights is that scales and zeros are stored in
bfloat16 (2^-9 relative, the rounding of bfloat16 itself).

Shapes: O outputs, I inputs, G = I / 32 groups of a row, R rows of one product.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeGuard

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdiff.errors import UnsupportedModelError

FORMS = ("int8", "int4")  # that the weights of any model can be rounded to
GROUP = 32
OUTPUTS = 16  # the int4 kernel's outputs come in multiples of it
INNER_TILES = 2  # an argument that the CPU kernel ignores
LARGE = 1 << 16  # entries of a drafter's matrix that is worth packing
FEWEST = 32  # outputs; a router or a gate has fewer, is small, and suffers most from rounding


class Groups(NamedTuple):
    """Weights in groups of 32: w[o, 32 g + i] = scale[o, g] q[o, 32 g + i] + minimum[o, g]."""

    q: UInt8[Tensor, "O I"]
    scale: Float[Tensor, "O G"]
    minimum: Float[Tensor, "O G"]

    @classmethod
    def rounded(cls, weight: Float[Tensor, "O I"]) -> Self:
        """A matrix rounded to 4 bits: each group's range is divided into 15 steps."""
        grouped = weight.float().reshape(len(weight), -1, GROUP)
        low = grouped.amin(-1)
        step = ((grouped.amax(-1) - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        q = ((grouped - low[..., None]) / step[..., None]).round().clamp(0, 15)
        return cls(q.flatten(1).to(torch.uint8), step, low)

    def expanded(self) -> Float[Tensor, "O I"]:
        """The weights in float32."""
        grouped = self.q.view(len(self.q), -1, GROUP).float()
        return grouped.mul_(self.scale[..., None]).add_(self.minimum[..., None]).flatten(1)


class PackedLinear(nn.Module):
    """y = x W^T + b with packed W: computed in bfloat16, returned in the dtype of x.

    Inference only. The numbers stay as they are under `to(dtype)`. Raises UnsupportedModelError if
    moved off the CPU.
    """

    format: str
    bias: Tensor | None

    def __init__(self, outputs: int, inputs: int, bias: Float[Tensor, "O"] | None) -> None:
        super().__init__()
        self.out_features = outputs
        self.in_features = inputs
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    @abstractmethod
    def product(self, rows: Float[Tensor, "R I"]) -> Float[Tensor, "R O"]:
        """rows W^T, in bfloat16."""

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        out = self.product(x.reshape(-1, self.in_features).bfloat16().contiguous())
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    @torch.inference_mode()
    def expanded(self) -> Float[Tensor, "O I"]:
        """The weights in bfloat16: the layer's products with unit vectors."""
        units = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self.product(units).t().contiguous()

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        numbers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, number in numbers.items():
            changed = self._buffers[name]
            if changed is None or number is None:
                continue
            if changed.device.type not in ("cpu", "meta"):
                raise UnsupportedModelError(
                    f"weights packed for a CPU cannot be moved to {changed.device}; "
                    f"load the model there, with quantize='none'"
                )
            self._buffers[name] = changed if changed.dtype == number.dtype else number
        return self


class Int4Linear(PackedLinear):
    """Weights of 4 bits in groups of 32."""

    format = "int4"
    packed: Tensor
    scales: Tensor

    def __init__(self, groups: Groups, bias: Float[Tensor, "O"] | None = None) -> None:
        outputs, inputs = groups.q.shape
        super().__init__(outputs, inputs, bias)
        self.padding = -self.out_features % OUTPUTS
        q, scale, minimum = (pad(part, (0, 0, 0, self.padding)) for part in groups)
        zero = minimum.float() + 8 * scale.float()  # the kernel counts q from 8
        scales = torch.stack([scale, zero], dim=-1).bfloat16().transpose(0, 1).contiguous()
        self.register_buffer(
            "packed", torch._convert_weight_to_int4pack_for_cpu(q.int(), INNER_TILES)
        )
        self.register_buffer("scales", scales)

    def product(self, rows: Float[Tensor, "R I"]) -> Float[Tensor, "R O"]:
        out = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        return out[:, : self.out_features].contiguous() if self.padding else out


class SplitInt8Linear(PackedLinear):
    """Weights of 8 bits in groups of 32, as two of 4 bits: scale (16 upper + lower) + minimum."""

    format = "int8 in groups"

    def __init__(self, groups: Groups, bias: Float[Tensor, "O"] | None = None) -> None:
        outputs, inputs = groups.q.shape
        super().__init__(outputs, inputs, bias)
        scale = groups.scale.bfloat16().float()
        # 128 is the middle of 0..255: for a symmetric format, nothing of the minimum is left
        remainder = groups.minimum.float() + 128 * groups.scale.float()
        self.upper = Int4Linear(Groups(groups.q >> 4, 16 * scale, -128 * scale))
        self.lower = Int4Linear(Groups(groups.q & 15, scale, remainder))

    def product(self, rows: Float[Tensor, "R I"]) -> Float[Tensor, "R O"]:
        return self.upper.product(rows) + self.lower.product(rows)


class Int8Linear(PackedLinear):
    """Weights of 8 bits with one scale an output."""

    format = "int8"
    packed: Tensor
    scales: Tensor

    def __init__(
        self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None
    ) -> None:
        """Rounds `weight` to nearest, symmetrically about 0."""
        outputs, inputs = weight.shape
        super().__init__(outputs, inputs, bias)
        exact = weight.float()
        step = (exact.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scales = step.bfloat16()
        q = (exact / scales.float()[:, None]).round().clamp(-128, 127)
        self.register_buffer("packed", q.to(torch.int8))
        self.register_buffer("scales", scales)

    def product(self, rows: Float[Tensor, "R I"]) -> Float[Tensor, "R O"]:
        return torch._weight_int8pack_mm(rows, self.packed, self.scales)


def quantize(model: PreTrainedModel, form: str) -> None:
    """Round the linear layers of a model to "int4" or "int8", in place; its head is always int8.

    Layers whose inputs are no multiple of 32, or of fewer than 32 outputs, stay as they are.

    Raises UnsupportedModelError if no layer can be rounded.
    """
    head = model.get_output_embeddings()
    packed: dict[int, PackedLinear] = {}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if not packable(module) or min(module.weight.shape) < FEWEST:
            continue
        if id(module) not in packed:
            weight, bias = matrix(module)
            int4 = form == "int4" and module is not head
            packed[id(module)] = (
                Int4Linear(Groups.rounded(weight), bias) if int4 else Int8Linear(weight, bias)
            )
        model.set_submodule(name, packed[id(module)])
    if not packed:
        raise UnsupportedModelError(
            f"this {model.config.model_type} model has no linear layer of a multiple of {GROUP} "
            f"inputs, so it cannot be computed in {form}; load it with quantize='none'"
        )


def packs_drafters(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a drafter's large matrices are packed next to a target of this device and dtype.

    A draft reads every weight for a few rows: at 8 bits each it takes half as long. A drafter's
    `probs` are those of the rounded weights, so nothing changes for the verifier.
    """
    return device.type == "cpu" and dtype == torch.bfloat16


def pack_large(network: nn.Module) -> None:
    """Round the large linear layers of a drafter's network to 8 bits, in place."""
    for name, module in [*network.named_modules()]:
        if type(module) is nn.Linear and large(module.weight):
            network.set_submodule(name, Int8Linear(*matrix(module)))


def large(weight: Float[Tensor, "O I"]) -> bool:
    """Whether a drafter's matrix is worth packing, and can be."""
    return weight.numel() >= LARGE and weight.shape[1] % GROUP == 0


def packable(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a layer is linear, of a multiple of 32 inputs."""
    return type(module) in (nn.Linear, Conv1D) and matrix(module)[0].shape[1] % GROUP == 0


def matrix(module: Any) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O"] | None]:
    """Weight and bias of a packable layer."""
    weight: Tensor = module.weight.detach()
    return weight.t() if type(module) is Conv1D else weight, module.bias


def formats(model: nn.Module) -> str:
    """The packed layers of a model by format, such as "210 int4, 1 int8"; empty for none."""
    parts = [part for part in model.modules() if isinstance(part, SplitInt8Linear)]
    halves = {half for part in parts for half in (part.upper, part.lower)}
    count = Counter(
        layer.format
        for layer in model.modules()
        if isinstance(layer, PackedLinear) and layer not in halves
    )
    return ", ".join(f"{number} {name}" for name, number in sorted(count.items()))
