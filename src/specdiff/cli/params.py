"""Options that several verbs declare, each with its help, once."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Hub id, folder, file.gguf or built-in name.")]
DrafterSpec = Annotated[
    str,
    typer.Option(
        help="auto, none, ngram, sedd, autoregressive, a folder or hub id, module:Class, ./file.py:Class."
    ),
]
DraftLen = Annotated[
    str,
    typer.Option(
        help="Tokens per draft, or auto: no drafting while it does not pay. Default: see --seed."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Network passes per draft (T).")]
Order = Annotated[str | None, typer.Option(help="one-shot, left-to-right or any.")]
Sampler = Annotated[str | None, typer.Option(help="Of order any: analytic or euler.")]
DraftTemperature = Annotated[
    float | None, typer.Option(help="Sharpens or flattens drafts; always lossless.")
]
VerifierName = Annotated[str, typer.Option(help="token, block, match or match-gumbel.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
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
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")]
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
MaxModelLen = Annotated[int, typer.Option(help="Most tokens of prompt and answer together.")]
ShowAccepted = Annotated[
    bool, typer.Option("--show-accepted", help="Colour the tokens that came from the draft.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No footer.")]
