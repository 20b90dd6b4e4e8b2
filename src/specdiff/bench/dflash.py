"""A block drafter as the assistant of transformers' own DFlash generator.

The generator drafts whole blocks, reads the states out through the target's full head, and knows
no Markov head: with those two left aside, it runs any block drafter as it is.

Shapes: B is 1, L newly accepted positions, G slots of the generator, H width, T tapped layers.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DFlashCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.muse_glimmer_assistant import MuseGlimmerAssistantConfig

from specdiff import catalog, weights
from specdiff.errors import UnsupportedModelError
from specdiff.nn import block_formats
from specdiff.nn.block import BlockNetwork
from specdiff.nn.block_masks import layer_masks
from specdiff.types import TargetInfo


class DFlashAssistant(nn.Module):
    """What `generate(assistant_model=..., speculation_type="dflash")` calls."""

    def __init__(self, network: BlockNetwork) -> None:
        super().__init__()
        self.network = network
        # the generator never reads slot 0, so where ours predicts, it is moved on by one
        self.surplus = 1 - network.config.first_slot
        self.config = MuseGlimmerAssistantConfig(
            hidden_size=network.config.hidden_size,
            num_hidden_layers=network.config.layers,
            layer_types=["full_attention"] * network.config.layers,  # all keys stay in the cache
            block_size=network.config.block_size + self.surplus,
            mask_token_id=network.config.mask_token_id,
            target_layer_ids=list(network.config.taps),
        )

    @property
    def device(self) -> torch.device:
        return self.network.fc.weight.device

    def forward(
        self,
        noise_embeds: Float[Tensor, "B G H"],
        context_hidden_states: Float[Tensor, "B L T*H"],
        position_ids: Int[Tensor, "B L+G"],
        attention_mask: Int[Tensor, "B S"] | None,
        past_key_values: DFlashCache,
    ) -> BaseModelOutputWithPast:
        """The states of the slots; the generator reads them out from the second on.

        A `surplus` last slot is hidden from the others, and its state gives way to one in front.
        """
        context = self.network.context(context_hidden_states)
        count = noise_embeds.shape[1]
        own = noise_embeds[:, None, : count - self.surplus]
        slots = F.pad(self.network.entered(own, context[:, -1:])[:, 0], (0, 0, 0, self.surplus))
        size = past_key_values.get_seq_length() + context.shape[1] + count
        keys = torch.arange(size, device=slots.device)[None]
        queries = position_ids[:, -count:]
        visible = keys < size - self.surplus
        masks = layer_masks(
            self.network.config,
            visible[:, None, None].expand(-1, 1, count, -1),
            queries,
            queries[:, :1].expand_as(queries),
            keys,
            keys >= size - count,
        )
        states = self.network(slots, context, position_ids, masks, past_key_values)
        if self.surplus:
            states = torch.cat([states[:, -1:], states[:, :-1]], dim=1)
        return BaseModelOutputWithPast(last_hidden_state=states)


def assistant(spec: str, info: TargetInfo) -> DFlashAssistant:
    """The assistant of a block drafter's folder, hub id, or the bundled one ("block").

    Raises UnsupportedModelError if the spec is no block drafter, and what loading raises.
    """
    folder = _folder(spec, info)
    if folder is None or block_formats.form(weights.read_config(folder)) is None:
        raise UnsupportedModelError(
            f"the drafter {spec!r} is no block drafter that transformers' DFlash could run"
        )
    network = BlockNetwork.from_pretrained(folder, info.dtype)
    if info.embedding is None or info.head is None:
        raise UnsupportedModelError(f"the target {info.name!r} has no tables to borrow")
    network.borrow(info.embedding, info.head)
    return DFlashAssistant(network.to(info.device)).eval()


def _folder(spec: str, info: TargetInfo) -> Path | None:
    if spec == "block":
        configs = sorted(catalog.BUNDLED.glob(f"*/{weights.CONFIG}"))
        for folder in (path.parent for path in configs):
            config: Any = weights.read_config(folder)
            if block_formats.form(config) and info.name in config.get("targets", ()):
                return folder
        return None
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    hub_id = "/" in spec and ":" not in spec and not spec.startswith((".", "/", "~"))
    return weights.locate(spec) if hub_id else None
