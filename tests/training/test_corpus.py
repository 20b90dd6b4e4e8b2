"""Corpora on disk: what goes in comes out, whole or not at all, and nobody else's rows get in between."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specdiff.errors import CorpusError, UsageError
from specdiff.training import corpus, imports
from specdiff.training.corpus import Corpus, CorpusWriter, Row
from specdiff.training.tally import Tally

ABOUT = {"target": "toy", "seed": 3}
VOCAB = 100


def rows(count: int, first: int = 0) -> list[Row]:
    return [Row(torch.arange(i, i + 3 + i % 5) % VOCAB, 1 + i % 3, (0.0, 0.7, 1.0)[i % 3], i) for i in range(first, first + count)]


def writer(folder: Path, **options: Any) -> CorpusWriter:
    return CorpusWriter(folder, options.pop("about", ABOUT), **{"vocab_size": VOCAB} | options)


def contents(folder: Path) -> dict[int, list[int]]:
    found = Corpus(folder)
    keys = [found[i].key for i in range(len(found))]
    assert len(keys) == len(set(keys))
    return {found[i].key: found[i].tokens.tolist() for i in range(len(found))}


def tally(w: CorpusWriter) -> Tally:
    return Tally(w, Corpus(w.folder).columns())


def test_rows_come_back_over_shards_and_runs(tmp_path: Path) -> None:
    given = rows(40)
    for part in (given[:25], given[25:]):
        with writer(tmp_path / "c", shard_tokens=50) as w:
            for row in part:
                w.add(row)
    found = Corpus(tmp_path / "c")
    assert len(found) == 40 and found.tokens == sum(len(r.tokens) for r in given) and len(found.shards) > 2
    for i, row in enumerate(given):
        assert torch.equal(found[i].tokens, row.tokens)
        assert (found[i].prompt_length, found[i].key) == (row.prompt_length, row.key)
        assert found[i].temperature == pytest.approx(row.temperature)
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.endswith(".partial")]


def test_wide_vocabularies(tmp_path: Path) -> None:
    with writer(tmp_path, vocab_size=1 << 17) as w:
        w.add(Row(torch.tensor([70_000, 3]), 1, 1.0, 0))
    assert contents(tmp_path) == {0: [70_000, 3]}


def test_other_settings_and_other_writers_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path) as w:
        w.add(rows(1)[0])
        with pytest.raises(CorpusError, match="another process is writing"):
            writer(tmp_path)
    with pytest.raises(CorpusError, match="begun with seed = 3, not 4"):
        writer(tmp_path, about=ABOUT | {"seed": 4})
    with writer(tmp_path):
        pass
    assert len(Corpus(tmp_path)) == 1


def test_unwritable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"cannot write to .*choose another --out"):
        writer(tmp_path / "file" / "c")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = writer(tmp_path)
    w.add(rows(1)[0])
    w.flush()
    save = corpus.save_file

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "save_file", full)
    w.add(rows(1, 1)[0])
    with pytest.raises(CorpusError, match=r"No space left on device.*1 complete shards are intact"):
        w.flush()
    assert len(Corpus(tmp_path)) == 1 and not list(tmp_path.glob(".*.partial"))
    monkeypatch.setattr(corpus, "save_file", save)
    w.flush()
    assert len(Corpus(tmp_path)) == 2


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format": "other-9", "shards": []}'), "other-9"),
        (lambda f: (f / "shard-00000.safetensors").unlink(), "lacks shard-00000"),
        (lambda f: (f / "shard-00000.safetensors").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, told: str) -> None:
    with writer(tmp_path) as w:
        w.add(rows(1)[0])
    damage(tmp_path)
    with pytest.raises(CorpusError, match=told):
        Corpus(tmp_path)[0]


def test_duplicates_are_dropped_also_in_a_later_run(tmp_path: Path) -> None:
    first, second = rows(2)
    with writer(tmp_path) as w:
        t = tally(w)
        assert t.add(first) and not t.add(Row(first.tokens, 2, 0.7, 10))
        t.close()
    with writer(tmp_path) as w:
        t = tally(w)
        assert t.known == {first.key, 10}
        assert t.add(second) and not t.add(Row(first.tokens, 1, 1.0, 11))
        t.drop(12, "question-empty")
        summary = t.close()
    assert summary["dropped"] == {"duplicate": 2, "question-empty": 1} and summary["rows"] == 2
    assert json.loads((tmp_path / "manifest.json").read_text())["notes"]["counts"] == summary
    assert sorted(contents(tmp_path)) == [0, 1]


def test_what_was_not_flushed_is_not_counted_either(tmp_path: Path) -> None:
    w = writer(tmp_path)
    t = tally(w)
    t.add(rows(1)[0])
    w.flush()
    t.add(rows(1, 1)[0])
    t.drop(7, "question-empty")
    w.unlock()  # as if the process were gone
    t = tally(writer(tmp_path))
    assert t.known == {0} and t.summary()["by_temperature"]["0"]["rows"] == 1 and t.summary()["rows"] == 1


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
            t = tally(w)
            assert sum(imports.add_rows(imports.read_rows(path, VOCAB), t)) in (9, 0)
            assert t.close()["dropped"] == {"duplicate": 1}
    found = Corpus(tmp_path / "c")
    assert [(found[i].tokens.tolist(), found[i].prompt_length, found[i].temperature) for i in range(2)] == [
        ([1, 2, 3], 1, 0.0),
        ([4, 5, 6], 2, pytest.approx(0.7)),
    ]
    named = imports.read_rows(token_file(path, mode=None, temperatures=torch.tensor([0.5, 0.0, 1.0])), VOCAB)
    assert [r.temperature for r in named] == [0.5, 0.0, 1.0]
    assert {r.temperature for r in imports.read_rows(token_file(path, mode=None), VOCAB)} == {1.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"offsets": None}, "needs a one-dimensional tensor 'offsets'"),
        ({"offsets": torch.tensor([0, 3, 6, 8])}, "offsets must rise"),
        ({"prompt_lengths": torch.tensor([1, 4, 1])}, "prompt length lies outside"),
        ({"tokens": torch.tensor([1, 2, 3, 4, 5, 600, 1, 2, 3])}, "reach 600, but the target's vocabulary has 100"),
        ({"mode": torch.tensor([0, 1, 3])}, "mode must be 0"),
        ({"mode": torch.tensor([0, 1])}, "2 temperatures for 3 rows"),
    ],
)
def test_token_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CorpusError, match=told):
        imports.read_rows(token_file(tmp_path / "rows.safetensors", **changes), VOCAB)


def test_token_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        imports.read_rows(tmp_path / "nowhere", VOCAB)
    (tmp_path / "bad").write_bytes(b"no tensors here")
    with pytest.raises(CorpusError, match="cannot be read"):
        imports.read_rows(tmp_path / "bad", VOCAB)
