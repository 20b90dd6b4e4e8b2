"""GGUF blocks as groups of 32 weights, for the packed layers.

The layouts are those of ggml-common.h: one or two half-precision numbers in front of each block,
and two weights a byte, whose lower nibbles hold the first half of the block.

Shapes: O rows of a tensor, N bytes of a row.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from specdiff.models.packed import Groups


def _half(raw: UInt8[Tensor, "*B 2"]) -> Float[Tensor, "*B"]:
    return raw.contiguous().view(torch.float16).squeeze(-1).float()


def _nibbles(raw: UInt8[Tensor, "*B 16"]) -> UInt8[Tensor, "*B 32"]:
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _q4_0(rows: UInt8[Tensor, "O N"]) -> Groups:
    block = rows.view(len(rows), -1, 18)
    scale = _half(block[..., :2])
    return Groups(_nibbles(block[..., 2:]).flatten(1), scale, -8 * scale)


def _q4_1(rows: UInt8[Tensor, "O N"]) -> Groups:
    block = rows.view(len(rows), -1, 20)
    q = _nibbles(block[..., 4:]).flatten(1)
    return Groups(q, _half(block[..., :2]), _half(block[..., 2:4]))


def _q8_0(rows: UInt8[Tensor, "O N"]) -> Groups:
    block = rows.view(len(rows), -1, 34)
    scale = _half(block[..., :2])
    q = block[..., 2:] ^ 128  # two's complement -> counted from 0
    return Groups(q.flatten(1), scale, -128 * scale)


def _q4_k(rows: UInt8[Tensor, "O N"]) -> Groups:
    """Super-blocks of 8 groups: two half-precision factors, 6-bit scales and minima, nibbles."""
    block = rows.view(len(rows), -1, 144)
    scale = _half(block[..., :2])[..., None]
    minimum = _half(block[..., 2:4])[..., None]
    first = block[..., 4:8]
    second = block[..., 8:12]
    third = block[..., 12:16]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=-1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=-1)
    nibbles = block[..., 16:].reshape(
        *block.shape[:2], 4, 32
    )  # the lower ones are one group, the upper next
    q = torch.stack([nibbles & 15, nibbles >> 4], dim=-2)
    return Groups(q.flatten(1), (scale * scales).flatten(1), (-minimum * minima).flatten(1))


# the tensor types that are read; each is a function of a tensor's raw rows
READERS: Mapping[str, Callable[[UInt8[Tensor, "O N"]], Groups]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q8_0": _q8_0,
}
