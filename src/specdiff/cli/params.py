"""Options that several verbs share, and parsers of option values.

Each shared option has one environment variable, SPECDIFF_ and its name, in every verb.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from specdiff.cli import config
from specdiff.errors import UsageError

MODEL = "Model"
DRAFTING = "Drafting"
SAMPLING = "Sampling"
OUTPUT = "Output"
PREFIX = "SPECDIFF_"


def option(
    help: str,
    *flags: str,
    panel: str,
    variable: str | None = None,
    show_default: bool = True,
    metavar: str | None = None,
) -> Any:
    """An option in a panel of --help. `variable`: its environment variable, without SPECDIFF_."""
    return typer.Option(
        *flags,
        help=help,
        rich_help_panel=panel,
        envvar=None if variable is None else PREFIX + variable,
        show_envvar=False,
        show_default=show_default,
        metavar=metavar,
    )


def flag(help: str, *flags: str, panel: str, variable: str | None = None) -> Any:
    """An option without a value."""
    return option(help, *flags, panel=panel, variable=variable, metavar="")


def environment(verb: Callable[..., Any]) -> str | None:
    """The epilog of a verb's --help: the environment variables that it reads."""
    hints = get_type_hints(verb, include_extras=True).values()
    options = [part for hint in hints for part in getattr(hint, "__metadata__", ())]
    variables = [str(part.envvar) for part in options if isinstance(part, OptionInfo)]
    names = [name.removeprefix(PREFIX) for name in variables if name.startswith(PREFIX)]
    return f"Environment variables (prefix {PREFIX}): {', '.join(names)}." if names else None


_TARGET = "Hub id, folder, .gguf file or name."
Model = Annotated[str, option(_TARGET, panel=MODEL, variable="MODEL")]
OptionalModel = Annotated[str | None, option(_TARGET, panel=MODEL, variable="MODEL")]
TrainedModel = Annotated[str, option(_TARGET, "--target", "--model", panel=MODEL, variable="MODEL")]
Device = Annotated[str, option("auto, cpu, cuda, ...", panel=MODEL, variable="DEVICE")]
Dtype = Annotated[str, option("auto, float32, bfloat16 or float16.", panel=MODEL, variable="DTYPE")]
Quantize = Annotated[str, option("auto, none, int8 or int4.", panel=MODEL, variable="QUANTIZE")]
Threads = Annotated[
    str,
    option("CPU threads: N, or auto (the fastest now).", panel=MODEL, variable="THREADS"),
]
Compile = Annotated[
    bool,
    flag("Compile layers in the background.", "--compile", panel=MODEL, variable="COMPILE"),
]
NoCompile = Annotated[
    bool,
    flag("Use no compiled layers.", "--no-compile", panel=MODEL, variable="NO_COMPILE"),
]
MaxModelLen = Annotated[
    int, option("Maximum tokens of prompt and answer.", panel=MODEL, variable="MAX_MODEL_LEN")
]
ModelOptions = Annotated[
    str,
    option(
        'Loading options as JSON: {"device_map": "auto", ...}.',
        panel=MODEL,
        variable="MODEL_OPTIONS",
        show_default=False,
    ),
]
GenerationConfig = Annotated[
    str,
    option(
        "Sampling defaults of the model: auto or none.",
        panel=MODEL,
        variable="GENERATION_CONFIG",
    ),
]
System = Annotated[str | None, option("System prompt.", panel=MODEL, variable="SYSTEM")]

DrafterSpec = Annotated[
    str,
    option(
        "auto, none, ngram, cascade, sedd, a folder or FILE:Class.",
        panel=DRAFTING,
        variable="DRAFTER",
        show_default=False,
    ),
]
DrafterDevice = Annotated[
    str | None,
    option(
        "Device of the drafter (default: the target's).",
        panel=DRAFTING,
        variable="DRAFTER_DEVICE",
    ),
]
DraftLen = Annotated[
    str,
    option(
        "Tokens per draft, or auto: off while it is slower.",
        panel=DRAFTING,
        variable="DRAFT_LEN",
    ),
]
Steps = Annotated[
    int | None, option("Network passes per draft (T).", panel=DRAFTING, variable="STEPS")
]
Order = Annotated[
    str | None, option("one-shot, left-to-right or any.", panel=DRAFTING, variable="ORDER")
]
Sampler = Annotated[
    str | None, option("Of order any: analytic or euler.", panel=DRAFTING, variable="SAMPLER")
]
DraftTemperature = Annotated[
    float | None,
    option(
        "Sharpen or flatten drafts; always lossless.",
        panel=DRAFTING,
        variable="DRAFT_TEMPERATURE",
    ),
]
Tree = Annotated[
    int | None,
    option(
        "Draft a tree of N nodes instead of a chain (2 to 256).", panel=DRAFTING, variable="TREE"
    ),
]
VerifierName = Annotated[
    str, option("token, block, match or match-gumbel.", panel=DRAFTING, variable="VERIFIER")
]

