"""Corpora on disk: rows come back whole or not at all, and never mixed with rows of another run."""

import json
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specdiff import files
from specdiff.data import corpus, packing
from specdiff.data.corpus import Corpus, CorpusWriter, Row
from specdiff.data.ledger import Ledger
from specdiff.errors import CorpusError, StorageError, UsageError

ABOUT = {"target": "toy", "seed": 3}
VOCAB = 100


def rows(count: int, first: int = 0) -> list[Row]:
    return [
        Row(torch.arange(i, i + 3 + i % 5) % VOCAB, 1 + i % 3, (0.0, 0.7, 1.0)[i % 3], i)
        for i in range(first, first + count)
    ]


def writer(folder: Path, **options: Any) -> CorpusWriter:
    return CorpusWriter(folder, options.pop("about", ABOUT), **{"vocab_size": VOCAB} | options)


def contents(folder: Path) -> dict[int, list[int]]:
    stored = Corpus(folder)
    keys = [stored[i].key for i in range(len(stored))]
    assert len(keys) == len(set(keys))
    return {stored[i].key: stored[i].tokens.tolist() for i in range(len(stored))}


def ledger(w: CorpusWriter) -> Ledger:
    return Ledger(w, Corpus(w.folder).columns())


def test_rows_come_back_over_shards_and_runs(tmp_path: Path) -> None:
    originals = rows(40)
    for part in (originals[:25], originals[25:]):
        with writer(tmp_path / "c", shard_tokens=50) as w:
            for row in part:
                w.add(row)
    stored = Corpus(tmp_path / "c")
    assert (
        len(stored) == 40
        and stored.tokens == sum(len(r.tokens) for r in originals)
        and len(stored.shards) > 2
    )
    for i, row in enumerate(originals):
        assert torch.equal(stored[i].tokens, row.tokens)
        assert (stored[i].prompt_length, stored[i].key) == (row.prompt_length, row.key)
        assert stored[i].temperature == pytest.approx(row.temperature)
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.endswith(".partial")]


def test_wide_vocabularies(tmp_path: Path) -> None:
    with writer(tmp_path, vocab_size=1 << 17) as w:
        w.add(Row(torch.tensor([70_000, 3]), 1, 1.0, 0))
    assert contents(tmp_path) == {0: [70_000, 3]}


def test_other_settings_and_other_writers_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path) as w:
        w.add(rows(1)[0])
        with pytest.raises(StorageError, match="another process is writing"):
            writer(tmp_path)
    with pytest.raises(CorpusError, match="begun with seed = 3, not 4"):
        writer(tmp_path, about=ABOUT | {"seed": 4})
    with writer(tmp_path):
        pass
    assert len(Corpus(tmp_path)) == 1


