"""Records of line-based files: what people save is read, any fault is one message with its line."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from specdiff.bench import suites
from specdiff.data import records
from specdiff.data.records import (
    FIELDS,
    Record,
    RecordError,
    prompt_of,
    read_jsonl,
    read_text,
    read_texts,
)
from specdiff.errors import UsageError
from specdiff.training import recipe

LINES = ['{"prompt": "één"}', '{"prompt": "zwei"}']
VALUES = [json.loads(line) for line in LINES]
PLAIN = "\n".join(LINES).encode() + b"\n"


def saved(folder: Path, content: bytes, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", PLAIN),
        ("p.jsonl", PLAIN.rstrip()),
        ("p.jsonl", codecs.BOM_UTF8 + PLAIN),
        ("p.jsonl", PLAIN.replace(b"\n", b"\r\n")),
        ("p.jsonl", codecs.BOM_UTF8 + b"\r\n" + PLAIN.replace(b"\n", b"\r\n \t\r\n")),
        ("p.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + PLAIN)),
        ("p.jsonl", gzip.compress(PLAIN)),
        ("p.jsonl.gz", PLAIN),
        ("p.jsonl.gz", gzip.compress(PLAIN[:19]) + gzip.compress(PLAIN[19:])),
    ],
    ids=[
        "plain",
        "no-end",
        "bom",
        "crlf",
        "blank",
        "gzip",
        "gzip-unnamed",
        "named-gzip",
        "two-members",
    ],
)
def test_files_as_people_save_them(tmp_path: Path, name: str, content: bytes) -> None:
    path = saved(tmp_path, content, name)
    assert [record.value for record in read_jsonl(path)] == VALUES
    assert [text.body for text in suites.read(f"jsonl:{path}")] == ["één", "zwei"]


def test_a_record_knows_its_line(tmp_path: Path) -> None:
    path = saved(tmp_path, b"\n\n" + PLAIN.replace(b"\n", b"\n\n"))
    assert [record.place for record in read_jsonl(path)] == [f"{path}, line 3", f"{path}, line 5"]


BAD = {
    "utf-16": (
        PLAIN.decode().encode("utf-16"),
        "is UTF-16, not UTF-8; convert it:  iconv -f UTF-16",
    ),
    "utf-16-be": (codecs.BOM_UTF16_BE + PLAIN.decode().encode("utf-16-be"), "is UTF-16"),
    "utf-16-bare": (PLAIN.decode().encode("utf-16-le"), "line 1 holds zero bytes"),
    "latin-1": (
        b'{"prompt": "a"}\n' + "één".encode("latin-1"),
        "line 2 is not UTF-8 (byte 0xe9); if it is Latin-1",
    ),
    "cut": (gzip.compress(PLAIN * 50)[:-20], "the gzip file is cut short or damaged"),
    "cut-at-once": (gzip.compress(PLAIN)[:5], "cut short or damaged at its beginning"),
    "checksum": (gzip.compress(PLAIN)[:-8] + b"\0" * 8, "damaged after line 2"),
    "not-deflate": (b"\x1f\x8b\x08" + bytes(range(100)), "damaged at its beginning"),
    "binary": (b"\x7fELF\x02\x01\x00\x00", "line 1 holds zero bytes: it is a binary file"),
    "picture": (b"\x89PNG\r\n\x1a\n", "line 1 is not UTF-8"),
    "array": (
        b'[\n {"prompt": "a"},\n {"prompt": "b"}\n]\n',
        "line 1 begins a JSON array; write one object a line",
    ),
    "array-in-a-line": (
        b'[{"prompt": "a"}]\n',
        "line 1 begins a JSON array; write one object a line:  jq -c '.[]' p.jsonl",
    ),
    "torn": (PLAIN[:-4], "line 2 is not JSON"),
    "deep": (b"[" * 100_000 + b"\n", "line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = saved(tmp_path, content)
    for read in (lambda: list(read_jsonl(path)), lambda: suites.read(f"jsonl:{path}")):
        with pytest.raises(UsageError) as error:
            read()
        assert (
            message in str(error.value)
            and str(path) in str(error.value)
            and "\n" not in str(error.value)
        )


def test_folders_and_absent_files(tmp_path: Path) -> None:
    for read in (lambda p: list(read_jsonl(p)), read_text, lambda p: suites.check(f"jsonl:{p}")):
        with pytest.raises(UsageError, match=r"is a folder; name a file in it"):
            read(tmp_path)
        with pytest.raises(UsageError, match=r"no such file: .*/nowhere"):
            read(tmp_path / "nowhere")


def test_texts_and_recipes_go_through_the_same_door(tmp_path: Path) -> None:
    text = saved(tmp_path, codecs.BOM_UTF8 + b"one\r\n\r\ntwo\r\n", "t.txt")
    assert [r.value for r in read_texts(text)] == [{"text": "one\n\ntwo"}]
    long = saved(tmp_path, b"\n\n".join(b"x" * 600 for _ in range(5)), "u.txt")
    assert [(len(r.value["text"]), r.place.rpartition(", ")[2]) for r in read_texts(long)] == [
        (1202, "chunk 1"), (1202, "chunk 2"), (600, "chunk 3"),
    ]  # fmt: skip
    yaml = saved(tmp_path, codecs.BOM_UTF8 + b"kind: sedd\r\nsteps: 7\r\n", "r.yaml")
    assert recipe.load(str(yaml)).steps == 7
    for content, message in (
        ("kind: sédd".encode("latin-1"), "line 1 is not UTF-8"),
        ("kind: sedd".encode("utf-16"), "is UTF-16"),
    ):
        for read in (recipe.load, lambda p: list(read_texts(Path(p)))):
            with pytest.raises(UsageError, match=message):
                read(str(saved(tmp_path, content, "r.yaml")))


def body(value: Any) -> Any:
    return prompt_of(Record("p.jsonl, line 4", value), FIELDS)[1]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"text": "world"}, "!"]
    expected = [{"role": "user", "content": "Hello, world!", "name": "me"}]
    assert body({"messages": [{"role": "user", "content": parts, "name": "me"}]}) == expected
    assert body({"prompt": [{"role": "user", "content": "x"}]}) == [
        {"role": "user", "content": "x"}
    ]
    assert body({"prompt": parts[:1]}) == "Hello, "
    assert body({"prompt": [3, 4]}) == [3, 4]
    assert body({"text": "a\ud800b"}) == "a\ufffdb"
    assert body({"messages": None, "prompt": None, "text": "c"}) == "c"


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (7, records.NO_OBJECT, "must be an object"),
        (None, records.NO_OBJECT, "not NoneType"),
        (
            {"question": "a"},
            records.NO_FIELD,
            "has none of the fields messages, prompt, text, article, but question",
        ),
        ({}, records.NO_FIELD, "but none"),
        ({"prompt": 7}, records.NO_TEXT, "prompt must be text, not int"),
        ({"prompt": True}, records.NO_TEXT, "not bool"),
        ({"prompt": [True, 3]}, records.NO_TEXT, "has a part of type 'bool'"),
        ({"text": [3, 4]}, records.NO_TEXT, "has a part of type 'int'"),
        ({"messages": "hello"}, records.NO_TEXT, "messages must be a list"),
        ({"messages": []}, records.NO_TEXT, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, records.NO_TEXT, "message 1: messages must be a list"),
        (
            {"messages": [{"role": "user", "content": None}]},
            records.NO_TEXT,
            "message 1: content must be text, not null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            records.NO_TEXT,
            "a part of type 'image_url'",
        ),
    ],
)
def test_odd_records_say_which_and_why(value: Any, kind: str, message: str) -> None:
    with pytest.raises(RecordError, match=message) as error:
        body(value)
    assert error.value.kind == kind and str(error.value).startswith("p.jsonl, line 4")
