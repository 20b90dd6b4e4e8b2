"""The command line as a user meets it: separate processes, stdout and stderr apart, exit codes."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from specdiff import cli

PROMPT = "Write a haiku about rain."


def specdiff(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "from specdiff.cli import main; main()",
        *arguments,
    ]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `main` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_help_version_and_env(here: Callable[..., tuple[int, str, str]]) -> None:
    assert "default verb" in " ".join(here("--help")[1].split())
    assert "Example:" in here("generate", "--help")[1]
    version = here("--version")[1].strip()
    facts = json.loads(here("env", "--json")[1])
    assert facts["specdiff"] == version and facts["torch"]
    assert facts["default dtype"].startswith(("bfloat16 (", "float32 (", "the checkpoint's"))
    assert "cache" in here("env")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hi", "--draft-len", "0"), "draft_len must be at least 1, not 0"),
        (("hi", "--draft-len", "many"), "'many'"),
        (("hi", "--temperature", "-1"), "must be a finite number >= 0 (0 is greedy), not -1.0"),
        (("hi", "--temperature", "nan"), "not nan"),
        (("hi", "--logit-bias", "3:1"), "--logit-bias must be ID=VALUE,ID=VALUE,..., not '3:1'"),
        (("hi", "--allowed-token-ids", "a,b"), "--allowed-token-ids must be ID,ID,..., not 'a,b'"),
        (("hi", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("hi", "--model", "./nowhere"), "no model folder './nowhere'"),
        (("hi", "--no-such-option",), "No such option"),
        (("   ",), "the prompt is empty"),
    ],
)  # fmt: skip
def test_a_usage_error_is_one_line_and_exit_code_2(
    here: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = here(*arguments)
    assert code == 2 and out == ""
    assert message in err


def test_a_failure_is_exit_code_1(
    here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    code, _, err = here("hi", "--model", str(tmp_path))
    assert code == 1 and "pytorch_model.bin" in err


@pytest.mark.real
def test_generate_streams_text_to_stdout_and_the_footer_to_stderr() -> None:
    done = specdiff(
        "-",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        "--drafter",
        "sedd",
        "--draft-len",
        "3",
        "--compare",
        stdin=PROMPT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "\x1b" not in done.stdout and "tok/s" not in done.stdout
    assert (
        "tau" in done.stderr
        and "the same tokens" in done.stderr
        and "speculative / plain" in done.stderr
    )
    assert "break-even tau" in done.stderr


@pytest.mark.real
def test_json_is_one_object_and_environment_variables_are_read(
    here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDIFF_MAX_TOKENS", "9")
    monkeypatch.setenv("SPECDIFF_DTYPE", "float32")  # equal text is promised there
    answer = json.loads(here(PROMPT, "--json", "--seed", "5", "--verifier", "match")[1])
    assert (
        len(answer["token_ids"]) <= 9
        and answer["stats"]["drafted"] > 0
        and answer["drafter"] == "auto"
    )
    plain = json.loads(
        here(
            PROMPT,
            "--json",
            "--seed",
            "5",
            "--verifier",
            "match",
            "--drafter",
            "none",
            "--max-tokens",
            "9",
        )[1]
    )
    assert plain["token_ids"] == answer["token_ids"] and plain["text"] == answer["text"]


BROKEN = """
from specdiff import Drafter
class Mine(Drafter):
    draft_len = 3
    def __init__(self, target): ...
    def propose(self, context, state, noise, draft_len): raise RuntimeError("out of ink")
"""


@pytest.mark.real
def test_a_drafter_that_fails_is_reported_in_a_warning_the_footer_and_json(
    here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("default", RuntimeWarning)
        code, out, err = here(
            PROMPT,
            "--json",
            "--drafter",
            f"{tmp_path}/mine.py:Mine",
            "--max-tokens",
            "3",
            "--seed",
            "1",
        )
    warning, footer = err.strip().splitlines()
    assert code == 0 and json.loads(out)["stats"]["faults"] == 1
    assert warning.startswith("specdiff: warning: the drafter Mine raised RuntimeError: out of ink")
    assert footer.endswith(
        "(3 without drafting); the drafter failed and was disabled for the rest of the request"
    )


@pytest.mark.real
def test_quiet_says_nothing_on_stderr() -> None:
    done = specdiff(PROMPT, "-q", "--max-tokens", "4", "--drafter", "none", "--seed", "1")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.strip()
