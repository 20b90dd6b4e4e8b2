"""The pages of the guide, as blocks that can be run."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from specdiff import cli

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs"
SHELL = re.compile(r"[|<>]")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    `note` follows the language: `skip`, `fails`, or the name under which the reader saves the
    block.
    """

    language: str
    note: str
    text: str

    @property
    def known(self) -> bool:
        """Of a kind that `perform` or `understood` deals with."""
        if self.language == "sh":
            return self.note in ("", "skip", "fails")
        return self.language == "python" or bool(self.note)

    def lines(self) -> list[str]:
        return [
            line
            for line in self.text.replace("\\\n", " ").splitlines()
            if shlex.split(line, comments=True)
        ]

    def commands(self) -> list[list[str]]:
        return [shlex.split(line, comments=True) for line in self.lines()]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = [
        Block(*parts)
        for parts in re.findall(
            r"^```(\w+) ?(.*?)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE
        )
    ]
    assert len(fences) == text.count("```") // 2, f"{page.name}: a block without a language"
    return fences


def perform(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reader does with it in the current folder."""
    if block.note and block.language != "sh":
        Path(block.note).write_text(block.text)
    elif block.language == "python":
        exec(block.text, {})
    else:
        for line in block.lines():
            _command(line, 1 if block.note == "fails" else 0, monkeypatch)


def _command(line: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block as a shell does; specdiff commands run in this process if no shell is needed.

    Importing everything again takes seconds.
    """
    words = shlex.split(line, comments=True)
    if words[0] != "specdiff" or SHELL.search(line):
        ours = f"{shlex.quote(sys.executable)} -m specdiff"
        subprocess.run(["bash", "-c", re.sub(r"(?<!\S)specdiff(?= )", ours, line)], check=True)
        return
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == code, line


def understood(fences: Iterable[Block]) -> int:
    """Parse the skipped specdiff commands: verb, options and their types. Returns their number."""
    verbs: Any = typer.main.get_command(cli.app)
    skipped = itertools.chain.from_iterable(b.commands() for b in fences if b.note == "skip")
    ours = [words for words in skipped if "specdiff" in words]
    for words in ours:
        arguments = words[words.index("specdiff") + 1 :]
        verb = arguments.pop(0) if arguments[0] in verbs.commands else "generate"
        verbs.commands[verb].make_context(verb, arguments)
    return len(ours)
