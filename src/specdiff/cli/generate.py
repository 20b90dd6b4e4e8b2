"""`specdiff generate`: answer one prompt, streaming."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli.options import biases, given, json_object, quiet_libraries, token_ids
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.generation import Generation, Piece
    from specdiff.lm import SpeculativeLM


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, file.gguf or built-in name.")] = "smollm2-135m",
    drafter: Annotated[
        str, typer.Option(help="auto, none, ngram, sedd, autoregressive, a folder or hub id, module:Class, ./file.py:Class.")
    ] = "auto",
    draft_len: Annotated[str, typer.Option(help="Tokens per draft, or auto: no drafting while it does not pay. Default: see --seed.")] = "",
    steps: Annotated[int | None, typer.Option(help="Network passes per draft (T).")] = None,
    order: Annotated[str | None, typer.Option(help="one-shot, left-to-right or any.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Of order any: analytic or euler.")] = None,
    draft_temperature: Annotated[float | None, typer.Option(help="Sharpens or flattens drafts; always lossless.")] = None,
    verifier: Annotated[str, typer.Option(help="token, block, match or match-gumbel.")] = "token",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="On tokens of prompt and answer; 1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="On tokens of the answer, once each; 0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="On tokens of the answer, each time; 0 is off.")] = 0.0,
    logit_bias: Annotated[str, typer.Option(help="ID=VALUE,... with values in [-100, 100].")] = "",
    allowed_token_ids: Annotated[str, typer.Option(help="ID,...: no other tokens.")] = "",
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log probabilities, and so many alternatives (<= 20).")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text; also fixes the draft length (else it is auto).")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    drafter_device: Annotated[str | None, typer.Option(help="Where the drafter runs; default: with the target.")] = None,
    model_options: Annotated[str, typer.Option(help='How the target is loaded, as JSON: {"device_map": "auto", ...}.')] = "{}",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    max_model_len: Annotated[int, typer.Option(help="Most tokens of prompt and answer together.")] = 2048,
    show_accepted: Annotated[bool, typer.Option("--show-accepted", help="Colour the tokens that came from the draft.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly too; compare tokens and speed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No footer.")] = False,
) -> None:
    """Answer PROMPT, streaming.

    Example:  echo "Write a haiku" | specdiff generate - --temperature 0 --compare
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty; give some text, or pipe it into 'specdiff generate -'")
    chosen = {"steps": steps, "order": order, "sampler": sampler, "draft_temperature": draft_temperature}
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "logit_bias": biases(logit_bias), "allowed_token_ids": token_ids(allowed_token_ids), "stop": stop or (), "logprobs": logprobs,
        "verifier": verifier, "draft_len": _draft_length(draft_len), "ignore_eos": ignore_eos, "raw": raw, "system": system,
    }  # fmt: skip
    places: dict[str, Any] = {
        "device": device,
        "drafter_device": drafter_device,
        "model_options": json_object("--model-options", model_options),
    }
    quiet_libraries()
    from rich.console import Console

    import specdiff

    notes = Console(stderr=True, highlight=False, quiet=quiet)
    with notes.status(f"loading {model}"):
        lm = specdiff.load(model, drafter, dtype=dtype, max_len=max_model_len, drafter_options=given(chosen), **places)
        lm.encode(text, raw=raw, system=system)  # a bad prompt is told before anything is generated
    out = Console(highlight=False, soft_wrap=True, quiet=as_json)
    begin = time.perf_counter()
    answer, interrupted = _stream(lm.stream(text, **options), out, show_accepted)
    seconds = time.perf_counter() - begin
    report: dict[str, Any] = {
        "model": model,
        "drafter": drafter,
        "seconds": seconds,
        "tokens_per_second": len(answer.token_ids) / max(seconds, 1e-9),
    }
    notes.print(_footer("specdiff", answer, seconds), style="dim", soft_wrap=True)
    if compare and not interrupted:
        with notes.status("decoding plainly, and both once more"):
            report["compare"] = _compare(lm, text, options, answer, seconds)
        notes.print(_verdict(report["compare"], temperature, verifier), style="dim", soft_wrap=True)
    if as_json:
        told = {} if logprobs is None else {"logprobs": answer.logprobs, "top_logprobs": answer.top_logprobs}
        print(json.dumps({"text": answer.text, "token_ids": answer.token_ids, "accepted": answer.accepted}
                         | {"finish_reason": answer.finish_reason, "stats": answer.stats.as_dict()} | told | report))  # fmt: skip
    if interrupted:
        raise typer.Exit(130)


def _draft_length(text: str) -> int | str | None:
    if text in ("", "auto"):
        return text or None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--draft-len must be a whole number of at least 1 or 'auto', not {text!r}") from None


def _stream(pieces: "Iterator[Piece]", out: "Console", show_accepted: bool) -> tuple["Generation", bool]:
    """Print as it comes. Ctrl-C keeps what was generated. Returns the answer, and whether it was cut short."""
    from specdiff.generation import Generation

    answer = Generation()
    try:
        for piece in pieces:
            answer = piece.generation
            out.print(piece.text, end="", markup=False, style="green" if show_accepted and piece.accepted else None)
            out.file.flush()
    except KeyboardInterrupt:
        out.print()
        answer.finish_reason = "interrupted"
        return answer, True
    out.print()
    return answer, False


def _footer(name: str, answer: "Generation", seconds: float) -> str:
    s = answer.stats
    drafted = f"tau {s.tau:.2f}, accepted {s.accepted} of {s.drafted} drafted tokens in {s.rounds} rounds"
    if s.plain_rounds:
        drafted += f" ({s.plain_rounds} without drafting)"
    if s.faults:
        drafted += "; the drafter broke, and rested from then on"
    rate = len(answer.token_ids) / max(seconds, 1e-9)
    return f"{name}: {len(answer.token_ids)} tokens in {seconds:.1f} s, {rate:.1f} tok/s; {drafted}"


def _compare(lm: "SpeculativeLM", text: str, options: dict[str, Any], answer: "Generation", seconds: float) -> dict[str, Any]:
    """Alternate plain and speculative runs in this process; tokens per second of each, medians."""
    from specdiff.lm import SpeculativeLM

    plain = SpeculativeLM(lm.target, "none", lm.tokenizer, lm.max_len)

    def timed(run: Callable[[], Any]) -> tuple[Any, float]:
        begin = time.perf_counter()
        return run(), time.perf_counter() - begin

    rates: dict[str, list[float]] = {"plain": [], "speculative": [len(answer.token_ids) / max(seconds, 1e-9)]}
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
    ratio, drafted_always = speed["speculative"] / speed["plain"], answer.stats.drafted > 0 and not answer.stats.plain_rounds
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
