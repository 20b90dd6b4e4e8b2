"""Options that several verbs share, and parsers of option values."""

import json
from typing import Annotated, Any

import typer

from specdiff.errors import UsageError

Model = Annotated[str, typer.Option(help="Hub id, folder, file.gguf or built-in name.")]
DrafterSpec = Annotated[
    str,
    typer.Option(
        help="auto, none, ngram, sedd, autoregressive, a folder or hub id, module:Class, "
        "./file.py:Class."
    ),
]
DraftLen = Annotated[
    str,
    typer.Option(
        help="Tokens per draft, or auto: no drafting while it is slower. Default: see --seed."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Network passes per draft (T).")]
Order = Annotated[str | None, typer.Option(help="one-shot, left-to-right or any.")]
Sampler = Annotated[str | None, typer.Option(help="Of order any: analytic or euler.")]
DraftTemperature = Annotated[
    float | None, typer.Option(help="Sharpens or flattens drafts; always lossless.")
]
VerifierName = Annotated[str, typer.Option(help="token, block, match or match-gumbel.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
FROM_MODEL = "(default: the model's generation_config.json, else {})"
Temperature = Annotated[float | None, typer.Option(help=f"0 is greedy. {FROM_MODEL.format(1.0)}")]
TopK = Annotated[int | None, typer.Option(help=f"0 is off. {FROM_MODEL.format(0)}")]
TopP = Annotated[float | None, typer.Option(help=f"1 is off. {FROM_MODEL.format(1.0)}")]
MinP = Annotated[float | None, typer.Option(help=f"0 is off. {FROM_MODEL.format(0.0)}")]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help=f"On tokens of prompt and answer; 1 is off. {FROM_MODEL.format(1.0)}"),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        help="auto: sampling defaults from the model's generation_config.json; none: ignore them."
    ),
]
PresencePenalty = Annotated[
    float, typer.Option(help="On tokens of the answer, once each; 0 is off.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="On tokens of the answer, each time; 0 is off.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Same seed, same text; also fixes the draft length (else it is auto)."),
]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
DrafterDevice = Annotated[
    str | None, typer.Option(help="Where the drafter runs; default: with the target.")
]
ModelOptions = Annotated[
    str, typer.Option(help='How the target is loaded, as JSON: {"device_map": "auto", ...}.')
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
MaxModelLen = Annotated[int, typer.Option(help="Maximum length of prompt and answer together.")]
ShowAccepted = Annotated[
    bool, typer.Option("--show-accepted", help="Color the tokens that came from the draft.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No footer.")]


def without_unset(options: dict[str, Any]) -> dict[str, Any]:
    """The options whose value is not None."""
    return {name: value for name, value in options.items() if value is not None}


def drafter_options(
    steps: int | None, order: str | None, sampler: str | None, draft_temperature: float | None
) -> dict[str, Any]:
    """The drafter's own options, as `specdiff.load` takes them."""
    options = {"steps": steps, "order": order, "sampler": sampler}
    return without_unset({**options, "draft_temperature": draft_temperature})


def sampling_defaults(generation_config: str) -> dict[str, str]:
    """The keyword argument of `specdiff.load` for --generation-config; empty for its default."""
    return {} if generation_config == "auto" else {"generation_config": generation_config}


def json_object(flag: str, text: str) -> dict[str, Any]:
    """An option's value as a JSON object. Raises UsageError if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag} is not valid JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{flag} must be a JSON object, not {text}")
    return value


def token_ids(text: str) -> tuple[int, ...] | None:
    """ID,... as numbers; None for no text. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise UsageError(f"--allowed-token-ids must be ID,ID,..., not {text!r}") from None


def biases(text: str) -> dict[int, float]:
    """ID=VALUE,... as a mapping. Raises UsageError."""
    try:
        parts = [part.split("=") for part in text.split(",")] if text else []
        pairs = [(int(token), float(value)) for token, value in parts]
    except ValueError:
        raise UsageError(f"--logit-bias must be ID=VALUE,ID=VALUE,..., not {text!r}") from None
    by_token = dict(pairs)
    if len(by_token) < len(pairs):
        raise UsageError(f"--logit-bias names a token twice: {text!r}")
    return by_token


def draft_length(text: str) -> int | str | None:
    """K, "auto", or None for no text. Raises UsageError."""
    if text in ("", "auto"):
        return text or None
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--draft-len must be a whole number of at least 1 or 'auto', not {text!r}"
        ) from None
