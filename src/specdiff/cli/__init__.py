"""The command line: text on stdout, everything else on stderr.

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. One verb is one file with one
function of that name; heavy imports are inside it, so that `specdiff --help` stays quick.
"""

import atexit
import gc
import os
import re
import sys
import warnings
from typing import Annotated, cast

import typer

import specdiff
from specdiff.cli import params, terminal
from specdiff.cli.bench import bench
from specdiff.cli.bench_report import compare, report
from specdiff.cli.chat import chat
from specdiff.cli.check import check
from specdiff.cli.convert import convert
from specdiff.cli.data import data
from specdiff.cli.env import env
from specdiff.cli.generate import generate
from specdiff.cli.reporting import complain, warn
from specdiff.cli.sample import sample
from specdiff.cli.serve import serve
from specdiff.cli.train import train
from specdiff.errors import UsageError
from specdiff.unicode import valid

# click's UsageError, which typer does not export
CommandLineError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
OPTION = re.compile(r"--?[a-z][a-z0-9-]*(=.*)?", re.DOTALL)
DASHED_PROMPT = (
    "A prompt that begins with '-' goes after '--', or into 'specdiff generate -' as a pipe."
)


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Lossless speculative decoding with discrete diffusion drafters.\n\n"
    'Example:  specdiff "Write a haiku about rain" --temperature 0.8   '
    "(generate is the default verb)",
    context_settings=HELP,
)
for verb in (generate, chat, serve, sample, check, data, train, convert, env):
    app.command(epilog=params.environment(verb))(verb)
benchmark = typer.Typer(
    rich_markup_mode="rich", context_settings=HELP, epilog=params.environment(bench)
)
benchmark.callback(invoke_without_command=True)(bench)
for subcommand in (report, compare):
    benchmark.command()(subcommand)
app.add_typer(benchmark, name="bench")


def main() -> None:
    """Entry point: one clear line for every error and every warning."""
    terminal.prepare()
    # the exit would visit every object of torch and transformers: more than a second of work
    atexit.register(gc.freeze)
    arguments, debug = _debug([_readable(argument) for argument in sys.argv[1:]])
    if arguments and arguments[0] not in (*verbs(), "-h", "--help", "--version"):
        arguments = ["generate", *arguments]
    with warnings.catch_warnings():  # restores showwarning on exit
        warnings.showwarning = warn
        code = _guarded(arguments, debug)
    sys.exit(code)


def _guarded(arguments: list[str], debug: bool) -> int:
    """Run a verb; any exception becomes a line on stderr and an exit code."""
    try:
        code = _run(arguments, debug)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed its end
        terminal.drop_output()
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except CommandLineError as error:
        error.show()
        bad_value = type(error) is typer.BadParameter
        if not bad_value and _looks_like_a_prompt(arguments):
            print(DASHED_PROMPT, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        complain(terminal.output_error(error) or error, debug=debug)
        return 2 if isinstance(error, UsageError) else 1
    return code


def _run(arguments: list[str], debug: bool) -> int:
    """Invoke the command; errors pass through, where typer's runner makes EOFError "Aborted!"."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("specdiff", arguments, obj=debug) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug (before any "--"), and whether it or SPECDIFF_DEBUG is set."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    variable = os.environ.get("SPECDIFF_DEBUG", "").lower() not in ("", "0", "false", "no", "off")
    return [*options, *arguments[end:]], variable or len(options) < end


def _readable(argument: str) -> str:
    """An argument with U+FFFD for undecodable bytes; the path of an existing file is unchanged."""
    flag, equals, value = "", "", argument
    if argument.startswith("--"):
        flag, equals, value = argument.partition("=")
    return argument if os.path.lexists(value) else f"{valid(flag)}{equals}{valid(value)}"


def _looks_like_a_prompt(arguments: list[str]) -> bool:
    """Whether the prompt of `generate` was parsed as an option: "-5 + 3", or a lone "-hello"."""
    if not arguments or arguments[0] != "generate" or "--" in arguments:
        return False
    dashed = [argument for argument in arguments[1:] if argument.startswith("-")]
    dashed = [argument for argument in dashed if argument != "-"]
    if any(not OPTION.fullmatch(argument) for argument in dashed):
        return True
    return len(dashed) == len(arguments) - 1 == 1


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", metavar=""),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            metavar="",
            help="Show the traceback of an error (or set SPECDIFF_DEBUG=1).",
        ),
    ] = False,
) -> None:
    if version:
        print(specdiff.__version__)
        raise typer.Exit


def verbs() -> list[str]:
    """The names of all commands; the first is the default."""
    callbacks = [command.callback for command in app.registered_commands]
    names = [callback.__name__ for callback in callbacks if callback is not None]
    return [*names, *(str(group.name) for group in app.registered_groups)]
