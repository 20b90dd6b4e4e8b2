"""Attention masks of a block denoiser whose layers or slots see different spans.

Shapes: B rows, Q slots of this call, S attended positions.
"""

from jaxtyping import Bool, Int
from torch import Tensor

from specdiff.nn.block_config import BlockConfig


def layer_masks(
    config: BlockConfig,
    mask: Bool[Tensor, "B 1 Q S"],
    queries: Int[Tensor, "B Q"],
    anchors: Int[Tensor, "B Q"],
    keys: Int[Tensor, "B S"],
    slots: Bool[Tensor, "B S"],
) -> list[Bool[Tensor, "B 1 Q S"]]:
    """One mask per layer, each `mask` less what that layer's span excludes.

    `mask` allows the context before each slot's anchor and the slots of its block. `queries` and
    `keys` are positions, `anchors` those of each query's anchor, `slots` the keys that are slots.
    """
    query = queries[:, None, :, None]
    key = keys[:, None, None, :]
    context = ~slots[:, None, None, :]
    spans = {}
    for bounded in (False, True):
        for causal in (False, True):
            span = mask
            if bounded and config.window is not None and config.window_from == "slot":
                span = span & ((query - key).abs() <= config.window)
            elif bounded and config.window is not None:
                span = span & (~context | (key >= anchors[:, None, :, None] - config.window))
            if causal:
                span = span & (context | (key <= query))
            spans[bounded, causal] = span
    return [
        spans[layer not in config.full_layers, layer in config.causal_layers]
        for layer in range(config.layers)
    ]
