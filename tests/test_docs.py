"""The guide runs as it stands there, and what it shows is what is so."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specdiff
from documents import GUIDE, ROOT, Block, blocks, perform, understood

# What the tests change in the commands: sizes
SMALLER = {
    r"--max-tokens \d+": "--max-tokens 4",
    r"--length 24 --count 2 --steps 16": "--length 8 --count 2 --steps 2",
    r"bench --quick": "bench --quick --only sedd --temperatures 0 --prompts 1 --max-tokens 2"
    " --gammas 2",
    r"(check \./mine\.py:Mine)$": r"\1 --quick",
}
RUN = [
    "getting-started",
    "how-it-works",
    "exactness",
    "write-a-drafter",
    "benchmark",
    "serve",
    "which-drafter",
]  # train-a-drafter: test_tutorial.py
PAGES = sorted(GUIDE.glob("*.md"))


def shrunk(block: Block) -> Block:
    text = block.text
    for pattern, small in SMALLER.items() if block.language == "sh" else ():
        text = re.sub(pattern, small, text, flags=re.MULTILINE)
    return Block(block.language, block.note, text)


@pytest.mark.real
@pytest.mark.parametrize("page", RUN)
def test_every_block_runs_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(GUIDE / f"{page}.md"):
        if block.note != "skip":
            perform(shrunk(block), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_known_kind_and_commands_parse(page: Path) -> None:
    fences = blocks(page)
    assert [block for block in fences if not block.known] == []
    assert page.stem in (*RUN, "train-a-drafter") or not fences, "no test runs this page"
    understood(fences)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere_and_lines_are_short(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for line in text.splitlines():
        assert len(line) <= 150 or line.startswith("|"), line


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (GUIDE / "README.md").read_text()))
    assert listed == {page.name for page in PAGES} - {"README.md"}


def test_the_shown_drafters_are_the_example_files() -> None:
    examples = {
        block.note: block.text
        for block in blocks(GUIDE / "write-a-drafter.md")
        if block.language == "python"
    }
    assert examples == {
        name: (GUIDE / "examples" / name).read_text() for name in ("mine.py", "unlawful.py")
    }


def test_the_reference_is_written_from_the_docstrings(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error",
        str(ROOT / "scripts" / "docs.py"),
        str(tmp_path),
        "verify",
    ]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "specdiff.html").read_text()
    for name in specdiff.__all__:
        assert f'id="{name}"' in page or (tmp_path / "specdiff" / f"{name}.html").exists(), name
    assert (
        "Block verification (Sun et al., ICLR 2025)"
        in (tmp_path / "specdiff" / "verify.html").read_text()
    )


@pytest.mark.parametrize(
    "file", sorted((ROOT / "src").rglob("*.py")), ids=lambda file: "/".join(file.parts[-2:])
)
def test_public_functions_and_classes_say_what_they_do(file: Path) -> None:
    module = ast.parse(file.read_text())
    assert ast.get_docstring(module), "the file does not say what it is"
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or (
                isinstance(node, ast.FunctionDef) and len(node.body) <= 8
            ), f"{node.name} has no docstring"
