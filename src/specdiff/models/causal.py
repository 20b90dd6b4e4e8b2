"""A Hugging Face causal LM, unmodified, over the ragged static cache: explicit position ids and 4-D masks.

Shapes: R rows of one forward, N positions of it, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from specdiff.errors import ConfigError, UnknownNameError, UnsupportedModelError, WeightsError
from specdiff.models import masks
from specdiff.models.cache import RaggedCache

AttentionInterface.register(masks.ATTENTION, masks.grouped_attention)
AttentionMaskInterface.register(masks.ATTENTION, sdpa_mask)  # the user's own padded batches still need their mask

# families whose layers keep other state than keys and values at positions, or bias attention by distance on their own
REFUSED = {"bloom", "falcon_mamba", "lfm2", "mamba", "mamba2", "gpt_neo", "mpt", "recurrent_gemma", "rwkv"}


class _Layer(CacheLayerMixin):
    """One layer's door to the ragged cache, in the shape transformers expects."""

    is_sliding = False

    def __init__(self, store: RaggedCache, layer: int) -> None:
        super().__init__()
        self.store, self.layer = store, layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.store.update(key_states, value_states, self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.bound, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.store.slots


class RaggedModel:
    """forward(cache, ids, at) -> logits, and hidden states where asked."""

    def __init__(self, model: PreTrainedModel) -> None:
        _refuse(model.config)
        self.model = model.eval()
        if getattr(model.config, "_attn_implementation", None) == "sdpa":
            model.set_attn_implementation(masks.ATTENTION)
        self.layers: int = model.config.get_text_config().num_hidden_layers
        self.doors: tuple[RaggedCache, Cache] | None = None

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
    ) -> tuple[Float[Tensor, "R N V"], Float[Tensor, "R N D"] | None]:
        """Score `ids` at slots `at`, writing their keys and values. `last`: logits for that many final positions only."""
        cache.place(at, selected)
        positions = at.clamp(max=self.max_positions - 1)  # beyond the last position lie only tokens no row may reach
        mask = masks.additive(masks.causal(at, cache.bound), self.model.dtype)
        keep = {"logits_to_keep": last} if last else {}
        out = self.model(
            ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._door(cache),
            use_cache=True,
            output_hidden_states=bool(taps),
            **keep,
        )
        return out.logits, torch.cat([out.hidden_states[t + 1] for t in taps], dim=-1) if taps else None

    @property
    def max_positions(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def _door(self, cache: RaggedCache) -> Cache:
        if self.doors is None or self.doors[0] is not cache:
            self.doors = cache, Cache(layers=[_Layer(cache, i) for i in range(self.layers)])
        return self.doors[1]


def _refuse(config: PretrainedConfig) -> None:
    text = config.get_text_config()
    if config.model_type in REFUSED or getattr(text, "alibi", False):
        raise UnsupportedModelError(
            f"a {config.model_type} target cannot be scored exactly over the ragged cache; supported are models whose layers "
            f"attend to keys at explicit positions, such as gpt2, llama, qwen2 and qwen3"
        )
    window = getattr(text, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and getattr(text, "use_sliding_window", True) and window < text.max_position_embeddings:
        raise UnsupportedModelError(
            f"this {config.model_type} target attends through a sliding window of {window} positions, which the ragged cache "
            f"does not serve; use a model with full attention"
        )


def load_model(folder: Path | str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """A causal LM from a folder or hub id, safetensors only, no remote code. Errors name the file and the fix."""
    path = Path(folder)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"{path} holds no config.json; a target folder needs config.json, *.safetensors and a tokenizer")
        if not list(path.glob("*.safetensors")):
            pickled = ", ".join(p.name for p in path.glob("*.bin"))
            why = f" ({pickled} is a pickle, which can run code and is never opened: convert it to safetensors)" if pickled else ""
            raise WeightsError(f"{path} holds no *.safetensors{why}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ConfigError(f"{path / 'config.json'}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError, ArithmeticError) as error:
        raise UnknownNameError(f"cannot load the model {str(folder)!r}: {_first_line(error)}") from error
    _refuse(config)
    if getattr(config, "auto_map", None):
        raise UnsupportedModelError(f"{folder}: config.json asks for its own code (auto_map), which is never run")
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"cannot load the weights of {str(folder)!r}: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise WeightsError(f"a *.safetensors of {str(folder)!r} cannot be read (truncated or damaged?): {error}") from error
    model, report = made
    bad = sorted(report["missing_keys"]) + sorted(str(k[0]) for k in report["mismatched_keys"])
    if bad:  # transformers would have filled them with random numbers
        raise WeightsError(f"{folder}: the safetensors lack, or misshape, {', '.join(bad[:3])}; does config.json describe another model?")
    loaded: PreTrainedModel = model.to(device)
    return loaded


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
