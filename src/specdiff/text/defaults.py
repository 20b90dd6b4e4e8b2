"""What a model says about its own use: the tokens that end its texts, and its sampling defaults. One rule for every door."""

from collections.abc import Mapping
from typing import Any

from specdiff.errors import ConfigError, UsageError
from specdiff.types import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a text: those of the first that names any.

    1. generation_config.json, which transformers' own `generate` obeys (or config.json, where there is no such file)
    2. config.json as it is written: a default of the config's class is nobody's statement about this model
    3. the tokenizer's end of text

    `model` and `tokenizer` may be None. Negative ids, which some write for "none", end nothing.
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
    """eos_token_id of config.json as written; of a config that no file holds, where it is not its class's default."""
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return None
    folder = getattr(config, "_name_or_path", "")
    if folder:
        try:
            return config.get_config_dict(folder, local_files_only=True)[0].get("eos_token_id")
        except (OSError, ValueError):  # moved since it was loaded, or never a folder
            pass
    return None if ends == getattr(type(config)(), "eos_token_id", None) else ends


def sampling_defaults(model: Any) -> Mapping[str, Any]:
    """The sampling options that generation_config.json names, as vLLM reads them: `do_sample` is not asked.

    Raises ConfigError for values that no sampling option may have.
    """
    config = getattr(model, "generation_config", None)
    named = {name: getattr(config, name, None) for name in SAMPLING}
    values = {name: value for name, value in named.items() if value is not None}
    try:
        SamplingParams(**values)
    except UsageError as error:
        raise ConfigError(
            f"generation_config.json: {error}; load with generation_config='none' to ignore it"
        ) from error
    return values
