"""Model families: the list that the exactness tests run and docs/supported-models.md is made from.

python tests/models/families.py > docs/supported-models.md
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB, WINDOW, POSITIONS = 48, 5, 96
ONE, MIXED, ALL = "full", "full and sliding layers", "sliding in all layers"


@dataclass(frozen=True)
class Family:
    """A row of the table. `config` makes a tiny model of it; its layers must slide by `window`."""

    name: str
    hub: str
    config: Callable[[], Any]
    attention: str = ONE
    remark: str = ""

    @property
    def window(self) -> int | None:
        return None if self.attention == ONE else WINDOW


def _tiny(model_type: str, **changes: Any) -> Callable[[], Any]:
    """A two-layer config in the names most families use."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return lambda: AutoConfig.for_model(
        model_type, **{k: v for k, v in (sizes | changes).items() if v != "drop"}
    )


def _old(model_type: str, **changes: Any) -> Callable[[], Any]:
    """The same in GPT-2's names."""
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return lambda: AutoConfig.for_model(
        model_type, **(sizes | {"bos_token_id": None, "eos_token_id": None} | changes)
    )


def _neo() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
        "max_position_embeddings": POSITIONS, "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return AutoConfig.for_model("gpt_neo", **sizes)


SLIDES: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, **SLIDES}
NO_GROUPS = {"num_key_value_heads": "drop"}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    "n_shared_experts": 1,
}  # fmt: skip

BASE = {"rope_theta": 10_000.0}
# named dynamic, and fixed by its alpha
ALPHA = BASE | {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}
TRAINED = 24  # positions a scaled model was first trained for: rows of the tests cross them
LONG: dict[str, Any] = BASE | {
    "rope_type": "longrope", "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 12.0],
}  # fmt: skip
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}


@dataclass(frozen=True)
class Rope:
    """A RoPE type, and `config`, which makes a tiny model that has it."""

    type: str
    hub: str
    config: Callable[[], Any]

    @property
    def name(self) -> str:
        return f"RoPE {self.type}"


def _llama(**rope: Any) -> Callable[[], Any]:
    return _tiny("llama", rope_parameters=BASE | rope)


ROPES = [
    Rope("default", "HuggingFaceTB/SmolLM2-135M-Instruct", _llama(rope_type="default")),
    Rope(
        "linear", "deepseek-ai/deepseek-coder-6.7b-instruct", _llama(rope_type="linear", factor=4.0)
    ),
    Rope("llama3", "meta-llama/Llama-3.2-1B", _llama(**LLAMA3)),
    Rope("yarn", "openai/gpt-oss-20b, Qwen3 with YaRN", _llama(**YARN)),
    Rope(
        "proportional",
        "a part of each head's frequencies",
        _llama(rope_type="proportional", partial_rotary_factor=0.5),
    ),
]
REFUSED_ROPES = [
    Rope("dynamic", "Llama with dynamic NTK scaling", _llama(rope_type="dynamic", factor=2.0)),
    Rope("longrope",
         "microsoft/Phi-3-mini-128k-instruct, Phi-3.5-mini-instruct, Phi-4-mini-instruct",
         _tiny("phi3", original_max_position_embeddings=TRAINED, rope_parameters=LONG)),
]  # fmt: skip

