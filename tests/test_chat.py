"""`specdiff chat` as users see it: piped lines, commands, and Ctrl-C during an answer."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import tiny
from specdiff import Conversation, SpeculativeLM, cli
from specdiff.cli.chat_repl import COMMANDS, SETTINGS, stopping
from specdiff.targets.causal import CausalTarget
from test_lm import VOCAB, tokenizer  # noqa: F401

POSITIONS = 6000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama", vocab=VOCAB, positions=POSITIONS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path, tokenizer: Any) -> SpeculativeLM:
    return SpeculativeLM(
        CausalTarget(tiny.model("llama", vocab=VOCAB, positions=POSITIONS)),
        "none",
        tokenizer,
        max_len=200,
    )


@pytest.fixture
def here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Chat in this process, the lines as standard input: (exit code, stdout, stderr)."""

    def run(lines: str | bytes, *arguments: str) -> tuple[int, str, str]:
        text = lines if isinstance(lines, bytes) else lines.encode()
        base = [
            "--model",
            str(folder),
            "--drafter",
            "none",
            "--temperature",
            "0",
            "--max-tokens",
            "7",
            "--max-model-len",
            "200",
        ]
        monkeypatch.setattr(sys, "argv", ["specdiff", "chat", *base, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def process(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """The command with the SIGINT handler of a terminal: a background shell ignores the signal."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from specdiff.cli import main; main()"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        "chat",
        "--model",
        str(folder),
        "--drafter",
        "none",
        *arguments,
    ]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def test_each_line_is_a_turn(folder: Path, lm: SpeculativeLM) -> None:
    """Piped: only answers on stdout, footers on stderr, no prompts, no color."""
    options = [
        "--temperature",
        "0",
        "--max-tokens",
        "7",
        "--max-model-len",
        "200",
        "--show-accepted",
        "--system",
        "be brief",
    ]
    out, err = (
        text.decode()
        for text in process(folder, *options).communicate(
            b"the rain\n\n   \nin spain\n", timeout=200
        )
    )
    conversation = Conversation(lm, "be brief", temperature=0, max_tokens=7)
    answers = ["".join(p.text for p in conversation.say(text)) for text in ("the rain", "in spain")]
    assert out == "".join(f"{answer}\n" for answer in answers)
    notes = err.splitlines()
    assert len(notes) == 2 and all("tok/s" in line and "tau" in line for line in notes), err
    assert (
        "; 0 of " in notes[0]
        and f"; {conversation.reading.reused} of " in notes[1]
        and conversation.reading.reused > 0
    )


def test_quiet_says_nothing_on_stderr(here: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = here("the rain\n", "-q")
    assert code == 0 and out.strip() and err == ""


def test_settings_are_listed_changed_and_checked(
    here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    bad = {
        "!set temperature hot": "temperature is 0.0; "
        "!set takes a number or default for it, not 'hot'",
        "!set temperature -1": "temperature must be a finite number >= 0 (0 is greedy), not -1.0",
        "!set max_tokens": "!set takes a whole number for it, not ''",
        "!set max_tokens default": "not 'default'",
        "!set hope 3": f"unknown setting 'hope'; known are {', '.join(SETTINGS)}",
        "!set verifier hope": "unknown verifier 'hope'",
        "!set draft_len 0": "draft_len must be at least 1, not 0",
        "!set draft_len many": "a whole number, auto or default for it, not 'many'",
        "!set show_accepted maybe": "on or off for it, not 'maybe'",
        "!set steps 2": "'none' takes no options, but got steps",
    }
    good = (
        "seed 4",
        "seed default",
        "top_p 0.5",
        "draft_len auto",
        "show_accepted on",
        "max_tokens 3",
        "verifier block",
    )
    lines = [
        *bad,
        *(f"!set {setting}" for setting in good),
        "!set",
        "the rain",
        f"!save {tmp_path}/a.json",
    ]
    code, out, err = here("\n".join(lines), "-q")
    assert code == 0
    messages = err.splitlines()
    for line, message in zip(messages, bad.values(), strict=False):
        assert line.startswith("specdiff: error: ") and message in line, line
    listed = dict(line.split(maxsplit=1) for line in messages[len(bad) : -1])
    assert listed.keys() == SETTINGS.keys()
    changed = {
        "top_p": "0.5",
        "seed": "default",
        "draft_len": "auto",
        "show_accepted": "on",
        "max_tokens": "3",
        "verifier": "block",
    }
    assert listed == listed | changed
    saved = json.loads((tmp_path / "a.json").read_text())
    assert (
        saved["stats"]["tokens"] == 3
        and saved["settings"]["top_p"] == 0.5
        and saved["settings"]["seed"] is None
    )
    assert saved["messages"] == [
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": out[:-1]},
    ]


def test_commands(
    here: Callable[..., tuple[int, str, str]], lm: SpeculativeLM, tmp_path: Path
) -> None:
    saved = tmp_path / "kept.json"
    saved.write_text("mine")
    lines = (
        "!help\nthe rain\n!status\n!clear\n!status\n!hope\n"
        f"!save {saved}\n!save\n!save {tmp_path}/no/where.json\n!exit\nin spain\n"
    )
    code, out, err = here(lines, "-q")
    answer = "".join(p.text for p in Conversation(lm, temperature=0, max_tokens=7).say("the rain"))
    assert code == 0 and out == f"{answer}\n"  # lines after !exit are not turns
    for command in COMMANDS:
        assert command in err
    first, second = [line for line in err.splitlines() if "200 tokens are used" in line]
    assert int(first.split()[0]) > 7 and second.startswith("0 of 200")
    assert (
        "1 answers, 2 messages" in err and "1 answers, 0 messages" in err and "7 tokens in" in err
    )
    assert "unknown command '!hope'; known are !help, !set, !status, !clear, !save, !exit" in err
    assert f"{saved} exists and is not overwritten" in err and saved.read_text() == "mine"
    assert (
        "!save needs the name of a file" in err and "cannot write" in err and "No such file" in err
    )


def test_a_turn_that_fails_costs_a_line(here: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = here("the rain " * 60 + "\nthe rain\n", "-q")
    assert code == 0 and out.strip()
    (line,) = err.splitlines()
    assert "which leaves none to answer within max_len 200: clear it" in line


def test_bytes_that_are_no_text_and_lines_of_windows(
    here: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = here(b"the \xff rain\r\n\r\nlast without an end", "-q")
    assert code == 0 and err == "" and out.endswith("\n") and out.count("\n") >= 2


def test_a_bad_option_is_told_at_once(here: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = here("the rain\n", "--temperature", "-1")
    assert code == 2 and out == "" and "temperature must be" in err


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_an_interrupt_stops_the_answer_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    """The signal arrives after the first of thousands of tokens; the session continues."""
    chat = process(folder, "--temperature", "0", "--max-tokens", "5000", "--max-model-len", "5900")
    assert chat.stdin is not None and chat.stdout is not None and chat.stderr is not None
    say(chat.stdin, "the rain")
    begin = chat.stdout.read(8)
    assert begin
    chat.send_signal(signal.SIGINT)
    say(chat.stdin, "!set max_tokens 5", "in spain", f"!save {tmp_path}/a.json", "!exit")
    rest, notes = chat.communicate(timeout=200)
    out, err = (begin + rest).decode(), notes.decode()
    assert chat.returncode == 0, err
    saved = json.loads((tmp_path / "a.json").read_text())
    first, second = (m["content"] for m in saved["messages"] if m["role"] == "assistant")
    assert out == f"{first}\n{second}\n"
    footers = [line for line in err.splitlines() if "tok/s" in line]
    assert "(stopped)" in footers[0] and "(stopped)" not in footers[1]
    assert 5 < saved["stats"]["tokens"] < 4000


def say(stdin: IO[bytes], *lines: str) -> None:
    stdin.write("".join(f"{line}\n" for line in lines).encode())


@pytest.fixture
def terminal() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(),
    reason="signals are the main thread's",
)
@pytest.mark.usefixtures("terminal")
def test_a_second_interrupt_of_one_answer_raises(lm: SpeculativeLM) -> None:
    conversation = Conversation(lm, temperature=0, max_tokens=100)
    with pytest.raises(KeyboardInterrupt), stopping(conversation):
        for _ in conversation.say("the rain"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert len(conversation.messages) == 2 and conversation.messages[1]["content"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with stopping(conversation):
        pieces = list(stopped(conversation))
    assert pieces[-1].generation.finish_reason == "interrupted"


def stopped(conversation: Conversation) -> Iterator[Any]:
    sent = False
    for piece in conversation.say("in spain"):
        if not sent:
            sent = True
            signal.raise_signal(signal.SIGINT)
        yield piece


@pytest.mark.usefixtures("terminal")
def test_an_ignored_interrupt_stays_ignored(lm: SpeculativeLM) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    conversation = Conversation(lm, temperature=0, max_tokens=10)
    with stopping(conversation):
        pieces = list(stopped(conversation))
    assert len(pieces[-1].generation.token_ids) == 10
