"""A chat at the terminal: its settings, its commands, and answers that Ctrl-C stops."""

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
from specdiff.cli.options import draft_length, given
from specdiff.cli.reporting import complain
from specdiff.cli.stream import footer, show
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.text.conversation import Conversation

COMMANDS = {
    "!help": "these lines",
    "!set NAME VALUE": "change a setting from the next answer on (alone: list them)",
    "!status": "what the conversation came to so far",
    "!clear": "forget the conversation, keep the settings",
    "!save FILE.json": "write messages, settings and numbers",
    "!exit": "leave (so do Ctrl-D, and Ctrl-C at the prompt)",
}
OF_THE_DRAFTER = ("steps", "order", "sampler", "draft_temperature")


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError
    return text == "on"


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "default" else read(text)


NUMBER, WHOLE, NAME = (float, "a number"), (int, "a whole number"), (str, "a name")
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
    "show_accepted": (_switch, "on or off"),
}


class Session:
    """`run` it on lines: each is a turn, or a command if it begins with "!". What fails costs one line on stderr, and it goes on.

    settings: every name of SETTINGS with its value (None: unset), and `stop`. about: what `!save` and `!status` name besides.
    """

    def __init__(
        self,
        conversation: "Conversation",
        settings: dict[str, Any],
        about: dict[str, str],
        out: "Console",
        notes: "Console",
        quiet: bool,
        *,
        debug: bool = False,
    ) -> None:
        self.debug = debug
        self.conversation, self.settings, self.about, self.out, self.notes, self.quiet = (
            conversation,
            settings,
            about,
            out,
            notes,
            quiet,
        )
        self.seconds, self.answers = 0.0, 0
        self.commands: dict[str, Callable[[str], None]] = {
            "!help": self._help, "!set": self._set, "!status": self._status, "!clear": self._clear, "!save": self._save,
        }  # fmt: skip
        self._check(settings)

    def run(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                name, _, rest = line.strip().partition(" ")
                if name and (
                    not line.startswith("!") or "\n" in line
                ):  # a paste of several lines is a message
                    self._answer(line)
                elif name == "!exit":
                    return
                elif name:
                    self._command(name, rest.strip())
            except BrokenPipeError:
                raise
            except Exception as error:  # whatever it is, the conversation is worth more
                unwritten = None if sys.stdin.isatty() else terminal.output_error(error)
                if unwritten is not None:  # and nobody is there to !save
                    raise unwritten from error
                complain(error, debug=self.debug)

    def _answer(self, line: str) -> None:
        before, begin, piece = replace(self.conversation.reading), time.perf_counter(), None
        with stopping(self.conversation):
            try:
                for piece in self.conversation.say(line.strip("\n"), **_asked(self.settings)):
                    show(piece, self.out, self.settings["show_accepted"])
            finally:
                if piece is not None:
                    self.out.file.write("\n")
                    self.out.file.flush()
        if piece is None:
            return
        took, after = time.perf_counter() - begin, self.conversation.reading
        self.seconds, self.answers = self.seconds + took, self.answers + 1
        reused, read = after.reused - before.reused, after.read - before.read
        cut = {"length": " (cut at max_tokens or the model's length)", "interrupted": " (stopped)"}
        if not self.quiet:
            told = f"{footer('specdiff', piece.generation, took)}; {reused} of {reused + read} prompt tokens reused"
            self._note(told + cut.get(piece.generation.finish_reason, ""))

    def _command(self, name: str, rest: str) -> None:
        if name not in self.commands:
            known = ", ".join(command.split()[0] for command in COMMANDS)
            raise UsageError(
                f"unknown command {name!r}; known are {known} (a message may begin with a space)"
            )
        self.commands[name](rest)

    def _help(self, rest: str) -> None:
        for command, does in COMMANDS.items():
            self._note(f"{command:16} {does}")

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            for known in SETTINGS:
                self._note(f"{known:18} {_plain(self.settings[known])}")
            return
        if name not in SETTINGS:
            raise UsageError(f"unknown setting {name!r}; known are {', '.join(SETTINGS)}")
        read, kind = SETTINGS[name]
        try:
            value = read(text.strip())
            if not text.strip():
                raise ValueError
        except ValueError:
            raise UsageError(
                f"{name} is {_plain(self.settings[name])}; !set takes {kind} for it, not {text.strip()!r}"
            ) from None
        changed = {**self.settings, name: value}
        self._check(changed)
        self.settings = changed

    def _status(self, rest: str) -> None:
        c = self.conversation
        s, r = c.stats, c.reading
        self._note(
            f"{self.about['model']} with drafter {self.about['drafter']}; {self.answers} answers, {len(c.messages)} messages"
        )
        self._note(
            f"{c.size} of {c.lm.max_len} tokens are taken; prompt tokens: {r.read} read, {r.reused} reused"
        )
        self._note(
            f"{s.tokens} tokens in {self.seconds:.1f} s, tau {s.tau:.2f}, accepted {s.accepted} of {s.drafted} drafted"
        )

    def _clear(self, rest: str) -> None:
        self.conversation.clear()

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("!save needs the name of a file to write: !save FILE.json")
        from specdiff import files

        c = self.conversation
        record = {
            **self.about, "messages": c.messages, "settings": self.settings, "seconds": self.seconds,
            "stats": c.stats.as_dict(), "reading": asdict(c.reading),
        }  # fmt: skip
        path = Path(rest).expanduser()
        if path.exists():
            raise UsageError(
                f"{rest} is there already, and nothing is overwritten; give another name"
            )
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {rest}: No such file or directory: {path.parent}")
        files.write_text(
            path, json.dumps(strict_json.plain(record), indent=2, ensure_ascii=False) + "\n"
        )
        self._note(f"saved to {rest}")

    def _check(self, settings: dict[str, Any]) -> None:
        """Raises what an answer with these settings would."""
        from specdiff.text.options import Options

        asked = Options.of(_asked(settings), self.conversation.lm.defaults)
        asked.judge()
        self.conversation.lm.drafting(asked)

    def _note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False, soft_wrap=True)


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as `say` takes them."""
    drafting = given({name: settings[name] for name in OF_THE_DRAFTER})
    rest = {
        name: value
        for name, value in settings.items()
        if name not in (*OF_THE_DRAFTER, "show_accepted")
    }
    return {**given(rest), "drafter_options": drafting}


def _plain(value: Any) -> str:
    return (
        "default"
        if value is None
        else {True: "on", False: "off"}[value]
        if isinstance(value, bool)
        else str(value)
    )


@contextmanager
def stopping(conversation: "Conversation") -> Iterator[None]:
    """Inside, the first Ctrl-C stops the answer and keeps it; a second one raises KeyboardInterrupt."""
    usual = signal.getsignal(signal.SIGINT)
    if (
        usual is not signal.default_int_handler
    ):  # ignored, as in a background job, or somebody else's
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
