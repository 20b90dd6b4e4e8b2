"""`specdiff generate`: answer one prompt, streaming."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params as d
from specdiff.cli import terminal
from specdiff.cli.options import (
    biases,
    draft_length,
    given,
    json_object,
    quiet_libraries,
    sampling_defaults,
    token_ids,
)
from specdiff.cli.stream import footer, show
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.text.generation import Chunk, Generation
    from specdiff.text.lm import SpeculativeLM


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: d.Model = "smollm2-135m",
    drafter: d.DrafterSpec = "auto",
    draft_len: d.DraftLen = "",
    steps: d.Steps = None,
    order: d.Order = None,
    sampler: d.Sampler = None,
    draft_temperature: d.DraftTemperature = None,
    verifier: d.VerifierName = "token",
    max_tokens: d.MaxTokens = 256,
    temperature: d.Temperature = None,
    top_k: d.TopK = None,
    top_p: d.TopP = None,
    min_p: d.MinP = None,
    repetition_penalty: d.RepetitionPenalty = None,
    presence_penalty: d.PresencePenalty = 0.0,
    frequency_penalty: d.FrequencyPenalty = 0.0,
    logit_bias: Annotated[str, typer.Option(help="ID=VALUE,... with values in [-100, 100].")] = "",
    allowed_token_ids: Annotated[str, typer.Option(help="ID,...: no other tokens.")] = "",
    stop: d.Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log probabilities, and so many alternatives (<= 20)."),
    ] = None,
    seed: d.Seed = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end of text.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")
    ] = False,
    system: d.System = None,
    device: d.Device = "auto",
    drafter_device: d.DrafterDevice = None,
    model_options: d.ModelOptions = "{}",
    dtype: d.Dtype = "auto",
    generation_config: d.GenerationConfig = "auto",
    max_model_len: d.MaxModelLen = 2048,
    show_accepted: d.ShowAccepted = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode plainly too; compare tokens and speed.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming.")
    ] = False,
    quiet: d.Quiet = False,
) -> None:
    """Answer PROMPT, streaming.

    Example:  echo "Write a haiku" | specdiff generate - --temperature 0 --compare
    """
    text = _standard_input() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError(
            "the prompt is empty; give some text, or pipe it into 'specdiff generate -'"
        )
    chosen = {
        "steps": steps,
        "order": order,
        "sampler": sampler,
        "draft_temperature": draft_temperature,
    }
    options = given({
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "logit_bias": biases(logit_bias), "allowed_token_ids": token_ids(allowed_token_ids), "stop": stop or (), "logprobs": logprobs,
        "verifier": verifier, "draft_len": draft_length(draft_len), "ignore_eos": ignore_eos, "raw": raw, "system": system,
    })  # fmt: skip
    places: dict[str, Any] = {
        "device": device,
        "drafter_device": drafter_device,
        "model_options": json_object("--model-options", model_options),
        **sampling_defaults(generation_config),
    }
    quiet_libraries()
    import specdiff

    notes = terminal.notes(quiet=quiet)
    with terminal.status(notes, f"loading {model}"):
        lm = specdiff.load(
            model,
            drafter,
            dtype=dtype,
            max_len=max_model_len,
            drafter_options=given(chosen),
            **places,
        )
        lm.encode(text, raw=raw, system=system)  # a bad prompt is told before anything is generated
    out = None if as_json else terminal.page()
    begin = time.perf_counter()
    answer, interrupted = _stream(lm.stream(text, **options), out, show_accepted)
    seconds = time.perf_counter() - begin
    report: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "accepted": answer.accepted,
        "finish_reason": answer.finish_reason,
        "stats": answer.stats.as_dict(),
    }
    if logprobs is not None:
        report |= {"logprobs": answer.logprobs, "top_logprobs": answer.top_logprobs}
    report |= {
        "model": model,
        "drafter": drafter,
        "seconds": seconds,
        "tokens_per_second": len(answer.token_ids) / max(seconds, 1e-9),
    }
    notes.print(footer("specdiff", answer, seconds), style="dim", soft_wrap=True)
    try:
        if compare and not interrupted:
            report["compare"] = None
            with notes.status("decoding plainly, and both once more"):
                report["compare"] = _compare(lm, text, options, answer, seconds)
            heat = lm.defaults.get("temperature", 1.0) if temperature is None else temperature
            notes.print(_verdict(report["compare"], heat, verifier), style="dim", soft_wrap=True)
    finally:  # whatever ends the comparison, the answer is there
        if as_json:
            terminal.print_json(report)
    if interrupted:
        raise typer.Exit(130)


def _standard_input() -> str:
    terminal.prepare_input()
    return sys.stdin.read()


def _stream(
    pieces: "Iterator[Chunk]", out: "Console | None", show_accepted: bool
) -> tuple["Generation", bool]:
    """Print as it comes. Ctrl-C keeps what was generated. Returns the answer, and whether it was cut short."""
    from specdiff.text.generation import Generation

    answer = Generation()
    interrupted = False
    try:
        for piece in pieces:
            answer = piece.generation
            if out is not None:
                show(piece, out, show_accepted)
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
        interrupted = True
    finally:
        if out is not None and (answer.text or sys.exception() is None):
            out.file.write("\n")
    return answer, interrupted


def _compare(
    lm: "SpeculativeLM", text: str, options: dict[str, Any], answer: "Generation", seconds: float
) -> dict[str, Any]:
    """Alternate plain and speculative runs in this process; tokens per second of each, medians."""
    from specdiff.text.lm import SpeculativeLM

    plain = SpeculativeLM(lm.target, "none", lm.tokenizer, lm.max_len)

    def timed(run: Callable[[], Any]) -> tuple[Any, float]:
        begin = time.perf_counter()
        return run(), time.perf_counter() - begin

    rates: dict[str, list[float]] = {
        "plain": [],
        "speculative": [len(answer.token_ids) / max(seconds, 1e-9)],
    }
    without = answer
    for _ in range(2):
        without, took = timed(lambda: plain.generate(text, **options | {"draft_len": None}))
        rates["plain"].append(len(without.token_ids) / took)
        again, took = timed(lambda: lm.generate(text, **options))
        rates["speculative"].append(len(again.token_ids) / took)
    speed = {name: statistics.median(values) for name, values in rates.items()}
    pairs = zip(answer.token_ids, without.token_ids, strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if differs is None and len(answer.token_ids) != len(without.token_ids):
        differs = min(len(answer.token_ids), len(without.token_ids))
    ratio, drafted_always = (
        speed["speculative"] / speed["plain"],
        answer.stats.drafted > 0 and not answer.stats.plain_rounds,
    )
    return {
        "plain_tokens_per_second": speed["plain"],
        "speculative_tokens_per_second": speed["speculative"],
        "ratio": ratio,
        # what a drafting round costs in plain steps; plain rounds in between would blur it
        "break_even_tau": answer.stats.tau / ratio if drafted_always else None,
        "same_tokens": differs is None,
        "first_difference": differs,
    }


def _verdict(c: dict[str, Any], temperature: float, verifier: str) -> str:
    if c["same_tokens"]:
        same = "the same tokens"
    elif temperature > 0 and not verifier.startswith("match"):
        same = f"other tokens from position {c['first_difference']} on, of the same law (--verifier match --seed N gives the same tokens)"
    else:
        same = f"OTHER TOKENS from position {c['first_difference']} on (near-ties in a low-precision dtype can do this)"
    faster = "faster" if c["ratio"] >= 1 else "SLOWER"
    if c["break_even_tau"] is not None:
        faster += f", break-even tau {c['break_even_tau']:.2f}"
    return (
        f"plain: {c['plain_tokens_per_second']:.1f} tok/s, {same}\n"
        f"speculative / plain: {c['ratio']:.2f}x ({faster}; medians of alternating runs in this process)"
    )
