"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    TokenType,
    get_tensor_name_map,
    quantize,
)
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TYPES = GGMLQuantizationType.__members__
VOCAB = 261  # four specials, the bytes, and one merge
LENGTH = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
WIDE: dict[str, Any] = {
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 8,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": LENGTH,
    "bos_token_id": 1,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES | WIDE | {"tie_word_embeddings": True})
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES | WIDE | {"tie_word_embeddings": True, "num_hidden_layers": 7})
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=2)),
}


def model(architecture: str) -> PreTrainedModel:
    """Nothing in it is left at its initial value."""
    torch.manual_seed(0)
    net = MODELS[architecture]().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                1 + 0.2 * noise if "norm" in name and "gemma" not in architecture else 0.3 * noise
            )
    return net


def write(
    path: Path,
    net: PreTrainedModel,
    architecture: str = "llama",
    *,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    tokenizer: str | None = "gpt2",
    kind: str = "F32",
) -> Path:
    """Write a model. `fields` and `tensors` add to its own, or replace them; None removes one.

    kind: the type of every matrix whose rows are a multiple of its blocks.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in {**metadata(net, architecture), **(fields or {})}.items():
        if value is not None:
            add(
                writer,
                key if key.startswith(("general.", "split.")) else f"{architecture}.{key}",
                value,
            )
    if tokenizer is not None:
        words = ["<pad>", "<s>", "</s>", "<unk>", *byte_letters(), "aa"]
        writer.add_tokenizer_model(tokenizer)
        writer.add_token_list(words)
        writer.add_token_types([TokenType.CONTROL] * 4 + [TokenType.NORMAL] * (VOCAB - 4))
        writer.add_token_merges(["a a"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
    for name, tensor in {**renamed(net, architecture), **(tensors or {})}.items():
        if tensor is not None:
            numbers = np.ascontiguousarray(tensor.detach().float().numpy())
            block = 1 if kind == "F32" or tensor.dim() < 2 else GGML_QUANT_SIZES[TYPES[kind]][0]
            if block > 1 and tensor.shape[-1] % block == 0:
                writer.add_tensor(name, quantize(numbers, TYPES[kind]), raw_dtype=TYPES[kind])
            else:
                writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata(net: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config: Any = net.config
    shared = {
        "context_length": LENGTH,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        return shared | {
            "feed_forward_length": 4 * config.hidden_size,
            "attention.layer_norm_epsilon": 1e-5,
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    own: dict[str, Any] = {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    if architecture in ("qwen3", "gemma2", "gemma3"):
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in ("gemma2", "gemma3"):
        own["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        own |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return shared | own


def renamed(net: PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    """The model's tensors under llama.cpp's names, and in its layout."""
    config: Any = net.config
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in net.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = (
                config.num_attention_heads
                if stem.endswith("q_proj")
                else config.num_key_value_heads
            )
            tensor = interleaved(tensor, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if ".c_" in name and tensor.dim() == 2:  # GPT-2's matrices lie the other way
            tensor = tensor.T
        tensors[f"{names.get_name(stem)}.{suffix}"] = tensor
    return tensors


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighboring pairs, transformers halves of a head."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def byte_letters() -> list[str]:
    """The printable letters that stand for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
