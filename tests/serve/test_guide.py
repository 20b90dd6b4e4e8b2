"""The commands and snippets of the serving guide run against a server that they start."""

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
from process import Process, process

from documents import GUIDE, ROOT, Block, blocks
from specdiff.serve import guard, lifecycle, protocol
from specdiff.text.detokenizer import LONGEST_STOP

ADDRESS = "http://127.0.0.1:8000"
PAGE = blocks(GUIDE / "serve.md")
START = next(
    words
    for block in PAGE
    if block.language == "sh"
    for words in block.commands()
    if words[:2] == ["specdiff", "serve"]
)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    options = START[2:]
    options[options.index("--port") + 1] = "0"
    with process(*options) as one:
        yield one


def lines(program: str) -> list[str]:
    commands = [line for block in PAGE if block.language == "sh" for line in block.lines()]
    return [line for line in commands if line.startswith(program)]


@pytest.mark.real
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", lines("curl"), ids=lambda line: line.split("/")[-1][:20])
def test_curl(server: Process, line: str) -> None:
    assert ADDRESS in line
    command = re.sub(r"^curl", "curl --silent --fail-with-body", line)
    run = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert '"choices":' in run.stdout
    assert run.stdout.endswith("data: [DONE]\n\n") or '"stream": true' not in line


@pytest.mark.real
@pytest.mark.parametrize("block", [block for block in PAGE if block.language == "python"])
def test_python(server: Process, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="the openai client is not installed")
    assert ADDRESS in block.text
    exec(block.text.replace(ADDRESS, server.url), {})
    assert capsys.readouterr().out.strip()


def test_the_snippets_are_there() -> None:
    assert len(lines("curl")) >= 2
    assert any("openai" in block.text for block in PAGE if block.language == "python")


def test_the_bounds_in_the_documents_are_those_of_the_code() -> None:
    body = f"{guard.MAX_BODY // 2**20} MiB"
    stops = f"{protocol.MOST_STOPS} of {LONGEST_STOP} characters"
    security = (ROOT / "SECURITY.md").read_text()
    for words in (
        f"the body ({body})",
        f"choices ({protocol.MOST_CHOICES})",
        f"stop strings ({stops})",
        f"the head must arrive within {lifecycle.HEAD_SECONDS:g} s",
        f"the body within {guard.BODY_SECONDS:g} s",
        f"an answer must be read within {lifecycle.STALLED_SECONDS:g} s",
    ):
        assert words in security, words
    guide = (GUIDE / "serve.md").read_text()
    for words in (
        f"| body | {body}, within {guard.BODY_SECONDS:g} seconds |",
        f"| head | 16 KiB, within {lifecycle.HEAD_SECONDS:g} seconds |",
        f"| stop strings | {stops} |",
        f"`n` up to {protocol.MOST_CHOICES}",
        f"| connections | {lifecycle.MOST_CONNECTIONS:,} |",
        f"| a client that does not read | {lifecycle.STALLED_SECONDS:g} seconds |",
    ):
        assert words in guide, words
