"""Model defaults: a model's own end-of-text tokens and sampling options."""

from collections.abc import Mapping
from typing import Any

from specdiff.errors import ConfigError, UsageError
from specdiff.types import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a text, from the first of these sources that has any:

    1. generation_config.json, as in transformers' `generate` (config.json if there is no such file)
    2. config.json as written: the default of a config class says nothing about this model
    3. the tokenizer's end-of-text token

    `model` and `tokenizer` may be None. Negative ids, which some files use for "none", are ignored.
    """
    sources = (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        _written(getattr(model, "config", None)),
        getattr(tokenizer, "eos_token_id", None),
    )
    for ends in sources:
        if ends is not None and ends != []:
            ids = ends if isinstance(ends, (list, tuple)) else [ends]
            return tuple(sorted({int(token) for token in ids if token >= 0}))
    return ()


def _written(config: Any) -> Any:
    """eos_token_id as written in config.json; without a file, any that is not the class default."""
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return None
    folder = getattr(config, "_name_or_path", "")
    if folder:
        try:
            return config.get_config_dict(folder, local_files_only=True)[0].get("eos_token_id")
        except (OSError, ValueError):  # the folder was moved, or never existed
            pass
    return None if ends == getattr(type(config)(), "eos_token_id", None) else ends


def sampling_defaults(model: Any) -> Mapping[str, Any]:
    """The sampling options in generation_config.json, read as in vLLM: `do_sample` is ignored.

    Raises ConfigError for invalid values.
    """
    config = getattr(model, "generation_config", None)
    entries = {name: getattr(config, name, None) for name in SAMPLING}
    values = {name: value for name, value in entries.items() if value is not None}
    try:
        SamplingParams(**values)
    except UsageError as error:
        raise ConfigError(
            f"generation_config.json: {error}; load with generation_config='none' to ignore it"
        ) from error
    return values
