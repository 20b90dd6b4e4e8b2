"""Linear layers for few rows and a big weight, as in decoding: up to twice as fast on a CPU.

`F.linear` computes x W^T. For two to a dozen rows its float32 CPU kernel runs far from memory
bandwidth; W x^T streams the weight once. The results agree up to rounding.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# where it wins: one row has a matrix-vector kernel, and many rows are bound by arithmetic
FEWEST, MOST = 2, 16


def linear(
    x: Float[Tensor, "*rows I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "*rows O"]:
    """`F.linear`, by the faster order of operands."""
    rows = x.numel() // x.shape[-1]
    if x.requires_grad:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    # compared, as a graph traced for any number of rows in between does not test each of them
    if not FEWEST <= rows <= MOST or x.device.type != "cpu" or x.dtype != torch.float32:
        # two dimensions: a view of three, like a pass's last rows, would copy the weight
        return F.linear(flat, weight, bias).view(*x.shape[:-1], -1)
    if bias is None:
        out = torch.mm(weight, flat.t())
    else:
        out = torch.addmm(bias[:, None], weight, flat.t())
    return out.t().contiguous().view(*x.shape[:-1], -1)


def stream_weights(model: nn.Module) -> None:
    """Make every float32 CPU `nn.Linear` of `model` compute this way; its weights are untouched."""
    for module in model.modules():
        # accelerate loads offloaded weights in such a forward of its own
        hooked = "forward" in vars(module)
        if (
            type(module) is nn.Linear
            and not hooked
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ):
            vars(module)["forward"] = MethodType(_forward, module)


def _forward(self: nn.Linear, input: Tensor) -> Tensor:  # `input` is nn.Linear's own name for it
    return linear(input, self.weight, self.bias)
