"""Merged corpora: every row and its features come along, and only like is merged with like."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from specdiff import cli, files
from specdiff.data.corpus import Corpus, CorpusWriter
from specdiff.data.ledger import Ledger
from specdiff.data.merge import merge
from specdiff.data.shards import Row
from specdiff.errors import CorpusError, UsageError

ABOUT = {"target": "toy", "target_weights": "a", "dtype": "bfloat16"}


def corpus(folder: Path, keys: range, vocab_size: int = 100, **about: Any) -> Path:
    description = {k: v for k, v in {**ABOUT, **about}.items() if v is not None}
    with CorpusWriter(folder, description, vocab_size=vocab_size, shard_tokens=30) as writer:
        ledger = Ledger(writer, [])
        for key in keys:
            tokens = torch.arange(key, key + 5 + key % 4) % vocab_size
            ledger.add(Row(tokens, 2, (0.0, 1.0)[key % 2], key))
        ledger.close()
    stored = Corpus(folder)
    for index, shard in enumerate(stored.shards):
        metadata = stored.feature_metadata(index, "a")
        hidden = shard.tokens(0, shard.rows)[:, None].float().bfloat16()
        features = {"hidden": hidden, "log_z": hidden[:, 0].float()}
        files.write_tensors(shard.features_path, features, metadata)
        files.write_tensors(shard.layer_path(3), {"states": hidden + 1}, metadata)
    return folder


def test_rows_and_features_of_all_corpora_are_there(tmp_path: Path) -> None:
    parts = [corpus(tmp_path / "a", range(20)), corpus(tmp_path / "b", range(40, 67))]
    summary = merge(parts, tmp_path / "c")
    merged = Corpus(tmp_path / "c")
    merged.verify()
    merged.check_features("a")
    originals = [Corpus(part)[i] for part in parts for i in range(len(Corpus(part)))]
    assert len(merged) == summary.rows == 47
    assert merged.tokens == summary.tokens == sum(len(row.tokens) for row in originals)
    assert merged.has_features and merged.has_layers([3])
    for i, row in enumerate(originals):
        assert torch.equal(merged[i].tokens, row.tokens) and merged[i].key == row.key
        features = merged.features(i)
        assert features is not None
        assert features[0][:, 0].tolist() == row.tokens.tolist()
        assert merged.layer_states(i, [3])[:, 0].tolist() == (row.tokens + 1).tolist()
    assert sum(int(c["rows"]) for c in summary.by_temperature.values()) == 47
    assert merged.manifest["about"]["merged"][0]["target"] == "toy"


def test_a_row_is_held_out_where_it_was_before(tmp_path: Path) -> None:
    parts = [corpus(tmp_path / "a", range(60)), corpus(tmp_path / "b", range(60, 120))]
    merge(parts, tmp_path / "c")

    def held_out(folder: Path) -> set[int]:
        stored = Corpus(folder)
        return {stored[i].key for i in stored.split(0.3)[1]}

    assert held_out(tmp_path / "c") == held_out(parts[0]) | held_out(parts[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_weights": "b"}, "target_weights = a and .* has b"),
        ({"vocab_size": 90}, "vocabulary of 100 tokens .* of 90"),
        ({"grouped": True, "row_tokens": 8}, "grouped = None and .* has True"),
    ],
)
def test_only_like_is_merged_with_like(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    parts = [corpus(tmp_path / "a", range(9)), corpus(tmp_path / "b", range(9, 18), **change)]
    with pytest.raises(CorpusError, match=message):
        merge(parts, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_older_manifest_names_no_weights(tmp_path: Path) -> None:
    older = corpus(tmp_path / "a", range(9), target_weights=None)
    merge([older, corpus(tmp_path / "b", range(9, 18))], tmp_path / "c")
    assert "target_weights" not in Corpus(tmp_path / "c").manifest["about"]


def test_bad_folders(tmp_path: Path) -> None:
    part = corpus(tmp_path / "a", range(9))
    with pytest.raises(UsageError, match="at least two"):
        merge([part], tmp_path / "c")
    with pytest.raises(UsageError, match="exists already"):
        merge([part, part], part)
    with pytest.raises(CorpusError, match="holds no manifest"):
        merge([part, tmp_path / "none"], tmp_path / "c")
    shard = Corpus(part).shards[0].path
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(CorpusError, match="was changed"):
        merge([part, part], tmp_path / "c")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", "data", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    a = str(corpus(tmp_path / "a", range(9)))
    b = str(corpus(tmp_path / "b", range(9, 18)))
    out = str(tmp_path / "c")
    code, text = run("--merge", a, "--merge", b, "--out", out)
    assert code == 0 and "18 rows" in text
    code, text = run("--merge", a, "--out", out, "--tokens", "5")
    assert code == 2 and "--merge takes --out alone" in text
