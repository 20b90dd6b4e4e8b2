"""The command line. Text goes to stdout, everything else to stderr; exit code 2 is a usage error, 1 a failure.

One verb is one file with one function of that name; its heavy imports are inside, so that `specdiff --help` stays quick.
"""

import os
import re
import sys
import warnings
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

import specdiff
from specdiff.cli import terminal
from specdiff.cli.bench import bench
from specdiff.cli.bench_report import compare, report
from specdiff.cli.chat import chat
from specdiff.cli.check import check
from specdiff.cli.data import data
from specdiff.cli.env import env
from specdiff.cli.generate import generate
from specdiff.cli.reporting import complain, warn
from specdiff.cli.sample import sample
from specdiff.cli.train import train
from specdiff.errors import UsageError
from specdiff.unicode import valid

CommandLineError = cast(
    "type[typer.BadParameter]", typer.BadParameter.__mro__[1]
)  # click's UsageError, which typer does not export
OPTION = re.compile(r"--?[a-z][a-z0-9-]*(=.*)?", re.DOTALL)


class Verb(TyperCommand):
    """A command whose --help no environment variable sets off."""

    def get_help_option(self, ctx: Any) -> Any:
        return _not_from_environment(super().get_help_option(ctx))


class Verbs(TyperGroup):
    """A group of them."""

    def get_help_option(self, ctx: Any) -> Any:
        return _not_from_environment(super().get_help_option(ctx))


def _not_from_environment(option: Any) -> Any:
    if option is not None:
        option.allow_from_autoenv = False
    return option


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Lossless speculative decoding with discrete diffusion drafters.\n\n"
    'Example:  specdiff "Write a haiku about rain" --temperature 0.8   (generate is the default verb)',
    context_settings={"auto_envvar_prefix": "SPECDIFF", "help_option_names": ["-h", "--help"]},
)
for verb in (generate, chat, sample, check, data, train, env):
    app.command(cls=Verb)(verb)
benchmark = typer.Typer(
    cls=Verbs, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
)
benchmark.callback(invoke_without_command=True)(bench)
for subcommand in (report, compare):
    benchmark.command(cls=Verb)(subcommand)
app.add_typer(benchmark, name="bench")


def main() -> None:
    """Entry point: one clear line for every error and every warning."""
    terminal.prepare()
    arguments, debug = _debug([_readable(argument) for argument in sys.argv[1:]])
    if arguments and arguments[0] not in (*verbs(), "-h", "--help", "--version"):
        arguments = ["generate", *arguments]
    with warnings.catch_warnings():  # which puts back what is set here
        warnings.showwarning = warn
        code = _guarded(arguments, debug)
    sys.exit(code)


def _guarded(arguments: list[str], debug: bool) -> int:
    """Run a verb; whatever it raises becomes a line on stderr and an exit code."""
    try:
        code = _run(arguments, debug)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left
        terminal.drop_output()
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except CommandLineError as error:
        error.show()
        if type(error) is not typer.BadParameter and _looks_like_a_prompt(
            arguments
        ):  # not the value of an option
            print(
                "A prompt that begins with '-' goes after '--', or into 'specdiff generate -' as a pipe.",
                file=sys.stderr,
            )
        return error.exit_code
    except Exception as error:
        complain(terminal.output_error(error) or error, debug=debug)
        return 2 if isinstance(error, UsageError) else 1
    return code


def _run(arguments: list[str], debug: bool) -> int:
    """What typer's own runner does, but errors arrive as they are: it would turn EOFError into "Aborted!"."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("specdiff", arguments, obj=debug) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, which may stand anywhere before a "--", and whether it or SPECDIFF_DEBUG is set."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    variable = os.environ.get("SPECDIFF_DEBUG", "").lower() not in ("", "0", "false", "no", "off")
    return [*options, *arguments[end:]], variable or len(options) < end


def _readable(argument: str) -> str:
    """An argument with U+FFFD for bytes that are no text; the path of a file whose name holds such bytes stays as it is."""
    flag, equals, value = (
        argument.partition("=") if argument.startswith("--") else ("", "", argument)
    )
    return argument if os.path.lexists(value) else f"{valid(flag)}{equals}{valid(value)}"


def _looks_like_a_prompt(arguments: list[str]) -> bool:
    """Whether `generate` was called with a prompt that was read as an option: "-5 + 3", or a lone "-hello"."""
    if not arguments or arguments[0] != "generate" or "--" in arguments:
        return False
    dashed = [
        argument for argument in arguments[1:] if argument.startswith("-") and argument != "-"
    ]
    return any(not OPTION.fullmatch(argument) for argument in dashed) or (
        len(dashed) == len(arguments) - 1 == 1
    )


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", allow_from_autoenv=False),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error; before or after the verb, or SPECDIFF_DEBUG=1.",
            allow_from_autoenv=False,
        ),
    ] = False,
) -> None:
    if version:
        print(specdiff.__version__)
        raise typer.Exit


def verbs() -> list[str]:
    """The names of all commands; the first is the default one."""
    single = [
        command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    ]
    return [*single, *(str(group.name) for group in app.registered_groups)]