SUPPORTED = [
    Family("GPT-2", "openai-community/gpt2", _old("gpt2")),
    Family("GPT-Neo", "EleutherAI/gpt-neo-125m, gpt-neo-2.7B",
           _neo, MIXED, "a target of the paper; eager attention only"),
    Family("GPT-NeoX, Pythia", "EleutherAI/pythia-160m", _tiny("gpt_neox", **NO_GROUPS)),
    Family("GPT-J", "EleutherAI/gpt-j-6b", _old("gptj", rotary_dim=4)),
    Family("GPT-BigCode", "bigcode/gpt_bigcode-santacoder", _old("gpt_bigcode")),
    Family("CodeGen", "Salesforce/codegen-350M-mono", _old("codegen", rotary_dim=4)),
    Family("OPT", "facebook/opt-125m",
           _tiny("opt", ffn_dim=64, word_embed_proj_dim=32, intermediate_size="drop", **NO_GROUPS)),
    Family("Llama, SmolLM2", "meta-llama/Llama-3.2-1B, HuggingFaceTB/SmolLM2-135M-Instruct",
           _tiny("llama")),
    Family("Mistral", "mistralai/Mistral-7B-v0.1", _tiny("mistral", sliding_window=WINDOW), ALL),
    Family("Mistral without a window", "mistralai/Mistral-7B-Instruct-v0.3",
           _tiny("mistral", sliding_window=None)),
    Family("Ministral", "mistralai/Ministral-8B-Instruct-2410",
           _tiny("ministral", head_dim=8, **SLIDES), MIXED),
    Family("Mixtral", "mistralai/Mixtral-8x7B-v0.1",
           _tiny("mixtral", num_local_experts=4, sliding_window=None)),
    Family("Qwen2, Qwen2.5", "Qwen/Qwen2.5-0.5B-Instruct", _tiny("qwen2")),
    Family("Qwen2, sliding", "Qwen/Qwen2-7B with use_sliding_window",
           _tiny("qwen2", use_sliding_window=True, **SLIDES), MIXED),
    Family("Qwen2-MoE", "Qwen/Qwen1.5-MoE-A2.7B",
           _tiny("qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS)),
    Family("Qwen3", "Qwen/Qwen3-0.6B", _tiny("qwen3", head_dim=8)),
    Family("Qwen3-MoE", "Qwen/Qwen3-30B-A3B", _tiny("qwen3_moe", head_dim=8, **EXPERTS)),
    Family("Gemma", "google/gemma-2b", _tiny("gemma", head_dim=8)),
    Family("Gemma 2", "google/gemma-2-2b", _tiny("gemma2", **GEMMA), MIXED),
    Family("Gemma 3", "google/gemma-3-270m", _tiny("gemma3_text", **GEMMA), MIXED, "text models"),
    Family("Phi", "microsoft/phi-2", _tiny("phi")),
    Family("Phi-3", "microsoft/Phi-3-mini-4k-instruct", _tiny("phi3", sliding_window=WINDOW), ALL),
    Family("StableLM", "stabilityai/stablelm-2-1_6b", _tiny("stablelm")),
    Family("StarCoder2", "bigcode/starcoder2-3b", _tiny("starcoder2", sliding_window=WINDOW), ALL),
    Family("OLMo", "allenai/OLMo-1B-hf", _tiny("olmo")),
    Family("OLMo 2", "allenai/OLMo-2-0425-1B", _tiny("olmo2")),
    Family("OLMo 3", "allenai/Olmo-3-7B-Instruct", _tiny("olmo3", **SLIDES), MIXED),
    Family("OLMoE", "allenai/OLMoE-1B-7B-0924", _tiny("olmoe", **EXPERTS)),
    Family("Falcon", "tiiuae/falcon-7b",
           _tiny("falcon", alibi=False, multi_query=True, **NO_GROUPS), remark="rotary, not alibi"),
    Family("Cohere", "CohereLabs/c4ai-command-r-v01", _tiny("cohere")),
    Family("Cohere 2", "CohereLabs/c4ai-command-r7b-12-2024", _tiny("cohere2", **SLIDES), MIXED),
    Family("Granite", "ibm-granite/granite-3.3-2b-instruct", _tiny("granite")),
    Family("Granite-MoE", "ibm-granite/granite-3.1-1b-a400m-base",
           _tiny("granitemoe", num_local_experts=4)),
    Family("SmolLM3", "HuggingFaceTB/SmolLM3-3B", _tiny("smollm3")),
    Family("GPT-OSS", "openai/gpt-oss-20b",
           _tiny("gpt_oss", head_dim=8, num_local_experts=4, **SLIDES),
           MIXED, "eager attention only"),
    Family("GLM-4", "zai-org/GLM-4-9B-0414", _tiny("glm4", head_dim=8)),
    Family("EXAONE 4", "LGAI-EXAONE/EXAONE-4.0-1.2B", _tiny("exaone4", **SLIDES), MIXED),
    Family("DeepSeek-V2", "deepseek-ai/DeepSeek-V2-Lite",
           _tiny("deepseek_v2", **LATENT), remark="latent attention, cached unfolded"),
    Family("DeepSeek-V3", "deepseek-ai/DeepSeek-V3",
           _tiny("deepseek_v3", **LATENT), remark="as DeepSeek-V2"),
    Family("Nemotron", "nvidia/Minitron-4B-Base", _tiny("nemotron")),
    Family("BioGPT", "microsoft/biogpt", _tiny("biogpt", **NO_GROUPS)),
    Family("XGLM", "facebook/xglm-564M",
           _tiny("xglm", d_model=32, ffn_dim=64, num_layers=2, attention_heads=4)),
    Family("CTRL", "Salesforce/ctrl", _old("ctrl", dff=64)),
    Family("Persimmon", "adept/persimmon-8b-base", _tiny("persimmon", **NO_GROUPS)),
    Family("Helium", "kyutai/helium-1-2b", _tiny("helium", head_dim=8)),
    Family("Apertus", "swiss-ai/Apertus-8B-2509", _tiny("apertus")),
    Family("Arcee", "arcee-ai/AFM-4.5B", _tiny("arcee")),
    Family("ERNIE 4.5", "baidu/ERNIE-4.5-0.3B-PT", _tiny("ernie4_5")),
    Family("Seed-OSS", "ByteDance-Seed/Seed-OSS-36B-Instruct", _tiny("seed_oss", head_dim=8)),
    Family("Hunyuan", "tencent/Hunyuan-0.5B-Instruct",
           _tiny("hunyuan_v1_dense", head_dim=8, rope_parameters=ALPHA)),
]  # fmt: skip


def model(family: Family | Rope) -> PreTrainedModel:
    """A random model, its matrices scaled up so that greedy text is not one token forever."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    net: PreTrainedModel = auto.from_config(family.config())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(16 if ".wpe" in name or "embed_positions" in name else 4)
    net.generation_config.eos_token_id = None
    return net.eval()


def _plain(model_type: str, **changes: Any) -> Callable[[], Any]:
    return lambda: AutoConfig.for_model(model_type, **changes)


PHIMOE = _tiny("phimoe", rope_parameters=LONG | {"short_mscale": 1.2, "long_mscale": 1.4})
WHISPER = _plain("whisper", is_encoder_decoder=False)
DISTANCE = "alibi"
STATE = "a state"
NO_CACHE = "no key/value cache"
APART = "separately from its answer"
LAYERS = "layers of type"
ROPE = "rotary embeddings of type"
PADDED = "its padding"
REFUSED: list[tuple[Family, str]] = [  # with a word of the reason in the message
    (Family("BLOOM", "bigscience/bloom-560m", _plain("bloom")), DISTANCE),
    (Family("MPT", "mosaicml/mpt-7b", _plain("mpt")), DISTANCE),
    (Family("Falcon with alibi", "tiiuae/falcon-rw-1b", _plain("falcon", alibi=True)), DISTANCE),
    (Family("Mamba, Mamba 2", "state-spaces/mamba-130m-hf", _plain("mamba")), STATE),
    (Family("Falcon-Mamba", "tiiuae/falcon-mamba-7b", _plain("falcon_mamba")), STATE),
    (Family("RWKV", "RWKV/rwkv-4-169m-pile", _plain("rwkv")), STATE),
    (Family("xLSTM", "NX-AI/xLSTM-7b", _plain("xlstm")), STATE),
    (Family("RecurrentGemma", "google/recurrentgemma-2b", _plain("recurrent_gemma")), STATE),
    (Family("LFM2", "LiquidAI/LFM2-350M", _plain("lfm2")), STATE),
    (Family("Jamba", "ai21labs/Jamba-v0.1", _plain("jamba")), LAYERS),
    (Family("Zamba 2", "Zyphra/Zamba2-1.2B", _plain("zamba2")), LAYERS),
    (Family("Falcon-H1", "tiiuae/Falcon-H1-0.5B-Base", _plain("falcon_h1")), LAYERS),
    (Family("Bamba", "ibm-ai-platform/Bamba-9B", _plain("bamba")), LAYERS),
    (Family("Nemotron-H", "nvidia/Nemotron-H-8B-Base-8K", _plain("nemotron_h")), LAYERS),
    (Family("Qwen3-Next", "Qwen/Qwen3-Next-80B-A3B-Instruct", _plain("qwen3_next")), LAYERS),
    (Family("MiniMax", "MiniMaxAI/MiniMax-Text-01-hf", _plain("minimax")), LAYERS),
    (Family("Llama 4", "meta-llama/Llama-4-Scout-17B-16E", _plain("llama4_text")), LAYERS),
    (Family("GPT", "openai-community/openai-gpt", _plain("openai-gpt")), NO_CACHE),
    (Family("XLNet", "xlnet/xlnet-base-cased", _plain("xlnet")), NO_CACHE),
    (Family("Reformer", "google/reformer-enwik8", _plain("reformer")), NO_CACHE),
    (Family("Phi-3.5-MoE", "microsoft/Phi-3.5-MoE-instruct", PHIMOE), ROPE),
    (Family("Whisper's decoder", "distil-whisper/distil-large-v2", WHISPER), PADDED),
    (Family("T5", "google-t5/t5-small", _plain("t5")), APART),
    (Family("BART", "facebook/bart-base", _plain("bart")), APART),
]


def page() -> str:
    """docs/supported-models.md."""
    from specdiff.errors import UnsupportedModelError
    from specdiff.models.refusals import refuse

    def why(family: Family | Rope) -> str:
        try:
            refuse(family.config())
        except UnsupportedModelError as error:
            return str(error).split("ragged cache: it ")[1].split("; supported are")[0]
        return "served"  # the tests assert that none is

    supported = "\n".join(
        f"| {f.name} | {f.hub} | {f.attention} | exact | {f.remark} |" for f in SUPPORTED
    )
    refused = "\n".join(f"| {f.name} | {f.hub} | refused | {why(f)} |" for f, _ in REFUSED)
    ropes = [f"| `{r.type}` | {r.hub} | exact |" for r in ROPES]
    ropes += [
        f"| `{r.type}` | {r.hub} | {'exact' if why(r) == 'served' else 'refused'} |"
        for r in REFUSED_ROPES
    ]
    version = ".".join(transformers.__version__.split(".")[:2])
    return PAGE.format(
        supported=supported, refused=refused, ropes="\n".join(ropes), version=version
    )


PAGE = """# Supported targets

Generated by `python tests/models/families.py > docs/supported-models.md` from the list that the
tests run; a test compares the two.

*Exact* means, in float32 on a small random model of the family: rows of one batch at different
lengths, with rejected drafts in between and beyond any sliding window, give the logits of a plain
forward pass within 1e-4, and greedy speculative text equals that of transformers' own `generate`.
Any other causal LM may be tried: a self-test at load compares it with a plain forward pass of the
untouched model (rows of different length, across every number of positions its config names, a
rejected draft, two streams at once; once more with its sliding window narrowed if it has one), and
refuses it if they differ. Checked with transformers {version}.

| family | for example | attention | status | remark |
|---|---|---|---|---|
{supported}

Quantized weights and models spread over several devices load through `model_options` (see
`specdiff.load`), and take the same self-test: weight-only formats pass; formats that round
activations by the whole batch at once do not, because a token's logits then depend on its
neighbors.

## Rotary embeddings and windows

In every family the RoPE type of the config decides (that of every layer type, if they differ):

| RoPE type | for example | status |
|---|---|---|
{ropes}

With the refused types the frequencies change with the length of the whole forward pass, so that a
row's logits depend on the longest row of its batch and on the draft. Any type that is not in this
table is refused too. (Hunyuan's configs say `dynamic`, but its `alpha` fixes the frequencies:
exact.)

Sliding windows are exact in the families above that have them, and in any other that names its
window `sliding_window` and its layers `full_attention` and `sliding_attention`. Chunked,
compressed, indexed and linear attention are refused.

Attention runs through PyTorch's scaled dot-product attention if the family has it, otherwise
eagerly. Dropout, position biases and all other options of the attention function are left to
transformers' own function; attention sinks are served in eager attention only.

Several threads may share one target: forwards of one model take turns. GPT-Neo's own masks are
changed during a forward, so its model must not be called directly in one thread while another
decodes with it.

## Refused at load

| family | for example | status | reason |
|---|---|---|---|
{refused}

Encoders such as BERT attend both ways, and fail the self-test. Models that bring their own code
(`auto_map`) are never run.
"""

if __name__ == "__main__":
    sys.stdout.write(page())
