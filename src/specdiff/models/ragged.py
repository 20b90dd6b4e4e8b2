"""An unmodified Hugging Face causal LM over the ragged static cache.

It gets explicit position ids and 4-D masks.

Shapes: R rows of one forward, N positions of it, V vocabulary.
"""

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from specdiff.models.cache import RaggedCache
from specdiff.models.masks import ATTENTION, grouped_attention, masks_for
from specdiff.models.refusals import refuse

AttentionInterface.register(ATTENTION, grouped_attention)
# the user's own padded batches still need their mask
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

LOCK = "_specdiff_lock"


class ModelLock:
    """A lock stored on a model object, held while a forward changes it. A copy has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelLock":
        return ModelLock()

    def __reduce__(self) -> tuple[type["ModelLock"], tuple[()]]:
        return ModelLock, ()


def lock_of(model: PreTrainedModel) -> ModelLock:
    """The one lock of a model object, shared by its targets and threads."""
    lock: ModelLock = vars(model).setdefault(LOCK, ModelLock())
    return lock


class _Layer(CacheLayerMixin):
    """What transformers asks about a layer of the ragged cache: every layer answers the same."""

    is_sliding = False

    def __init__(self, store: RaggedCache) -> None:
        super().__init__()
        self.store = store
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("the cache itself stores keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.bound, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.store.slots


class View(Cache):
    """The ragged cache in the shape transformers expects."""

    def __init__(self, store: RaggedCache, layers: int) -> None:
        super().__init__(layers=[_Layer(store)] * layers)
        self.store = store

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return self.store.update(key_states, value_states, layer_idx)


@dataclass(frozen=True, slots=True)
class Forward:
    """The arguments of one forward.

    last: logits for that many final positions (0: for all).
    related: of a tree, which tokens each attends to.
    """

    ids: Int[Tensor, "R N"]
    at: Int[Tensor, "R N"]
    positions: Int[Tensor, "R N"]
    taps: tuple[int, ...]
    last: int
    related: Bool[Tensor, "#R N N"] | None = None


class Runner(ABC):
    """Another way to compute a model's forwards, with the same results up to rounding."""

    @abstractmethod
    def run(
        self, cache: RaggedCache, forward: Forward
    ) -> tuple[Float[Tensor, "R N V"], list[Float[Tensor, "R N D"]]]:
        """What `RaggedModel.eager` returns. The model's lock is held."""

    @abstractmethod
    def refresh(self) -> None:
        """Follow changes of the model; called when a cache is opened."""


class RaggedModel:
    """forward(cache, ids, at) -> logits, and the hidden states of `taps`.

    Several threads may call it, each with its own caches: forwards of one model object take turns,
    and the model keeps no state of a stream between them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse(model.config)
        self.model = model.eval()
        self.masks = masks_for(model)
        self.lock = lock_of(model)
        self.runner: Runner | None = None  # None: eager
        if getattr(model.config, "_attn_implementation", None) == "sdpa":
            model.set_attn_implementation(ATTENTION)
        text = model.config.get_text_config()
        self.layers: int = text.num_hidden_layers
        self.max_positions = int(getattr(text, "max_position_embeddings", 1 << 30))
        # not every family can omit logits
        self.trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def forward(
        self,
        cache: RaggedCache,
        ids: Int[Tensor, "R N"],
        at: Int[Tensor, "R N"],
        *,
        selected: Int[Tensor, "R"] | None = None,
        taps: Sequence[int] = (),
        last: int = 0,
        positions: Int[Tensor, "R N"] | None = None,
        related: Bool[Tensor, "#R N N"] | None = None,
    ) -> tuple[Float[Tensor, "R N V"], Float[Tensor, "R N D"] | None]:
        """Score `ids` at slots `at`, writing their keys and values.

        Args:
            last: logits for that many final positions only (0: for all).
            positions: the position ids; by default the slots, in a tree the depths.
            related: of a tree, which of `ids` each attends to: itself and its ancestors, the first
                one among them. None: a chain.
        """
        cache.place(at, selected)
        if positions is None:
            positions = at if related is None else at[:, :1] + related.sum(-1) - 1
            # only tokens that no row may reach lie beyond the last position
            positions = positions.clamp(max=self.max_positions - 1)
        forward = Forward(ids, at, positions, tuple(taps), last, related)
        run = self.eager if self.runner is None else self.runner.run
        with self.lock:
            logits, states = run(cache, forward)
        # a model's layers may lie on several devices; the results go to that of the tokens
        logits = logits[:, -last:].to(ids.device)
        if not taps:
            return logits, None
        return logits, torch.cat([state.to(ids.device) for state in states], dim=-1)

    def eager(
        self, cache: RaggedCache, forward: Forward
    ) -> tuple[Float[Tensor, "R N V"], list[Float[Tensor, "R N D"]]]:
        """The model's own forward: logits, and the hidden states of each tap. Hold the lock."""
        trim = {"logits_to_keep": forward.last} if forward.last and self.trims else {}
        dtype = self.model.dtype
        with self.masks.applied(forward.at, cache.bound, dtype, forward.related) as mask:
            out = self.model(
                forward.ids,
                position_ids=forward.positions,
                attention_mask=mask,
                past_key_values=View(cache, self.layers),
                use_cache=True,
                # the others are not held; an empty list would still install transformers' hooks
                output_hidden_states=[tap + 1 for tap in forward.taps] or False,
                **trim,
            )
        return out.logits, [out.hidden_states[tap + 1] for tap in forward.taps]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The model with its original attention, for comparison; hold the lock meanwhile."""
        replaced = self.model.config._attn_implementation == ATTENTION
        if replaced:
            self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            if replaced:
                self.model.set_attn_implementation(ATTENTION)
