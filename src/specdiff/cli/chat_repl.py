"""The chat loop of a terminal: settings, commands, and answers that Ctrl-C stops."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdiff import strict_json
from specdiff.cli import terminal
from specdiff.cli.params import draft_length, drafter_options, without_unset
from specdiff.cli.reporting import complain
from specdiff.cli.stream import footer, show
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.text.conversation import Conversation

COMMANDS = {
    "!help": "list the commands",
    "!set NAME VALUE": "change a setting from the next answer on (alone: list them)",
    "!status": "statistics of the conversation so far",
    "!clear": "clear the conversation, keep the settings",
    "!save FILE.json": "write messages, settings and statistics",
    "!exit": "leave (so do Ctrl-D, and Ctrl-C at the prompt)",
}
DRAFTER_OPTIONS = ("steps", "order", "sampler", "draft_temperature", "tree")


ENDINGS = {
    "length": " (stopped at max_tokens or the model's length)",
    "interrupted": " (stopped)",
}


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError
    return text == "on"


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "default" else parse(text)


NUMBER = (float, "a number")
WHOLE = (int, "a whole number")
NAME = (str, "a name")
OPTIONAL_NUMBER = (_optional(float), "a number or default")
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": WHOLE,
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), OPTIONAL_NUMBER),
    "top_k": (_optional(int), "a whole number or default"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), NUMBER),
    "seed": (_optional(int), "a whole number or default"),
    "verifier": NAME,
    "draft_len": (_optional(draft_length), "a whole number, auto or default"),
    "steps": WHOLE,
    **dict.fromkeys(("order", "sampler"), NAME),
    "draft_temperature": NUMBER,
    "tree": WHOLE,
    "show_accepted": (_switch, "on or off"),
}


class ChatRepl:
    """Runs lines: a turn each, or a command if it begins with "!". Errors are a line on stderr.

    settings: every name of SETTINGS with its value (None: unset), and `stop`.
    names: the model and the drafter, for `!save` and `!status`.
    """

    def __init__(
        self,
        conversation: "Conversation",
        settings: dict[str, Any],
        names: dict[str, str],
        out: "Console",
        notes: "Console",
        quiet: bool,
        *,
        debug: bool = False,
    ) -> None:
        self.conversation = conversation
        self.settings = settings
        self.names = names
        self.out = out
        self.notes = notes
        self.quiet = quiet
        self.debug = debug
        self.seconds = 0.0
        self.answers = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "!help": self._help,
            "!set": self._set,
            "!status": self._status,
            "!clear": self._clear,
            "!save": self._save,
        }
        self._check(settings)

    def run(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                name, _, rest = line.strip().partition(" ")
                pasted = "\n" in line  # several lines are a message
                if name and (pasted or not line.startswith("!")):
                    self._answer(line)
                elif name == "!exit":
                    return
                elif name:
                    self._command(name, rest.strip())
            except BrokenPipeError:
                raise
            except Exception as error:  # no error ends a conversation
                output_error = None if sys.stdin.isatty() else terminal.output_error(error)
                if output_error is not None:  # a pipe has no user who could !save
                    raise output_error from error
                complain(error, debug=self.debug)

    def _answer(self, line: str) -> None:
        before = replace(self.conversation.reading)
        begin = time.perf_counter()
        chunk = None
        with stopping(self.conversation):
            try:
                for chunk in self.conversation.say(line.strip("\n"), **_options(self.settings)):
                    show(chunk, self.out, self.settings["show_accepted"])
            finally:
                if chunk is not None:
                    self.out.file.write("\n")
                    self.out.file.flush()
        if chunk is None:
            return
        seconds = time.perf_counter() - begin
        after = self.conversation.reading
        self.seconds += seconds
        self.answers += 1
        if self.quiet:
            return
        reused = after.reused - before.reused
        total = reused + after.read - before.read
        line = footer("specdiff", chunk.generation, seconds)
        ending = ENDINGS.get(chunk.generation.finish_reason, "")
        self._note(f"{line}; {reused} of {total} prompt tokens reused{ending}")

    def _command(self, name: str, rest: str) -> None:
        if name not in self.commands:
            names = ", ".join(command.split()[0] for command in COMMANDS)
            raise UsageError(
                f"unknown command {name!r}; known are {names} "
                "(to send a message that begins with '!', put a space before it)"
            )
        self.commands[name](rest)

    def _help(self, rest: str) -> None:
        for command, description in COMMANDS.items():
            self._note(f"{command:16} {description}")

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            for setting in SETTINGS:
                self._note(f"{setting:18} {_plain(self.settings[setting])}")
            return
        if name not in SETTINGS:
            raise UsageError(f"unknown setting {name!r}; known are {', '.join(SETTINGS)}")
        parse, kind = SETTINGS[name]
        text = text.strip()
        try:
            value = parse(text)
            if not text:
                raise ValueError
        except ValueError:
            current = _plain(self.settings[name])
            raise UsageError(
                f"{name} is {current}; !set takes {kind} for it, not {text!r}"
            ) from None
        settings = {**self.settings, name: value}
        self._check(settings)
        self.settings = settings

    def _status(self, rest: str) -> None:
        c = self.conversation
        s = c.stats
        r = c.reading
        self._note(
            f"{self.names['model']} with drafter {self.names['drafter']}; "
            f"{self.answers} answers, {len(c.messages)} messages"
        )
        self._note(
            f"{c.size} of {c.lm.max_len} tokens are used; "
            f"prompt tokens: {r.read} processed, {r.reused} reused"
        )
        self._note(
            f"{s.tokens} tokens in {self.seconds:.1f} s, tau {s.tau:.2f}, "
            f"accepted {s.accepted} of {s.drafted} drafted"
        )

    def _clear(self, rest: str) -> None:
        self.conversation.clear()

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("!save needs the name of a file: !save FILE.json")
        from specdiff import files

        c = self.conversation
        record = {
            **self.names,
            "messages": c.messages,
            "settings": self.settings,
            "seconds": self.seconds,
            "stats": c.stats.as_dict(),
            "reading": asdict(c.reading),
        }
        path = Path(rest).expanduser()
        if path.exists():
            raise UsageError(f"{rest} exists and is not overwritten; give another name")
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {rest}: No such file or directory: {path.parent}")
        text = json.dumps(strict_json.plain(record), indent=2, ensure_ascii=False)
        files.write_text(path, text + "\n")
        self._note(f"saved to {rest}")

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise the error that an answer with these settings would raise."""
        from specdiff.text.options import Options

        options = Options.of(_options(settings), self.conversation.lm.defaults)
        options.build_verifier()
        self.conversation.lm.drafting(options)

    def _note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False, soft_wrap=True)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as keyword arguments of `Conversation.say`."""
    options = {n: v for n, v in settings.items() if n not in (*DRAFTER_OPTIONS, "show_accepted")}
    drafting = drafter_options(**{name: settings[name] for name in DRAFTER_OPTIONS})
    return {**without_unset(options), "drafter_options": drafting}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None else str(value)


@contextmanager
def stopping(conversation: "Conversation") -> Iterator[None]:
    """Context in which a first Ctrl-C stops and keeps the answer; a second one is an interrupt."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:  # ignored (a background job), or another handler
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, usual)
        conversation.stop()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
