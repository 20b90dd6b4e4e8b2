"""The command line at its edges: odd bytes, closed and full streams, environment, bugs."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from specdiff import Conversation, SpeculativeLM, cli
from specdiff.errors import TargetError
from specdiff.text.generation import Chunk
from test_lm import VOCAB, tokenizer  # noqa: F401

Here = Callable[..., tuple[int, str, str]]
VERBS = ("generate", "chat", "sample", "check", "data", "train", "bench", "env")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama", vocab=VOCAB, positions=400).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Run `main` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", *arguments])
        if stdin is not None:
            stream = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
            monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def answer(here: Here, folder: Path) -> Here:
    """`specdiff generate` with a tiny model, greedy, plain."""

    def run(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        options = ["--model", str(folder), "--drafter", "none", "--max-tokens", "6", "--raw"]
        return here("generate", *options, *arguments, stdin=stdin)

    return run


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which $SPECDIFF is the command."""
    command = f"{sys.executable} -W ignore -m specdiff"
    variables = {**os.environ, "SPECDIFF": command, **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, env=variables, timeout=120)


# environment variables


@pytest.mark.parametrize("value", ["1", "0.1.0", "maybe"])
@pytest.mark.parametrize("name", ["VERSION", "HELP", "GENERATE_HELP"])
def test_version_and_help_take_no_environment_variable(
    here: Here, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SPECDIFF_{name}", value)
    code, out, err = here("generate", "  ")
    assert code == 2 and out == "" and "the prompt is empty" in err


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_names_no_variable_of_its_own(here: Here, flag: str) -> None:
    code, out, _ = here(flag)
    assert code == 0 and out and "SPECDIFF_HELP" not in out and "SPECDIFF_VERSION" not in out


# errors


class Odd(Exception):  # noqa: N818
    pass


ERRORS = [
    (
        PermissionError(13, "Permission denied", "/a/[/b]"),
        "PermissionError: [Errno 13] Permission denied: '/a/[/b]'",
    ),
    (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        "UnicodeDecodeError: 'utf-8' codec",
    ),
    (EOFError("Compressed file ended early"), "EOFError: Compressed file ended early"),
    (EOFError(), "EOFError; run again"),
    (MemoryError(), "MemoryError; run again"),
    (RecursionError("too deep"), "RecursionError: too deep"),
    (Odd("first line\n  second line"), "Odd: first line second line"),
    (Odd("x" * 5000), "Odd: xxx"),
]


@pytest.mark.parametrize(("error", "line"), ERRORS, ids=lambda v: type(v).__name__)
def test_an_unexpected_error_is_one_line(
    here: Here, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("specdiff.load", fail)
    code, out, err = here("hi")
    assert code == 1 and out == ""
    assert err.startswith("specdiff: error: ") and line in err
    assert err.endswith("; run again with --debug for the traceback\n")
    assert err.count("\n") == 1 and len(err) < 700


@pytest.mark.parametrize(
    "arguments", [("--debug", "hi"), ("hi", "--debug"), ("generate", "--debug", "hi")]
)
def test_debug_shows_the_traceback(
    here: Here, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise Odd("out of ink")

    monkeypatch.setattr("specdiff.load", fail)
    code, _, err = here(*arguments)
    assert code == 1 and "Traceback" in err and "in fail" in err
    assert err.splitlines()[-1] == "specdiff: error: Odd: out of ink"


def test_debug_by_the_environment_and_behind_two_dashes(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = here("--no-such", "--", "--debug")
    assert code == 2 and "Traceback" not in err
    monkeypatch.setenv("SPECDIFF_DEBUG", "1")
    code, _, err = here("hi", "--model", "./nowhere")
    assert (
        code == 2 and "Traceback" in err and "no model folder './nowhere'" in err.splitlines()[-1]
    )
    monkeypatch.setenv("SPECDIFF_DEBUG", "0")
    assert "Traceback" not in here("hi", "--model", "./nowhere")[2]


def test_an_interrupt_is_a_new_line_and_130(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specdiff.load", interrupt)
    assert here("hi") == (130, "", "\n")


def test_half_an_answer_ends_before_the_error_line(
    answer: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SpeculativeLM.stream

    def cut(self: SpeculativeLM, *arguments: Any, **options: Any) -> Iterator[Chunk]:
        for index, piece in enumerate(whole(self, *arguments, **options)):
            if index == 1:
                raise TargetError("the logits of row 0 are not finite")
            yield piece

    monkeypatch.setattr(SpeculativeLM, "stream", cut)
    code, out, err = answer("the rain", "-q", "--temperature", "0")
    assert code == 1 and len(out) > 1 and out.endswith("\n")
    assert err == "specdiff: error: the logits of row 0 are not finite\n"


# prompts that begin with a dash


@pytest.mark.parametrize(
    "prompt", ["-5 + 3", "- what is a list?", "--hello world", "-5", "-hallo", "--help me"]
)
def test_a_prompt_that_begins_with_a_dash(here: Here, prompt: str) -> None:
    code, out, err = here(prompt)
    assert code == 2 and out == ""
    assert err.endswith(
        "A prompt that begins with '-' goes after '--', or into 'specdiff generate -' as a pipe.\n"
    )


def test_a_mistyped_option_gets_no_such_hint(here: Here) -> None:
    code, _, err = here("hi", "--temprature", "0.5")
    assert code == 2 and "No such option: --temprature" in err and "'--'" not in err
    assert "'--'" not in here("chat", "-5")[2]
    assert "'--'" not in here("hi", "--temperature", "-1x")[2]


def test_behind_two_dashes_it_is_a_prompt(answer: Here, here: Here) -> None:
    assert "the prompt is empty" in here("--", " ")[2]
    code, out, err = answer("-q", "--", "-5 + 3")
    assert code == 0 and out.strip() and err == ""


# text


ODD = b"caf\xe9 \xff the rain"


def test_bytes_that_are_no_text(answer: Here) -> None:
    """On standard input and in arguments, each becomes U+FFFD."""
    clean = ODD.decode("utf-8", "replace")
    expected = answer("-q", "--temperature", "0", clean)
    assert expected[0] == 0 and expected[1].strip()
    assert answer("-q", "--temperature", "0", os.fsdecode(ODD)) == expected
    assert answer("-q", "--temperature", "0", "-", stdin=ODD) == expected
    assert answer("-q", "--temperature", "0", "-", stdin=b"\xef\xbb\xbf" + ODD) == expected


def test_odd_bytes_in_options(answer: Here, here: Here, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff")
    code, out, err = answer("the rain", "--stop", odd, "--json", "-q")
    assert code == 0 and json.loads(out)["token_ids"] and err == ""
    code, _, err = here("hi", "--model", f"{tmp_path}/{odd}")
    assert code == 2 and err.count("\n") == 1 and "no model folder" in err
    code, _, err = here("hi", "--dtype", odd)
    assert code == 2 and err.count("\n") == 1 and "unknown dtype" in err


def test_a_file_whose_name_is_no_text(here: Here, tmp_path: Path) -> None:
    """It is found under its own name; safetensors cannot read such a model: a one-line error."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    path.mkdir()
    (path / "results.json").write_text("{")
    code, out, err = here("bench", "report", str(path))
    assert code == 2 and out == "" and "results.json is damaged" in err and err.count("\n") == 1


def test_an_ascii_terminal_shows_question_marks(folder: Path) -> None:
    options = f"--model {folder} --drafter none --max-tokens 6 --temperature 0 --raw"
    done = shell(
        f"$SPECDIFF '日本 naïve' {options} --system 'ü'; echo $?; "
        f"printf '日本 naïve' | $SPECDIFF - {options}; echo $?",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    )
    out = done.stdout.decode("ascii")
    err = done.stderr.decode("ascii")
    assert out.startswith("2\n") and out.endswith("\n0\n") and "Traceback" not in err
    assert "tok/s" in err


# standard streams


def test_full_and_closed_streams() -> None:
    full = shell("$SPECDIFF --version > /dev/full; echo $?; $SPECDIFF --help > /dev/full; echo $?")
    assert full.stdout == b"1\n1\n"
    line = b"specdiff: error: cannot write to standard output: No space left on device\n"
    assert full.stderr == 2 * line
    closed = shell(
        "$SPECDIFF --version >&-; echo $?; $SPECDIFF --version 2>&-; echo $?; "
        "$SPECDIFF hi --draft-len x 2>&-; echo $?"
    )
    out = closed.stdout.decode().split()
    assert out[0] == "1" and out[2:] == ["0", "2"]
    assert (
        closed.stderr == b"specdiff: error: cannot write to standard output: Bad file descriptor\n"
    )
    for verb in ("generate -", "chat --model ./nowhere"):
        done = shell(f"$SPECDIFF {verb} <&-; echo $?")
        assert done.stdout == b"2\n" and done.stderr.count(b"\n") == 1, done.stderr


def test_a_reader_that_leaves_is_silent() -> None:
    done = shell(
        "set -o pipefail; $SPECDIFF generate --help | true; $SPECDIFF generate --help | head -1"
    )
    assert done.stderr == b""


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_an_answer_onto_a_full_disk(
    answer: Here, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = answer("the rain", "-q", *arguments)
    assert code == 1
    assert err == "specdiff: error: cannot write to standard output: No space left on device\n"


def test_a_full_disk_hides_no_other_error(answer: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        sys.stdout.write("half a line")
        raise Odd("out of ink")

    monkeypatch.setattr(SpeculativeLM, "stream", fail)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = answer("the rain", "-q")
    assert code == 1 and err.startswith("specdiff: error: Odd: out of ink; ")


# markup


def test_markup_in_a_name_is_text(here: Here, tmp_path: Path) -> None:
    for verb in (("hi",), ("chat",), ("sample",), ("bench",)):
        code, _, err = here(*verb, "--model", "./[/x] :smile:")
        assert code == 2 and "no model folder './[/x] :smile:'" in err, err


def test_markup_in_the_name_of_a_folder(
    here: Here, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "[").mkdir()
    (tmp_path / "[/x]").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    options = ("--model", "./[/x]", "--drafter", "none", "--max-tokens", "3")
    assert here("the rain", "--raw", *options)[0] == 0
    code, out, err = here("chat", *options, stdin=b"[/x] :smile:\n!status\n!save [b]a.json\n")
    assert code == 0 and out.strip() and "./[/x] with drafter none" in err
    assert "saved to [b]a.json" in err


# JSON


def test_minus_infinity_is_null(answer: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SpeculativeLM.stream

    def never(self: SpeculativeLM, *arguments: Any, **options: Any) -> Iterator[Chunk]:
        for piece in whole(self, *arguments, **options):
            piece.generation.logprobs[0] = -float("inf")
            piece.generation.top_logprobs[0] = [(3, -float("inf"))]
            yield piece

    monkeypatch.setattr(SpeculativeLM, "stream", never)
    code, out, _ = answer("the rain", "--json", "--logprobs", "1")
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0 and report["logprobs"][0] is None and report["top_logprobs"][0] == [[3, None]]


# an answer that is there is never lost


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (TargetError("not finite"), 1)]
)
def test_what_ends_the_comparison_keeps_the_answer(
    answer: Here, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def end(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(SpeculativeLM, "generate", end)
    status, out, err = answer("the rain", "--compare", "--json", "--temperature", "0")
    report = json.loads(out)
    assert status == code and len(report["token_ids"]) == 6 and report["compare"] is None
    assert "tok/s" in err and "Traceback" not in err


def test_no_error_ends_a_conversation(
    here: Here, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Conversation.say

    def say(self: Conversation, text: str, **options: Any) -> Iterator[Chunk]:
        for piece in whole(self, text, **options):
            yield piece
            if text == "break":
                raise Odd("out of ink")
            if text == "stumble":
                raise TargetError("not finite")

    monkeypatch.setattr(Conversation, "say", say)
    lines = (
        f"the rain\nbreak\nstumble\n!save ~no-such-user/a.json\nin spain\n!save {tmp_path}/a.json\n"
    )
    options = ("--model", str(folder), "--drafter", "none", "--max-tokens", "4", "-q")
    code, out, err = here("chat", *options, stdin=lines.encode())
    stderr = err.splitlines()
    assert code == 0 and len(stderr) == 4 and stderr[3] == f"saved to {tmp_path}/a.json", err
    assert stderr[0] == "specdiff: error: Odd: out of ink; run again with --debug for the traceback"
    assert stderr[1] == "specdiff: error: not finite"
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    users = [message["content"] for message in messages if message["role"] == "user"]
    assert users == ["the rain", "break", "stumble", "in spain"]
    assert out.endswith("\n")


# options that leave it to the model


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_is_not_set_is_not_passed_on(
    here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    requests: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    from specdiff.text import load as loading
    from specdiff.text import options

    load = loading.load
    of = options.Options.of

    def watched_load(*arguments: Any, **keywords: Any) -> SpeculativeLM:
        loads.append(keywords)
        return load(*arguments, **keywords)

    def watched_of(values: Any, defaults: Any = None) -> options.Options:
        requests.append(dict(values))
        return of(values, defaults)

    monkeypatch.setattr("specdiff.load", watched_load)
    monkeypatch.setattr(options.Options, "of", watched_of)
    model = ("--model", str(folder), "--drafter", "none", "--max-tokens", "3")
    prompt = ("the rain",) if verb == "generate" else ()
    sampling = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    assert (
        here(
            verb, *prompt, *model, stdin=b"the rain\n!set top_p 0.5\n!set top_p default\nin spain\n"
        )[0]
        == 0
    )
    assert requests and not any(
        sampling & request.keys() for request in (requests[0], requests[-1])
    )
    assert "generation_config" not in loads[-1]
    assert (
        here(
            verb,
            *prompt,
            *model,
            "--top-k",
            "3",
            "--generation-config",
            "none",
            stdin=b"the rain\n",
        )[0]
        == 0
    )
    assert requests[-1]["top_k"] == 3 and loads[-1]["generation_config"] == "none"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(here: Here, verb: str) -> None:
    code, out, _ = here(verb, "--help")
    assert (code == 0 and "Example:" in out) or verb == "env"


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'rich.console'}"
    code = f"import sys, specdiff.cli; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
