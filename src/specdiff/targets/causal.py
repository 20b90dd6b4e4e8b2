"""A Hugging Face causal LM as the target."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from specdiff.models.cache import RaggedCache
from specdiff.models.loading import home
from specdiff.models.ragged import RaggedModel, lock_of
from specdiff.models.self_test import self_test
from specdiff.nn.linear import stream_weights
from specdiff.targets.base import Target
from specdiff.types import Batch, Draft, TargetInfo, TargetOutput, Verification

CHUNK = 512  # prompt positions a forward, so that a long prompt's logits and scores stay small
ATTACHED = "_specdiff_target"


@dataclass(slots=True)
class CausalCache:
    """Keys and values of every row, and the layers whose hidden states are wanted."""

    store: RaggedCache
    taps: tuple[int, ...]


class CausalTarget(Target[CausalCache]):
    """Scores drafts with `model`. The self-test runs here: a model that cannot be scored exactly is refused."""

    def __init__(self, model: PreTrainedModel, name: str = "") -> None:
        stream_weights(model)
        self.ragged = RaggedModel(model)
        self.error = self_test(self.ragged)
        self.model = model
        text = model.config.get_text_config()
        self.info = TargetInfo(
            name=name or str(model.config.name_or_path),
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            max_positions=self.ragged.max_positions,
            dtype=model.dtype,
            device=home(model),
            embedding=_table(model.get_input_embeddings(), torch.nn.Embedding),
            head=_table(model.get_output_embeddings(), torch.nn.Linear),
        )

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> CausalCache:
        return CausalCache(RaggedCache(rows, slots), tuple(taps))

    def admit(
        self,
        cache: CausalCache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        kept: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        unread = [prompt[k:-1] for prompt, k in zip(prompts, kept.tolist(), strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(
            unread, batch_first=True
        )  # padding is overwritten by later rounds
        at = (kept[:, None] + torch.arange(ids.shape[1], device=ids.device)).clamp(
            max=cache.store.slots - 1
        )
        features = [
            self.ragged.forward(cache.store, i, a, selected=rows, taps=cache.taps, last=1)[1]
            for i, a in zip(ids.split(CHUNK, dim=1), at.split(CHUNK, dim=1), strict=True)
            if i.shape[1]
        ]
        tapped = [f for f in features if f is not None]
        if not cache.taps:
            return None
        empty = ids.new_zeros(
            len(ids), 0, self.info.hidden_size * len(cache.taps), dtype=self.info.dtype
        )
        return torch.cat(tapped, dim=1) if tapped else empty

    def score(self, cache: CausalCache, batch: Batch, draft: Draft) -> TargetOutput:
        ids = torch.cat([batch.anchor[:, None], draft.tokens], dim=1)
        at = batch.length[:, None] - 1 + torch.arange(ids.shape[1], device=ids.device)
        logits, features = self.ragged.forward(
            cache.store, ids, at.clamp(max=cache.store.slots - 1), taps=cache.taps
        )
        return TargetOutput(logits, features)

    def keep(self, cache: CausalCache, batch: Batch, verification: Verification) -> None:
        return None  # a chain's accepted entries already lie at their slots

    def release(self, cache: CausalCache, rows: Int[Tensor, "R"]) -> None:
        return None  # the next request overwrites the row


@dataclass(frozen=True, slots=True)
class _Attachment:
    """A model's target, and what was true of the model when it was tested."""

    target: CausalTarget
    facts: tuple[Any, ...]


def attached(model: PreTrainedModel, name: str = "") -> CausalTarget:
    """The target of a model, self-tested once: again only where its config, attention, weights or buffers have changed since.

    It hangs on the model itself, so that the two are forgotten together; a table beside them would keep both for ever.
    """
    with lock_of(model):
        known: _Attachment | None = vars(model).get(ATTACHED)
        if known is None or known.facts != _facts(model):
            target = CausalTarget(model, name or (known.target.info.name if known else ""))
            known = vars(model)[ATTACHED] = _Attachment(target, _facts(model))
        return known.target


def _facts(model: PreTrainedModel) -> tuple[Any, ...]:
    """All that a target is made from: equal as long as it still holds."""
    attention = tuple(
        part.config._attn_implementation
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    )
    tensors = tuple(_identity(tensor) for tensor in chain(model.parameters(), model.buffers()))
    return repr(model.config.to_dict()), attention, tensors


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Which numbers a tensor holds, without reading them: where they lie, and how often they were written to."""
    plain = type(tensor) in (
        Tensor,
        torch.nn.Parameter,
    )  # a packed (quantized) tensor has no address of its own
    place = tensor.data_ptr() if plain else id(tensor)
    writes = 0 if tensor.is_inference() else tensor._version
    return place, writes, tensor.dtype, tensor.device, tuple(tensor.shape)


def _table(
    layer: torch.nn.Module | None, kind: type[torch.nn.Module]
) -> Float[Tensor, "V D"] | None:
    """The plain matrix of a layer, for drafters to borrow; None where there is a bias, or it is packed (quantised) or offloaded."""
    parts = {} if layer is None else dict(layer.named_parameters(recurse=False))
    weight = parts.get("weight")
    if not isinstance(layer, kind) or weight is None or "bias" in parts:
        return None
    plain = (
        type(weight) is torch.nn.Parameter
        and weight.is_floating_point()
        and weight.device.type != "meta"
    )
    return weight.detach() if plain else None
