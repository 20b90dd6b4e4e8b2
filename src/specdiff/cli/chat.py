"""`specdiff chat`: a conversation, streaming; each turn reads only what is new."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import typer

from specdiff.cli import params as d
from specdiff.cli import terminal
from specdiff.cli.chat_repl import Session
from specdiff.cli.options import (
    draft_length,
    given,
    json_object,
    quiet_libraries,
    sampling_defaults,
)


def chat(
    ctx: typer.Context,
    model: d.Model = "smollm2-135m",
    drafter: d.DrafterSpec = "auto",
    system: d.System = None,
    draft_len: d.DraftLen = "",
    steps: d.Steps = None,
    order: d.Order = None,
    sampler: d.Sampler = None,
    draft_temperature: d.DraftTemperature = None,
    verifier: d.VerifierName = "token",
    max_tokens: d.MaxTokens = 512,
    temperature: d.Temperature = None,
    top_k: d.TopK = None,
    top_p: d.TopP = None,
    min_p: d.MinP = None,
    repetition_penalty: d.RepetitionPenalty = None,
    presence_penalty: d.PresencePenalty = 0.0,
    frequency_penalty: d.FrequencyPenalty = 0.0,
    stop: d.Stop = None,
    seed: d.Seed = None,
    device: d.Device = "auto",
    drafter_device: d.DrafterDevice = None,
    model_options: d.ModelOptions = "{}",
    dtype: d.Dtype = "auto",
    generation_config: d.GenerationConfig = "auto",
    max_model_len: d.MaxModelLen = 2048,
    show_accepted: d.ShowAccepted = False,
    quiet: d.Quiet = False,
) -> None:
    """Converse with MODEL: a line is a turn, !help lists the commands, Ctrl-C stops an answer and keeps it, Ctrl-D leaves.

    Example:  printf 'Name a river.\\nAnd a lake?\\n' | specdiff chat --temperature 0
    """
    settings: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "stop": stop or (), "seed": seed, "verifier": verifier, "draft_len": draft_length(draft_len), "steps": steps, "order": order,
        "sampler": sampler, "draft_temperature": draft_temperature, "show_accepted": show_accepted,
    }  # fmt: skip
    places: dict[str, Any] = {
        "device": device,
        "drafter_device": drafter_device,
        "model_options": json_object("--model-options", model_options),
        **sampling_defaults(generation_config),
    }
    chosen = given(
        {"steps": steps, "order": order, "sampler": sampler, "draft_temperature": draft_temperature}
    )
    terminal.prepare_input()
    quiet_libraries()
    import specdiff

    notes = terminal.notes()
    with terminal.status(notes, f"loading {model}"):
        lm = specdiff.load(
            model, drafter, dtype=dtype, max_len=max_model_len, drafter_options=chosen, **places
        )
        lm.render(
            [{"role": "user", "content": "?"}]
        )  # a model that cannot converse is told before anything is typed
    conversation = specdiff.Conversation(lm, system)
    about = {"model": model, "drafter": drafter}
    session = Session(
        conversation, settings, about, terminal.page(), notes, quiet, debug=bool(ctx.obj)
    )
    try:
        session.run(_lines(quiet))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _lines(quiet: bool) -> Iterator[str]:
    """What is typed, with line editing and history; or a pipe's lines, without any prompt. Ctrl-C and Ctrl-D end it."""
    try:
        if not sys.stdin.isatty():
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with suppress(ImportError):
            import readline  # noqa: F401
        if not quiet:
            print(
                "!help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr
            )
        while True:
            yield _typed()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)


def _typed() -> str:
    """One line behind a prompt, which never goes into a pipe."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()