def test_unwritable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/c"):
        writer(tmp_path / "file" / "c")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    w = writer(tmp_path)
    w.add(rows(1)[0])
    w.flush()
    w.add(Row(torch.arange(50_000) % VOCAB, 1, 1.0, 1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"ulimit -f.*1 complete shards are intact: make room"
        ):
            w.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(Corpus(tmp_path)) == 1 and not list(tmp_path.glob(".*.partial"))
    w.flush()
    assert len(Corpus(tmp_path)) == 2


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(
        UsageError, match=r"holds README.md, but no manifest.json.*choose another --out"
    ):
        writer(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": "other-9", "shards": []}'),
            "other-9",
        ),
        (lambda f: (f / "shard-00000.safetensors").unlink(), "lacks shard-00000"),
        (lambda f: (f / "shard-00000.safetensors").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    with writer(tmp_path) as w:
        w.add(rows(1)[0])
    damage(tmp_path)
    with pytest.raises(CorpusError, match=message):
        Corpus(tmp_path)[0]


def test_duplicates_are_dropped_also_in_a_later_run(tmp_path: Path) -> None:
    first, second = rows(2)
    with writer(tmp_path) as w:
        t = ledger(w)
        assert t.add(first) and not t.add(Row(first.tokens, 2, 0.7, 10))
        t.close()
    with writer(tmp_path) as w:
        t = ledger(w)
        assert t.keys == {first.key, 10}
        assert t.add(second) and not t.add(Row(first.tokens, 1, 1.0, 11))
        t.drop(12, "question-empty")
        summary = t.close()
    assert summary.dropped == {"duplicate": 2, "question-empty": 1} and summary.rows == 2
    counts = json.loads((tmp_path / "manifest.json").read_text())["notes"]["counts"]
    assert counts == asdict(summary)
    assert sorted(contents(tmp_path)) == [0, 1]


def test_what_was_not_flushed_is_not_counted_either(tmp_path: Path) -> None:
    w = writer(tmp_path)
    t = ledger(w)
    t.add(rows(1)[0])
    w.flush()
    t.add(rows(1, 1)[0])
    t.drop(7, "question-empty")
    w.lock.release()  # as if the process were gone
    t = ledger(writer(tmp_path))
    assert t.keys == {0} and t.summary().by_temperature["0"]["rows"] == 1 and t.summary().rows == 1


def token_file(path: Path, **changes: Any) -> Path:
    data = {
        "tokens": torch.tensor([1, 2, 3, 4, 5, 6, 1, 2, 3], dtype=torch.uint16),
        "offsets": torch.tensor([0, 3, 6, 9]),
        "prompt_lengths": torch.tensor([1, 2, 1], dtype=torch.int32),
        "mode": torch.tensor([0, 1, 2], dtype=torch.uint8),
    } | changes
    save_file({k: v for k, v in data.items() if v is not None}, path)
    return path


def test_import_of_token_rows(tmp_path: Path) -> None:
    path = token_file(tmp_path / "rows.safetensors")
    for _ in range(2):  # the second time there is nothing to do
        with writer(tmp_path / "c") as w:
            t = ledger(w)
            assert sum(packing.add_rows(packing.read_rows(path, VOCAB), t)) in (9, 0)
            assert t.close().dropped == {"duplicate": 1}
    stored = Corpus(tmp_path / "c")
    first = [stored[i] for i in range(2)]
    assert [(row.tokens.tolist(), row.prompt_length, row.temperature) for row in first] == [
        ([1, 2, 3], 1, 0.0),
        ([4, 5, 6], 2, pytest.approx(0.7)),
    ]
    named = packing.read_rows(
        token_file(path, mode=None, temperatures=torch.tensor([0.5, 0.0, 1.0])), VOCAB
    )
    assert [r.temperature for r in named] == [0.5, 0.0, 1.0]
    assert {r.temperature for r in packing.read_rows(token_file(path, mode=None), VOCAB)} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": None}, "needs a one-dimensional tensor 'offsets'"),
        ({"offsets": torch.tensor([0, 3, 6, 8])}, "offsets must rise"),
        ({"prompt_lengths": torch.tensor([1, 4, 1])}, "prompt length lies outside"),
        (
            {"tokens": torch.tensor([1, 2, 3, 4, 5, 600, 1, 2, 3])},
            "reach 600, but the target's vocabulary has 100",
        ),
        ({"mode": torch.tensor([0, 1, 3])}, "mode must be 0"),
        ({"mode": torch.tensor([0, 1])}, "2 temperatures for 3 rows"),
    ],
)
def test_token_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        packing.read_rows(token_file(tmp_path / "rows.safetensors", **changes), VOCAB)


def test_token_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        packing.read_rows(tmp_path / "nowhere", VOCAB)
    (tmp_path / "bad").write_bytes(b"no tensors here")
    with pytest.raises(CorpusError, match="cannot be read"):
        packing.read_rows(tmp_path / "bad", VOCAB)


def held_out(folder: Path, share: float = 0.3) -> tuple[list[int], list[int]]:
    """The keys of both parts, in their order."""
    stored = Corpus(folder)
    training, rest = stored.split(share)
    assert sorted(training + rest) == list(range(len(stored)))
    return [stored[i].key for i in training], [stored[i].key for i in rest]


