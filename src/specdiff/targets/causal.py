"""A Hugging Face causal LM as the target."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from specdiff.compiled.background import start
from specdiff.compiled.compilation import Compilation
from specdiff.compiled.graphs import Graphs
from specdiff.models.cache import RaggedCache
from specdiff.models.loading import home
from specdiff.models.packed import PackedLinear
from specdiff.models.ragged import RaggedModel, lock_of
from specdiff.models.self_test import self_test, tree_test
from specdiff.nn.linear import stream_weights
from specdiff.targets.base import Target
from specdiff.tree import related
from specdiff.types import Batch, Draft, TargetInfo, TargetOutput, Verification

CHUNK = 512  # prompt positions a forward, so that a long prompt's logits and scores stay small
ATTACHED = "_specdiff_target"


@dataclass(slots=True)
class CausalCache:
    """Keys and values of every row, and the layers whose hidden states are returned.

    `tree`: the last scored draft was one, so that its accepted path lies scattered.
    """

    store: RaggedCache
    taps: tuple[int, ...]
    tree: bool = False


class CausalTarget(Target[CausalCache]):
    """Scores drafts with `model`.

    The self-test runs here: a model that cannot be scored exactly is refused. That of trees runs
    before the first one is scored.
    """

    trees = True

    def __init__(self, model: PreTrainedModel, name: str = "") -> None:
        stream_weights(model)
        self.ragged = RaggedModel(model)
        self.error = self_test(self.ragged)
        self.tree_error: float | None = None  # of the test of trees, once it has run
        self.model = model
        self.compilation: Compilation | Graphs | None = None
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
            head=_head(model),
        )

    @cached_property
    def position_bytes(self) -> int:
        store = RaggedCache(1, 2)  # a compiled layer attends to two slots at least
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.info.device)
        self.ragged.forward(store, zero, zero)
        return store.nbytes // store.width

    def compile(self, mode: bool | str = True) -> Compilation | Graphs | None:
        """Compile the model's layers: see `specdiff.compiled.background.start` for `mode`."""
        self.compilation = start(self.ragged, mode)
        return self.compilation

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> CausalCache:
        if self.ragged.runner is not None:
            self.ragged.runner.refresh()
        return CausalCache(RaggedCache(rows, slots), tuple(taps))

    def admit(
        self,
        cache: CausalCache,
        rows: Int[Tensor, "R"],
        prompts: Sequence[Int[Tensor, "L"]],
        prefix_lengths: Int[Tensor, "R"],
    ) -> Float[Tensor, "R N D"] | None:
        starts = prefix_lengths.tolist()
        suffixes = [prompt[k:-1] for prompt, k in zip(prompts, starts, strict=True)]
        # padding is overwritten by later rounds
        ids = torch.nn.utils.rnn.pad_sequence(suffixes, batch_first=True)
        at = prefix_lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        at = at.clamp(max=max(map(len, prompts)) - 1)
        size = self.info.hidden_size * len(cache.taps)
        features = [ids.new_zeros(len(ids), 0, size, dtype=self.info.dtype)]
        for i, a in zip(ids.split(CHUNK, dim=1), at.split(CHUNK, dim=1), strict=True):
            if not i.shape[1]:
                continue
            _, part = self.ragged.forward(cache.store, i, a, selected=rows, taps=cache.taps, last=1)
            if part is not None:
                features.append(part)
        return torch.cat(features, dim=1) if cache.taps else None

    def score(self, cache: CausalCache, batch: Batch, draft: Draft) -> TargetOutput:
        ids = torch.cat([batch.anchor[:, None], draft.tokens], dim=1)
        at = batch.length[:, None] - 1 + torch.arange(ids.shape[1], device=ids.device)
        at = at.clamp(max=cache.store.slots - 1)
        cache.tree = draft.parents is not None
        if cache.tree and self.tree_error is None:
            self.tree_error = tree_test(self.ragged)
        nodes = related(draft) if cache.tree else None
        logits, features = self.ragged.forward(cache.store, ids, at, taps=cache.taps, related=nodes)
        return TargetOutput(logits, features)

    @torch.inference_mode()
    def keep(self, cache: CausalCache, batch: Batch, verification: Verification) -> None:
        """Move the accepted path of a tree to consecutive slots; a chain's is in place."""
        if cache.tree:
            first = batch.length[:, None] - 1
            index = torch.arange(verification.path.shape[1], device=first.device)
            slots = torch.stack([first + verification.path, first + index])
            cache.store.move(*slots.clamp(max=cache.store.slots - 1))


@dataclass(frozen=True, slots=True)
class _Attachment:
    """A model's target, and the facts about the model it was tested with."""

    target: CausalTarget
    facts: tuple[Any, ...]


def attached(model: PreTrainedModel, name: str = "") -> CausalTarget:
    """The target of a model, self-tested once.

    It is tested again only if its config, attention, weights or buffers have changed since. The
    target is an attribute of the model itself, so that the two are freed together; a table of them
    would keep both forever.
    """
    with lock_of(model):
        attachment: _Attachment | None = vars(model).get(ATTACHED)
        if attachment is None or attachment.facts != _facts(model):
            earlier = attachment.target.info.name if attachment else ""
            target = CausalTarget(model, name or earlier)
            attachment = vars(model)[ATTACHED] = _Attachment(target, _facts(model))
        return attachment.target


def _facts(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything a target depends on: equal as long as the target is still valid."""
    attention = tuple(
        part.config._attn_implementation
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    )
    tensors = tuple(_identity(tensor) for tensor in chain(model.parameters(), model.buffers()))
    return repr(model.config.to_dict()), attention, tensors


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Which numbers a tensor holds, without reading them: its address and count of writes."""
    # a packed (quantized) tensor has no address of its own
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    place = tensor.data_ptr() if plain else id(tensor)
    writes = 0 if tensor.is_inference() else tensor._version
    return place, writes, tensor.dtype, tensor.device, tuple(tensor.shape)


def _head(model: PreTrainedModel) -> Float[Tensor, "V D"] | None:
    """The output matrix; that of a packed head is the embedding it is tied to, or expanded."""
    head = model.get_output_embeddings()
    if not isinstance(head, PackedLinear):
        return _table(head, torch.nn.Linear)
    if model.config.get_text_config().tie_word_embeddings:
        return _table(model.get_input_embeddings(), torch.nn.Embedding)
    return head.expanded() if head.bias is None else None


def _table(
    layer: torch.nn.Module | None, kind: type[torch.nn.Module]
) -> Float[Tensor, "V D"] | None:
    """The plain matrix of a layer, for drafters to borrow.

    None where there is a bias, or it is packed (quantized) or offloaded.
    """
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
