"""`specdiff bench` as a user meets it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specdiff import cli
from specdiff.bench import paper, runner
from specdiff.data.records import Record

Here = Callable[..., tuple[int, str, str]]
TINY = (
    "--temperatures",
    "0",
    "--max-tokens",
    "6",
    "--batch",
    "1",
    "--gammas",
    "2,3",
    "--steps",
    "1",
    "--quick",
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "embeded"), "unknown suite 'embeded'"),
        (("--suite", "jsonl:./nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("--gammas", "2,many"), "--gammas must be numbers such as 1,2,4, not '2,many'"),
        (("--batch", "0"), "--batch must be whole numbers of at least 1, not 0"),
        (("--temperatures", "-1"), "--temperatures must be finite numbers >= 0, not -1.0"),
        (("--drafter", "hf=ngram"), "the drafter name 'hf' is taken; give another as NAME=ngram"),
        (
            ("--verifier", "luck"),
            "--verifier must be one of token, block, match, match-gumbel, not 'luck'",
        ),
        (
            ("--only", "sed"),
            "--only 'sed' is no baseline of this suite; "
            "known are hf, hf-assisted, hf-dflash, hf-prompt-lookup, ours-vanilla, autoregressive, "
            "sedd, block, ngram, cascade, auto",
        ),
        (("--smoke",), "--smoke is for --suite paper"),
        (("--model", "./nowhere"), "no model folder './nowhere'"),
    ],
)
def test_a_usage_error_leaves_no_files(
    here: Here, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = here(*arguments, "--out", str(tmp_path / "out"), "-q")
    assert code == 2 and out == "" and message in err
    assert not (tmp_path / "out" / "results.json").exists()


def test_files_summary_and_exit_code(
    here: Here, tmp_path: Path, target: str, drafters: dict[str, str], prompts: Path
) -> None:
    folder = tmp_path / "out"
    command = (
        "--suite",
        f"jsonl:{prompts}",
        "--model",
        target,
        "--drafter",
        f"sedd={drafters['sedd']}",
        "--out",
        str(folder),
        *TINY,
    )
    code, out, err = here(*command, "--json")
    summary = json.loads(out)
    stored = json.loads((folder / "results.json").read_text())
    assert (
        code == 0
        and summary["problems"] == []
        and summary["status"] == stored["status"] == "complete"
    ), err
    assert {c["baseline"] for c in stored["parts"][0]["cells"]} == {
        "hf",
        "hf-prompt-lookup",
        "ours-vanilla",
        "sedd",
        "ngram",
    }
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + len(
        stored["parts"][0]["cells"]
    )
    assert stored["command"].startswith("specdiff bench --suite jsonl:")
    assert here(*command)[0] == 2  # not over an old one
    code, out, err = here(*command, "--resume")
    assert (
        code == 0
        and "sedd" in out
        and "exact" in out
        and "autoregressive: no bundled" in out
        and "main" not in err
    )
    code, _, err = here(*command, "--resume", "--seed", "1")
    assert code == 2 and "was begun with seed = 0, not 1" in err
    other = (
        "--suite",
        f"jsonl:{prompts}",
        "--model",
        target,
        "--drafter",
        drafters["foreign"],
        "--out",
        str(tmp_path / "two"),
        *TINY,
    )
    code, out, err = here(*other)
    assert code == 1 and "problem: " in err and "40 tokens" in err and "ours-vanilla" in out


def test_ctrl_c_keeps_the_measurements(
    here: Here, tmp_path: Path, target: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runner.run

    def cut(*arguments: Any) -> Iterator[runner.BenchEvent]:
        for event in whole(*arguments):
            yield event
            if event.record is not None and event.record["kind"] == "turn":
                raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", cut)
    command = (
        "--suite",
        f"jsonl:{prompts}",
        "--model",
        target,
        "--only",
        "ngram",
        "--out",
        str(tmp_path / "out"),
    )
    code, out, err = here(*command, *TINY)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 130 and "repeat the command with --resume" in err and "ours-vanilla" in out
    cells = record["parts"][0]["cells"]
    assert record["status"] == "partial" and {c["turns"] for c in cells} == {1}
    assert {c["baseline"] for c in cells} == {"hf", "ours-vanilla", "ngram"}


def test_a_killed_run_can_be_resumed(
    tmp_path: Path, here: Here, target: str, prompts: Path
) -> None:
    """Killed outright, in the middle of a unit or of a line."""
    folder = tmp_path / "out"
    command = ["--suite", f"jsonl:{prompts}", "--model", target, "--out", str(folder), *TINY]
    process = [sys.executable, "-W", "ignore", "-m", "specdiff", "bench", *command]
    running = subprocess.Popen(
        process,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    file = folder / "journal.jsonl"
    while running.poll() is None and not (file.exists() and file.read_text().count("\n") >= 4):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = file.read_text().rpartition("\n")[0].splitlines()
    assert len(before) >= 4 and "/end" not in before[-1]
    code, _, err = here(*command, "--resume", "-q")
    after = file.read_text().splitlines()
    assert code == 0, err
    assert after[: len(before)] == before and json.loads(after[-1])["kind"] == "end"
    assert json.loads((folder / "results.json").read_text())["status"] == "complete"


def test_the_paper_suite_in_small(here: Here, tmp_path: Path) -> None:
    small = (
        "--prompts",
        "1",
        "--max-tokens",
        "4",
        "--gammas",
        "2",
        "--steps",
        "1,2",
        "--batch",
        "1",
    )
    code, out, err = here("--suite", "paper", "--smoke", "--out", str(tmp_path), *small)
    assert code == 0, err
    record = json.loads((tmp_path / "results.json").read_text())["paper"]
    rows = {(r["dataset"], r["target"], r["baseline"]): r for r in record["table2"]}
    assert set(rows) == {
        (d, t, b) for d in paper.DATASETS for t in paper.TARGETS for b in paper.DRAFTERS
    }
    assert (
        rows["cnn_dailymail", "gpt-neo-2.7B", "sedd"]["paper"] == 8.73
        and rows["lm1b", "gpt2-xl", "sedd"]["draft_len"] == 30
    )
    assert all(r["vs_hf"] > 0 and r["draft_len"] in (5, 30, 40, 45) for r in record["table2"])
    assert {r["steps"] for r in record["appendix_a"] if r["baseline"] == "sedd"} == {1, 2}
    assert all(r["paper"] is None for r in record["appendix_a"])
    assert "Table 2" in out and "8.73" in out and "the figures mean nothing" in out


def test_the_paper_suite_says_what_is_missing(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "TARGETS", {"gpt2-xl": str(tmp_path / "nowhere")})
    monkeypatch.setattr(
        "specdiff.bench.suites.read_dataset",
        lambda name: iter([Record("row 0", {"article": "a", "text": "a"})]),
    )
    code, out, err = here("--suite", "paper", "--out", str(tmp_path / "out"))
    assert (
        code == 1
        and "hf download" in err
        and "openai-community/gpt2" in err
        and "abisee/cnn_dailymail" in err
    )
    assert "Table 2" in out and "7.59" in out


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Set the largest size of a file, as `ulimit -f` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(
    here: Here, tmp_path: Path, target: str, prompts: Path, limited: Callable[[int], None]
) -> None:
    folder = tmp_path / "out"
    command = (
        "--suite",
        f"jsonl:{prompts}",
        "--model",
        target,
        "--only",
        "ngram",
        "--out",
        str(folder),
        *TINY,
        "-q",
    )
    limited(4000)
    code, out, err = here(*command)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert (
        err.startswith(f"specdiff: error: cannot write {folder}/journal.jsonl: ")
        and "ulimit -f" in err
    )
    lines = (folder / "journal.jsonl").read_text().splitlines()
    assert len(lines) > 1 and all(json.loads(line)["key"] for line in lines)
    limited(resource.RLIM_INFINITY)
    assert here(*command, "--resume")[0] == 0
    results = (folder / "results.json").read_bytes()
    assert (folder / "journal.jsonl").read_text().splitlines()[: len(lines)] == lines
    limited(1000)
    code, _, err = here(*command, "--resume")
    assert code == 1 and "results.json: it would exceed" in err
    code, _, err = here("report", str(folder))
    assert code == 1 and "report.html: it would exceed" in err and err.count("\n") == 1
    limited(resource.RLIM_INFINITY)
    assert (folder / "results.json").read_bytes() == results
    assert not list(folder.glob(".*.partial"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]\n[2]\n", "a line is no record"),
        ('{"a": 1}\n{"key": "x"}\n', "a line is no record"),
        ('{"key": "begin"}\n{"key": "x"}\n', "its first line holds no settings"),
        ("{\n{\n", "Expecting property name"),
    ],
)
def test_a_damaged_journal(
    here: Here, tmp_path: Path, target: str, prompts: Path, text: str, reason: str
) -> None:
    (tmp_path / "journal.jsonl").write_text(text)
    code, _, err = here(
        "--suite",
        f"jsonl:{prompts}",
        "--model",
        target,
        "--out",
        str(tmp_path),
        *TINY,
        "-q",
        "--resume",
    )
    assert code == 2 and f"journal.jsonl is damaged ({reason}" in err and err.count("\n") == 1


def test_out_is_a_file(here: Here, tmp_path: Path, target: str, prompts: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, out, err = here(
        "--suite",
        f"jsonl:{prompts}",
        "--model",
        target,
        "--out",
        str(tmp_path / "out"),
        *TINY,
        "-q",
    )
    assert (
        code == 1 and out == "" and err.count("\n") == 1 and f"cannot write {tmp_path}/out" in err
    )
    assert (tmp_path / "out").read_text() == "mine"


def test_two_runs_into_one_folder_and_a_name_with_markup(
    here: Here, tmp_path: Path, target: str, prompts: Path
) -> None:
    from specdiff import files

    lock = files.lock(tmp_path / "out")
    model = tmp_path / "[b]:smile:[" / "x]"
    model.parent.mkdir()
    model.symlink_to(target)
    own = ("--only", "ngram", "--out", str(tmp_path / "out"))
    command = ("--suite", f"jsonl:{prompts}", "--model", str(model), *own, *TINY)
    code, _, err = here(*command)
    assert code == 1 and "another process is writing to" in err and err.count("\n") == 1
    lock.release()
    code, out, err = here(*command)
    assert code == 0 and "[b]:smile:[/x]" in "".join(out.split()), err
