"""Refused models: families, layer types and rotary embeddings that cannot be scored exactly."""

from transformers import PretrainedConfig

from specdiff.errors import UnsupportedModelError

# transformers' names of the layer types whose keys stay at explicit positions
FULL = "full_attention"
SLIDING = "sliding_attention"

ALIBI = "biases attention by distance (alibi), assuming that all rows of a cache have one length"
STATE = "carries a state from which a rejected draft cannot be removed"
NO_CACHE = "has no key/value cache to continue from"
REFUSED = {
    **dict.fromkeys(("bloom", "mpt"), ALIBI),
    **dict.fromkeys(("falcon_mamba", "lfm2", "lfm2_moe", "mamba", "mamba2"), STATE),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm"), STATE),
    **dict.fromkeys(("openai-gpt", "reformer", "xlm", "xlnet"), NO_CACHE),
    "whisper": "counts the positions of a padded row from the start of its padding",
}

# rope types whose rotation depends on the position alone
SERVED_ROPE = ("default", "linear", "llama3", "proportional", "yarn")
# families that call their rope dynamic, but fix its frequencies by an `alpha`
FIXED_NTK = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text")


def refuse(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError if the config alone shows that a model cannot be scored exactly.

    The message gives the reason.
    """
    reason = _reason(config)
    if reason is not None:
        raise UnsupportedModelError(
            f"a {config.model_type} target cannot be scored exactly over the ragged cache: "
            f"it {reason}; supported are models whose layers attend to keys at explicit positions, "
            f"such as gpt2, llama, qwen2 and qwen3 (docs/supported-models.md)"
        )


def _reason(config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if getattr(text, "alibi", False):
        return ALIBI
    if config.is_encoder_decoder:
        return "encodes its prompt separately from its answer"
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - {FULL, SLIDING})
    if kinds:
        return (
            f"has layers of type {', '.join(kinds)}, "
            "where only full and sliding attention are served"
        )
    ropes = [name for name in rope_types(text) if name not in SERVED_ROPE]
    if ropes:
        return (
            f"has rotary embeddings of type {', '.join(ropes)}, whose frequencies may change with "
            "the length of the whole forward pass, neighbors and drafts included "
            f"(served are {', '.join(SERVED_ROPE)})"
        )
    return None


def rope_types(config: PretrainedConfig) -> list[str]:
    """The rope types that a text config names, including those of single layer types."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    fixed = config.model_type in FIXED_NTK
    types = set()
    for group in groups:
        name = group.get("rope_type", group.get("type"))
        if name is not None and not (fixed and name == "dynamic" and group.get("alpha")):
            types.add(str(name))
    return sorted(types)