def test_held_out_rows_hang_on_their_keys_alone(tmp_path: Path) -> None:
    """Neither the order of writing, nor lengths, nor later rows move a row to the other part."""
    for name, order in (("a", rows(200)), ("b", rows(200)[::-1]), ("c", rows(100))):
        with writer(tmp_path / name, shard_tokens=50) as w:
            for row in order:
                w.add(row)
    assert held_out(tmp_path / "a") == held_out(tmp_path / "b")
    training, rest = held_out(tmp_path / "a")
    assert len(rest) == pytest.approx(60, abs=20) and set(range(150, 200)) & set(training)
    assert set(held_out(tmp_path / "c")[1]) == {key for key in rest if key < 100}
    assert set(held_out(tmp_path / "a", 0.1)[1]) < set(rest)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_each_part_has_a_row(tmp_path: Path, share: float) -> None:
    with writer(tmp_path) as w:
        for row in rows(5):
            w.add(row)
    training, rest = held_out(tmp_path, share)
    assert min(len(training), len(rest)) == 1


def test_counts_are_of_the_rows_named(tmp_path: Path) -> None:
    with writer(tmp_path, shard_tokens=50) as w:
        for row in rows(40):
            w.add(row)
    stored = Corpus(tmp_path)
    selection = [3, 17, 18, 39]
    expected = torch.zeros(VOCAB, dtype=torch.long)
    for i in selection:
        for token in stored[i].tokens.tolist():
            expected[token] += 1
    assert torch.equal(stored.counts(selection, VOCAB), expected)


def tokens_of(corpus: Corpus, rows: list[int]) -> list[int]:
    return torch.cat([corpus[i].tokens for i in rows]).tolist()


def test_a_document_lies_in_one_part(tmp_path: Path) -> None:
    """Packed rows: every document has a token of its own, which shows where it is."""
    documents = [[i] * (1 + (7 * i) % 23) for i in range(1, 1000)]
    with writer(
        tmp_path,
        about=ABOUT | {"row_tokens": 16, corpus.PACKED: True},
        vocab_size=1000,
        shard_tokens=500,
    ) as w:
        assert sum(packing.add_rows(packing.packed(documents, 0, 16), ledger(w))) == sum(
            map(len, documents)
        ) + len(documents)
    stored = Corpus(tmp_path)
    for share in (0.05, 0.5):
        parts = [set(tokens_of(stored, part)) for part in stored.split(share)]
        assert parts[0] & parts[1] == {0} and len(parts[1]) > 10
    full = sum(len(stored[i].tokens) == 16 for i in range(len(stored)))
    assert full > 0.85 * len(stored)


def test_one_document_cannot_be_held_out(tmp_path: Path) -> None:
    with writer(tmp_path, about=ABOUT | {"row_tokens": 16, corpus.PACKED: True}) as w:
        list(packing.add_rows(packing.packed([list(range(90))], 0, 16), ledger(w)))
    with pytest.raises(
        CorpusError, match="6 rows that share documents; training needs at least 2 apart"
    ):
        Corpus(tmp_path).split(0.1)


def test_corpora_packed_by_an_earlier_version_are_packed_again(tmp_path: Path) -> None:
    with writer(tmp_path, about=ABOUT | {"row_tokens": 16}) as w:
        for row in rows(5):
            w.add(row)
    with pytest.raises(CorpusError, match=r"packed by an earlier version.*pack it again"):
        Corpus(tmp_path).split(0.1)


def test_a_changed_shard_is_named(tmp_path: Path) -> None:
    with writer(tmp_path, shard_tokens=50) as w:
        for row in rows(40):
            w.add(row)
    stored = Corpus(tmp_path)
    stored.verify()
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = stored.manifest["shards"][1]["sha256"]
    message = rf"shard-00001.safetensors was changed .*{files.digest(path)}, not {before}"
    with pytest.raises(CorpusError, match=message):
        Corpus(tmp_path).verify()
