"""`specdiff generate`: stream the answer to one prompt."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params, terminal
from specdiff.cli.stream import footer, show, verdict
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.text.generation import Chunk, Generation


def generate(
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - reads standard input.", metavar="PROMPT")
    ],
    model: params.Model = "smollm2-135m",
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    quantize: params.Quantize = "auto",
    threads: params.Threads = "auto",
    compile: params.Compile = False,
    no_compile: params.NoCompile = False,
    max_model_len: params.MaxModelLen = 2048,
    model_options: params.ModelOptions = "{}",
    generation_config: params.GenerationConfig = "auto",
    system: params.System = None,
    raw: Annotated[
        bool,
        params.flag("No chat template: continue the prompt.", "--raw", panel=params.MODEL),
    ] = False,
    drafter: params.DrafterSpec = "auto",
    draft_len: params.DraftLen = "",
    steps: params.Steps = None,
    order: params.Order = None,
    sampler: params.Sampler = None,
    draft_temperature: params.DraftTemperature = None,
    tree: params.Tree = None,
    verifier: params.VerifierName = "token",
    drafter_device: params.DrafterDevice = None,
    max_tokens: params.MaxTokens = 256,
    temperature: params.Temperature = None,
    top_k: params.TopK = None,
    top_p: params.TopP = None,
    min_p: params.MinP = None,
    repetition_penalty: params.RepetitionPenalty = None,
    presence_penalty: params.PresencePenalty = 0.0,
    frequency_penalty: params.FrequencyPenalty = 0.0,
    logit_bias: Annotated[
        str, params.option("ID=VALUE,... with values from -100 to 100.", panel=params.SAMPLING)
    ] = "",
    allowed_token_ids: Annotated[
        str, params.option("ID,...: no other tokens.", panel=params.SAMPLING)
    ] = "",
    json_schema: Annotated[
        str | None,
        params.option("The answer is JSON of this schema: FILE or text.", panel=params.SAMPLING),
    ] = None,
    regex: Annotated[
        str | None, params.option("The answer matches this.", panel=params.SAMPLING)
    ] = None,
    grammar: Annotated[
        Path | None, params.option("The answer is of this Lark FILE.", panel=params.SAMPLING)
    ] = None,
    stop: params.Stop = None,
    ignore_eos: Annotated[
        bool,
        params.flag("Continue past the end of text.", "--ignore-eos", panel=params.SAMPLING),
    ] = False,
    seed: params.Seed = None,
    show_accepted: params.ShowAccepted = False,
    compare: Annotated[
        bool,
        params.flag("Also decode plainly, and compare.", "--compare", panel=params.OUTPUT),
    ] = False,
    logprobs: Annotated[
        int | None,
        params.option(
            "With --json: also logprobs and the top N alternatives.", panel=params.OUTPUT
        ),
    ] = None,
    as_json: params.Json = False,
    quiet: params.Quiet = False,
    config: params.Config = None,
) -> None:
    """Answer PROMPT, streaming (the default verb).

    Example:  echo "Write a haiku" | specdiff generate - --temperature 0 --compare
    """
    text = _standard_input() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError(
            "the prompt is empty; give some text, or pipe it into 'specdiff generate -'"
        )
    options = params.without_unset(
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": params.biases(logit_bias),
            "allowed_token_ids": params.token_ids(allowed_token_ids),
            "json_schema": None if json_schema is None else params.text_or_file(json_schema),
            "regex": regex,
            "grammar": None if grammar is None else params.file_text("--grammar", grammar),
            "stop": stop or (),
            "logprobs": logprobs,
            "verifier": verifier,
            "draft_len": params.draft_length(draft_len),
            "ignore_eos": ignore_eos,
            "raw": raw,
            "system": system,
        }
    )
    loading: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "threads": params.thread_count(threads),
        "compile": params.compile_mode(compile, no_compile),
        "max_len": max_model_len,
        "drafter_device": drafter_device,
        "drafter_options": params.drafter_options(steps, order, sampler, draft_temperature, tree),
        "model_options": params.json_object("--model-options", model_options),
        **params.sampling_defaults(generation_config),
    }
    terminal.quiet_libraries()
    import specdiff

    notes = terminal.notes(quiet=quiet)
    with terminal.status(notes, f"loading {model}"):
        lm = specdiff.load(model, drafter, **loading)
    out = None if as_json else terminal.page()
    begin = time.perf_counter()
    answer, interrupted = _stream(lm.stream(text, **options), out, show_accepted)
    seconds = time.perf_counter() - begin
    report = _report(answer, seconds, logprobs=logprobs is not None)
    report |= {"model": model, "drafter": drafter}
    notes.print(footer("specdiff", answer, seconds), style="dim", soft_wrap=True)
    try:
        if compare and not interrupted:
            from specdiff.text.comparison import compare as with_plain

            report["compare"] = None
            with notes.status("decoding plainly, and both once more"):
                comparison = with_plain(lm, text, options, answer, seconds)
            report["compare"] = asdict(comparison)
            if temperature is None:
                temperature = lm.defaults.get("temperature", 1.0)
            notes.print(verdict(comparison, temperature, verifier), style="dim", soft_wrap=True)
    finally:  # the answer is reported however the comparison ends
        if as_json:
            terminal.print_json(report)
    if interrupted:
        raise typer.Exit(130)


def _standard_input() -> str:
    terminal.prepare_input()
    return sys.stdin.read()


def _stream(
    chunks: "Iterator[Chunk]", out: "Console | None", show_accepted: bool
) -> tuple["Generation", bool]:
    """Print chunks as they come; Ctrl-C keeps the text so far.

    Returns the answer, and whether it was interrupted.
    """
    from specdiff.text.generation import Generation

    answer = Generation()
    interrupted = False
    try:
        for chunk in chunks:
            answer = chunk.generation
            if out is not None:
                show(chunk, out, show_accepted)
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
        interrupted = True
    finally:
        if out is not None and (answer.text or sys.exception() is None):
            out.file.write("\n")
    return answer, interrupted


def _report(answer: "Generation", seconds: float, *, logprobs: bool) -> dict[str, Any]:
    """The JSON object of an answer."""
    report: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "accepted": answer.accepted,
        "finish_reason": answer.finish_reason,
        "stats": answer.stats.as_dict(),
        "seconds": seconds,
        "tokens_per_second": len(answer.token_ids) / max(seconds, 1e-9),
    }
    if logprobs:
        report |= {"logprobs": answer.logprobs, "top_logprobs": answer.top_logprobs}
    return report
