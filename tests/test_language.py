"""The language of code, help, errors and docs: plain, idiomatic English; nouns for variables."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.md"),
        *(ROOT / "scripts").rglob("*.md"),
    ]
)

RETIRED = (
    r"mend(s|ed|ing)?", r"heat", r"rest(s|ed|ing)", r"tells?", r"told", r"behind", r"beside",
    r"gone on with", r"go(es)? on with", r"so many", r"likeliest", r"is had", r"by itself",
    r"foretells?", r"licence", r"what has been said", r"nobody('s)?", r"spares?", r"quantised?",
    r"penalised?", r"normalis\w+", r"colour(s|ed)?",
)  # fmt: skip
WORDS = re.compile(r"\b(" + "|".join(RETIRED) + r")\b", re.IGNORECASE)
# the word belongs to proofs; elsewhere it is the distribution
LAW = re.compile(r"(?<!tests/)\b(un)?law(s|ful)?\b", re.IGNORECASE)
PROOFS = re.compile(
    r"(verify\.py|noise\.py|/check/|/cli/check\.py|exactness\.md|LAB\.md|targets/table\.py|write-a-drafter\.md)"
)
PARTICIPLES = frozenset(
    [
        "told",
        "found",
        "asked",
        "given",
        "chosen",
        "kept",
        "made",
        "said",
        "known",
        "seen",
        "named",
        "taken",
        "wanted",
        "missed",
        "laid",
        "begun",
        "behind",
        "beside",
        "heat",
        "shown",
        "looking",
        "unread",
        "meant",
        "gone",
    ]
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings and comments of a Python file, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in (
            tokenize.STRING,
            tokenize.COMMENT,
            tokenize.FSTRING_MIDDLE if hasattr(tokenize, "FSTRING_MIDDLE") else -1,
        ):
            yield token.start[0], token.string


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name a file binds: variables, arguments, attributes, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_speak_plainly(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    retired = [
        f"{where}:{line}: {m.group()}" for line, text in texts(path) for m in WORDS.finditer(text)
    ]
    if not PROOFS.search(where):
        retired += [
            f"{where}:{line}: {m.group()}" for line, text in texts(path) for m in LAW.finditer(text)
        ]
    assert not retired, "\n".join(retired)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_variables_are_nouns(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    bad = [
        f"{where}:{line}: {name}"
        for line, name in names(ast.parse(path.read_text()))
        if name.strip("_") in PARTICIPLES
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_speak_plainly(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    retired = [f"{where}:{n}: {m.group()}" for n, line in lines for m in WORDS.finditer(line)]
    if not PROOFS.search(where):
        retired += [f"{where}:{n}: {m.group()}" for n, line in lines for m in LAW.finditer(line)]
    assert not retired, "\n".join(retired)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_prose_is_wrapped(path: Path) -> None:
    """At about 100 columns; tables, links and code keep theirs."""
    where, fenced, long = str(path.relative_to(ROOT)), False, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        exempt = fenced or line.lstrip().startswith(("|", "```", "<", "![", "[")) or "](" in line
        if len(line) > 104 and not exempt:
            long.append(f"{where}:{number}: {len(line)}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_nested_conditional_expressions(path: Path) -> None:
    nested = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node)
    ]
    assert not nested


def test_the_check_can_fail() -> None:
    assert WORDS.search("an argument the caller can mend") and WORDS.search(
        "it rests, and decoding goes on"
    )
    assert not WORDS.search("the rest of the answer") and LAW.search("its law")
    assert {name for _, name in names(ast.parse("told, x = f()\nself.kept = 1"))} == {
        "told",
        "x",
        "kept",
    }
