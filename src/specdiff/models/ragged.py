"""A Hugging Face causal LM, unmodified, over the ragged static cache: explicit position ids and 4-D masks.

Shapes: R rows of one forward, N positions of it, V vocabulary.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from specdiff.errors import (
    ConfigError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from specdiff.models import masks
from specdiff.models.cache import RaggedCache
from specdiff.models.sight import refuse, sight_of
from specdiff.weights import BUILDING, check_heads, complete

AttentionInterface.register(masks.ATTENTION, masks.grouped_attention)
AttentionMaskInterface.register(
    masks.ATTENTION, sdpa_mask
)  # the user's own padded batches still need their mask


# how a target may be loaded: keyword arguments of transformers' from_pretrained that neither run code nor change its law
OPTIONS = (
    "attn_implementation",
    "device_map",
    "max_memory",
    "offload_folder",
    "quantization_config",
)


LOCK = "_specdiff_lock"


class ModelLock:
    """A lock that hangs on a model object, for whatever changes it for the length of a forward. A copy has its own."""

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
    """The one lock of a model object, however many targets and threads it serves."""
    lock: ModelLock = vars(model).setdefault(LOCK, ModelLock())
    return lock


class _Layer(CacheLayerMixin):
    """One layer's door to the ragged cache, in the shape transformers expects."""

    is_sliding = False

    def __init__(self, store: RaggedCache, layer: int) -> None:
        super().__init__()
        self.store, self.layer = store, layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.store.update(key_states, value_states, self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.bound, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.store.slots


class RaggedModel:
    """forward(cache, ids, at) -> logits, and hidden states where asked.

    Several threads may call it, each with caches of its own: forwards of one model object take turns, and nothing of a stream
    stays on the model between them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse(model.config)
        self.model = model.eval()
        self.sight = sight_of(model)
        self.lock = lock_of(model)
        if getattr(model.config, "_attn_implementation", None) == "sdpa":
            model.set_attn_implementation(masks.ATTENTION)
        self.layers: int = model.config.get_text_config().num_hidden_layers
        self.trims = (
            "logits_to_keep" in inspect.signature(model.forward).parameters
        )  # not every family can spare logits

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
    ) -> tuple[Float[Tensor, "R N V"], Float[Tensor, "R N D"] | None]:
        """Score `ids` at slots `at`, writing their keys and values. `last`: logits for that many final positions only.

        `positions`: the position ids, where they are not the slots.
        """
        cache.place(at, selected)
        if positions is None:
            positions = at.clamp(
                max=self.max_positions - 1
            )  # beyond the last position lie only tokens no row may reach
        keep = {"logits_to_keep": last} if last and self.trims else {}
        with self.lock, self.sight.looking(at, cache.bound, self.model.dtype) as mask:
            out = self.model(
                ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=Cache(layers=[_Layer(cache, i) for i in range(self.layers)]),
                use_cache=True,
                output_hidden_states=bool(taps),
                **keep,
            )
        # a model's layers may lie on several devices; what comes of them is wanted where the tokens are
        return out.logits[:, -last:].to(ids.device), torch.cat(
            [out.hidden_states[t + 1].to(ids.device) for t in taps], dim=-1
        ) if taps else None

    @property
    def max_positions(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The model with the attention it came with, to compare with; hold the lock meanwhile."""
        ours = self.model.config._attn_implementation == masks.ATTENTION
        if ours:
            self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            if ours:
                self.model.set_attn_implementation(masks.ATTENTION)


def home(model: PreTrainedModel) -> torch.device:
    """Where a model's tokens go in, and its logits come out: the device of its embedding, however the rest is spread.

    Raises UnsupportedModelError where the embedding itself is offloaded.
    """
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":
        raise UnsupportedModelError(
            "this target's embedding is offloaded; name a device for it in model_options['device_map']"
        )
    return device


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder or hub id, safetensors only, no remote code. Errors name the file and the fix.

    `options` go to transformers' from_pretrained (see OPTIONS); with a device_map among them, `device` is not used.
    """
    chosen = checked_options(options or {})
    path = Path(folder)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(
                f"{path} holds no config.json; a target folder needs config.json, *.safetensors and a tokenizer"
            )
        if not list(path.glob("*.safetensors")):
            pickled = ", ".join(p.name for p in path.glob("*.bin"))
            why = (
                f" ({pickled} is a pickle, which can run code and is never opened: convert it to safetensors)"
                if pickled
                else ""
            )
            raise WeightsError(f"{path} holds no *.safetensors{why}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ConfigError(f"{path / 'config.json'}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError, ArithmeticError) as error:
        if path.is_dir():
            raise ConfigError(
                f"{path / 'config.json'} describes no model that can be built: {_first_line(error)}"
            ) from error
        raise UnknownNameError(
            f"cannot load the model {str(folder)!r}: {_first_line(error)}"
        ) from error
    refuse(config)
    check_heads(config, str(path / "config.json"))
    if getattr(config, "auto_map", None):
        raise UnsupportedModelError(
            f"{folder}: config.json asks for its own code (auto_map), which is never run"
        )
    try:
        with BUILDING:
            made: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **chosen,
            )
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        raise WeightsError(
            f"cannot load the weights of {str(folder)!r}: {_first_line(error)}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        files = ", ".join(p.name for p in sorted(path.glob("*.safetensors")))
        raise WeightsError(
            f"{folder}: {files or 'a *.safetensors'} cannot be read (truncated or damaged?): {error}"
        ) from error
    model, report = made
    complete(folder, report)
    placed = "device_map" in chosen or getattr(model, "is_quantized", False)
    loaded: PreTrainedModel = model if placed else model.to(device)
    return loaded


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What may be said about how a target is loaded. Raises UsageError naming the rest.

    A quantised target is placed by its device_map alone: not every format can be moved afterwards.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UsageError(f"unknown model option {unknown[0]!r}; known are {', '.join(OPTIONS)}")
    return {name: value for name, value in options.items() if value is not None}


def _first_line(error: Exception) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
