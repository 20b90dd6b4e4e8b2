"""A model's fingerprint changes with any byte of its weights, and not with who wrote its config."""

import json
import os
from pathlib import Path

import pytest

import tiny
from specdiff.errors import ConfigError, WeightsError
from specdiff.weights import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_every_byte_of_every_shard_counts(folder: Path) -> None:
    before = fingerprint(folder)
    assert len(before) == 64
    for shard in folder.glob("*.safetensors"):
        content, stat = shard.read_bytes(), shard.stat()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time say nothing
        assert fingerprint(folder) != before
        shard.write_bytes(content)
    assert fingerprint(folder) == before


def test_the_config_counts_but_not_who_wrote_it(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"rope_theta": 7.0}, {"rms_norm_eps": 0.1}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert fingerprint(folder) != before
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9.9"}, indent=7)
    )
    assert fingerprint(folder) == before


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"holds no \*\.safetensors"):
        fingerprint(tmp_path)
