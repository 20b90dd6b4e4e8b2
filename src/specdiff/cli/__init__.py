"""The command line. Text goes to stdout, everything else to stderr; exit code 2 is a usage error, 1 a failure.

One verb is one file with one function of that name; its heavy imports are inside, so that `specdiff --help` stays quick.
"""

import os
import sys
import warnings
from importlib import metadata
from typing import Annotated, TextIO

import typer

from specdiff.cli.bench import bench
from specdiff.cli.bench_more import compare, law, report
from specdiff.cli.chat import chat
from specdiff.cli.check import check
from specdiff.cli.data import data
from specdiff.cli.env import env
from specdiff.cli.generate import generate
from specdiff.cli.sample import sample
from specdiff.cli.train import train
from specdiff.errors import SpecdiffError, UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Lossless speculative decoding with discrete diffusion drafters.\n\n"
    'Example:  specdiff "Write a haiku about rain" --temperature 0.8   (generate is the default verb)',
    context_settings={"auto_envvar_prefix": "SPECDIFF", "help_option_names": ["-h", "--help"]},
)
for verb in (generate, chat, sample, check, data, train, env):
    app.command()(verb)
benchmark = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
benchmark.callback(invoke_without_command=True)(bench)
for beside in (report, compare, law):
    benchmark.command()(beside)
app.add_typer(benchmark, name="bench")


def main() -> None:
    """Entry point: one clear line for every error raised on purpose, and for every warning."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in (*verbs(), "-h", "--help", "--version"):
        arguments = ["generate", *arguments]
    try:
        with warnings.catch_warnings():  # which puts back what is set here
            warnings.showwarning = _told
            app(arguments)
    except SpecdiffError as error:
        print(f"specdiff: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing at exit either
        sys.exit(1)


def _told(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    print(f"specdiff: warning: {message}", file=file or sys.stderr)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(metadata.version("specdiff"))
        raise typer.Exit


def verbs() -> list[str]:
    """The names of all commands; the first is the default one."""
    single = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    return [*single, *(str(group.name) for group in app.registered_groups)]
