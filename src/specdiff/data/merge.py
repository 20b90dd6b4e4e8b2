"""One corpus from several: their shards and features, linked or copied into a new folder."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdiff import files
from specdiff.data.corpus import PACKED, WEIGHTS, Corpus
from specdiff.data.ledger import CorpusSummary, with_shares
from specdiff.data.shards import FORMAT, MANIFEST, Shard
from specdiff.errors import CorpusError, UsageError

SAME = ("target_sha256", WEIGHTS, PACKED, "row_tokens")  # of `about`: what all must agree on
OLDER = ("target_sha256", WEIGHTS)  # manifests of earlier versions may lack them


def merge(folders: Sequence[Path], out: Path) -> CorpusSummary:
    """Write the corpus of all rows of `folders` to `out`, which appears whole or not at all.

    Files are hard links where the file system allows, so almost no disk space is needed. Features
    come along. Rows keep their keys, so a row is held out here if it is held out there; a text
    that two corpora share is kept twice.

    Raises UsageError if `out` exists or there are fewer than two folders, CorpusError if a corpus
    is damaged or the corpora are of different targets, vocabularies or kinds, and StorageError.
    """
    if len(folders) < 2:
        raise UsageError("merging needs at least two corpora: --merge DIR --merge DIR")
    if out.exists():
        raise UsageError(f"--out {out} exists already; merge into a new folder")
    corpora = [Corpus(folder) for folder in folders]
    for corpus in corpora:
        corpus.verify()
        _check_alike(corpora[0], corpus)
    shards = [shard for corpus in corpora for shard in corpus.shards]
    entries = [entry for corpus in corpora for entry in corpus.manifest["shards"]]
    by_temperature = _sum([corpus.manifest.get("notes", {}) for corpus in corpora])
    manifest = {
        "format": FORMAT,
        "about": _about(corpora),
        "vocab_size": corpora[0].manifest["vocab_size"],
        "shards": [entry | {"file": _name(i)} for i, entry in enumerate(entries)],
        "notes": {"by_temperature": by_temperature, "dropped": {}},
    }
    with files.staged_folder(out) as folder:
        for index, shard in enumerate(shards):
            _take(shard, folder, index)
        files.write_json(folder / MANIFEST, manifest)
    return CorpusSummary(
        rows=sum(len(corpus) for corpus in corpora),
        tokens=sum(corpus.tokens for corpus in corpora),
        shards=len(shards),
        dropped={},
        first_dropped={},
        by_temperature=with_shares(by_temperature),
    )


def _name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _check_alike(first: Corpus, other: Corpus) -> None:
    """Raises CorpusError naming what differs."""
    sizes = [corpus.manifest["vocab_size"] for corpus in (first, other)]
    if sizes[0] != sizes[1]:
        raise CorpusError(
            f"{first.folder} has a vocabulary of {sizes[0]} tokens and {other.folder} of "
            f"{sizes[1]}; corpora of different tokenizers cannot be merged"
        )
    mine, theirs = (corpus.manifest["about"] for corpus in (first, other))
    for name in SAME:
        if name in OLDER and not (name in mine and name in theirs):
            continue
        if mine.get(name) != theirs.get(name):
            raise CorpusError(
                f"{first.folder} has {name} = {mine.get(name)} and {other.folder} has "
                f"{theirs.get(name)}; only corpora of one target and one kind can be merged"
            )


def _about(corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What all corpora were written with, and each one's own description."""
    parts = [corpus.manifest["about"] for corpus in corpora]
    shared = {
        name: value
        for name, value in parts[0].items()
        if all(part.get(name) == value for part in parts)
    }
    return shared | {"merged": parts}


def _sum(notes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The counts by temperature of all corpora together."""
    total: dict[str, Counter[str]] = {}
    for note in notes:
        for temperature, counts in note.get("by_temperature", {}).items():
            total.setdefault(temperature, Counter()).update(counts)
    return {name: dict(counts) for name, counts in total.items()}


def _take(shard: Shard, folder: Path, index: int) -> None:
    """Link a shard and its features into the folder, under their new number."""
    _link(shard.path, folder / _name(index))
    stem = shard.features_path.stem
    for path in shard.stored_features():
        _link(path, folder / path.name.replace(stem, f"features-{index:05d}", 1))


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source.resolve())
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
