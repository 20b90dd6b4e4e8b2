"""`specdiff chat`: a streaming conversation; each turn processes only its new tokens."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import typer

from specdiff.cli import params, terminal
from specdiff.cli.chat_repl import ChatRepl


def chat(
    ctx: typer.Context,
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
    drafter: params.DrafterSpec = "auto",
    draft_len: params.DraftLen = "",
    steps: params.Steps = None,
    order: params.Order = None,
    sampler: params.Sampler = None,
    draft_temperature: params.DraftTemperature = None,
    tree: params.Tree = None,
    verifier: params.VerifierName = "token",
    drafter_device: params.DrafterDevice = None,
    max_tokens: params.MaxTokens = 512,
    temperature: params.Temperature = None,
    top_k: params.TopK = None,
    top_p: params.TopP = None,
    min_p: params.MinP = None,
    repetition_penalty: params.RepetitionPenalty = None,
    presence_penalty: params.PresencePenalty = 0.0,
    frequency_penalty: params.FrequencyPenalty = 0.0,
    stop: params.Stop = None,
    seed: params.Seed = None,
    show_accepted: params.ShowAccepted = False,
    quiet: params.Quiet = False,
    config: params.Config = None,
) -> None:
    """Chat with MODEL; each line is a turn.

    !help lists the commands, Ctrl-C stops an answer and keeps it, Ctrl-D leaves.

    Example:  printf 'Name a river.\\nAnd a lake?\\n' | specdiff chat --temperature 0
    """
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": stop or (),
        "seed": seed,
        "verifier": verifier,
        "draft_len": params.draft_length(draft_len),
        "steps": steps,
        "order": order,
        "sampler": sampler,
        "draft_temperature": draft_temperature,
        "tree": tree,
        "show_accepted": show_accepted,
    }
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
    terminal.prepare_input()
    terminal.quiet_libraries()
    import specdiff

    notes = terminal.notes()
    with terminal.status(notes, f"loading {model}"):
        lm = specdiff.load(model, drafter, **loading)
        lm.render([{"role": "user", "content": "?"}])  # raises without a chat template
    conversation = specdiff.Conversation(lm, system)
    names = {"model": model, "drafter": drafter}
    out = terminal.page()
    repl = ChatRepl(conversation, settings, names, out, notes, quiet, debug=bool(ctx.obj))
    try:
        repl.run(_lines(quiet))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _lines(quiet: bool) -> Iterator[str]:
    """Lines of a terminal, with editing and history, or of a pipe, without a prompt.

    Ctrl-C and Ctrl-D end them.
    """
    try:
        if not sys.stdin.isatty():
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with suppress(ImportError):
            import readline  # noqa: F401
        if not quiet:
            hint = "!help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
            print(hint, file=sys.stderr)
        while True:
            yield _line()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)


def _line() -> str:
    """One line after a prompt, which is never written into a pipe."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()