MaxTokens = Annotated[
    int, option("Maximum tokens of the answer.", panel=SAMPLING, variable="MAX_TOKENS")
]
FROM_MODEL = "(default: the model's, else {})"
Temperature = Annotated[
    float | None,
    option(f"0 is greedy {FROM_MODEL.format(1)}.", panel=SAMPLING, variable="TEMPERATURE"),
]
TopK = Annotated[
    int | None, option(f"0 is off {FROM_MODEL.format(0)}.", panel=SAMPLING, variable="TOP_K")
]
TopP = Annotated[
    float | None, option(f"1 is off {FROM_MODEL.format(1)}.", panel=SAMPLING, variable="TOP_P")
]
MinP = Annotated[
    float | None, option(f"0 is off {FROM_MODEL.format(0)}.", panel=SAMPLING, variable="MIN_P")
]
RepetitionPenalty = Annotated[
    float | None,
    option(f"1 is off {FROM_MODEL.format(1)}.", panel=SAMPLING, variable="REPETITION_PENALTY"),
]
PresencePenalty = Annotated[
    float,
    option("Once per token of the answer; 0 is off.", panel=SAMPLING, variable="PRESENCE_PENALTY"),
]
FrequencyPenalty = Annotated[
    float,
    option(
        "Per occurrence in the answer; 0 is off.",
        panel=SAMPLING,
        variable="FREQUENCY_PENALTY",
    ),
]
Stop = Annotated[
    list[str] | None,
    option("End before this text; may be repeated.", panel=SAMPLING, variable="STOP"),
]
Seed = Annotated[
    int | None,
    option("Same seed, same text (and a fixed draft length).", panel=SAMPLING, variable="SEED"),
]

ShowAccepted = Annotated[
    bool,
    flag(
        "Color the tokens that were drafted.",
        "--show-accepted",
        panel=OUTPUT,
        variable="SHOW_ACCEPTED",
    ),
]
Json = Annotated[bool, flag("Print one JSON object.", "--json", panel=OUTPUT)]
Quiet = Annotated[bool, flag("No notes on stderr.", "-q", "--quiet", panel=OUTPUT)]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Read options from a YAML file; flags take precedence.",
        metavar="FILE.yaml",
        callback=config.read,
        is_eager=True,
    ),
]


def without_unset(options: dict[str, Any]) -> dict[str, Any]:
    """The options whose value is not None."""
    return {name: value for name, value in options.items() if value is not None}


def drafter_options(
    steps: int | None,
    order: str | None,
    sampler: str | None,
    draft_temperature: float | None,
    tree: int | None,
) -> dict[str, Any]:
    """The drafter's own options, as `specdiff.load` takes them."""
    options = {"steps": steps, "order": order, "sampler": sampler, "tree": tree}
    return without_unset({**options, "draft_temperature": draft_temperature})


def compile_mode(compile: bool, no_compile: bool) -> bool | str:
    """The argument `compile` of `specdiff.load`. Raises UsageError if both flags are there."""
    if compile and no_compile:
        raise UsageError("--compile and --no-compile contradict each other; give one of them")
    return compile if compile or no_compile else "auto"


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


def file_text(flag: str, path: Path) -> str:
    """The text of a file. Raises UsageError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} cannot read {path}: {error}") from None


def text_or_file(value: str) -> str:
    """A JSON schema as text, which begins with a brace, or of the file of this name."""
    return value if value.lstrip()[:1] == "{" else file_text("--json-schema", Path(value))


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


def thread_count(text: str) -> int | str:
    """N or "auto". Raises UsageError."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--threads must be a whole number or 'auto', not {text!r}") from None


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
