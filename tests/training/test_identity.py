"""The sources of a run are recorded and compared, and its folder is its own."""

import json
import resource
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from specdiff import cli
from specdiff.data import generate
from specdiff.data.corpus import Corpus, CorpusWriter
from specdiff.errors import CorpusError, StorageError, UsageError
from specdiff.training import checkpoint, prepare, recipe
from specdiff.training.prepare import TrainingRun
from specdiff.training.teacher import precompute
from specdiff.weights import fingerprint

SMALL = ["heads=4", "draft_vocab=40", "context_window=16", "rows=4", "canvas_tokens=16", "warmup=5"]
BOOKS = [
    "log_every=1",
    "save_every=2",
    "eval_every=1000",
    "eval_prompts=2",
    "eval_tokens=8",
    "steps=6",
]
CHECKPOINTS = "training/checkpoints"


def prepared(
    target: Path, corpus: Path, out: Path, *changes: str, kind: str = "sedd"
) -> TrainingRun:
    r = recipe.load(kind, [*(SMALL if kind == "sedd" else ["rows=4"]), *BOOKS, *changes])
    return prepare.prepare(r, model=str(target), data=corpus, out=out, device="cpu")


def trained(target: Path, corpus: Path, out: Path, *changes: str, stop: int | None = None) -> None:
    for progress in prepared(target, corpus, out, *changes).trainer.run():
        if progress.step == stop:
            return


def variant(folder: Path, of: Path) -> Path:
    """The same target but for its very last weight: equal sizes, equal first megabyte."""
    shutil.copytree(of, folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return folder


def copied(corpus: Corpus, folder: Path, rows: Iterable[int]) -> Corpus:
    """These rows, in this order."""
    with CorpusWriter(
        folder, {"target": "tiny"}, vocab_size=tiny.VOCAB, shard_tokens=300
    ) as writer:
        for i in rows:
            writer.add(corpus[i])
    return Corpus(folder)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_is_resumed_with_its_own_corpus_and_target_only(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    out = tmp_path / "out"
    trained(target_folder, corpus.folder, out, stop=2)
    other = copied(corpus, tmp_path / "other", range(len(corpus) - 1))
    with pytest.raises(
        CorpusError,
        match=rf"begun with another corpus: SHA-256 {corpus.digest}, not {other.digest}",
    ):
        prepared(target_folder, other.folder, out)
    changed = variant(tmp_path / "changed", target_folder)
    digests = [fingerprint(folder) for folder in (target_folder, changed)]
    with pytest.raises(
        CorpusError, match=rf"begun with another target: SHA-256 {digests[0]}, not {digests[1]}"
    ):
        prepared(changed, corpus.folder, out)
    shutil.copytree(corpus.folder, tmp_path / "moved")
    trained(target_folder, tmp_path / "moved", out)  # where it lies is no part of what it is
    assert checkpoint.complete(out / CHECKPOINTS)[-1].name == "00000006"


def test_a_corpus_of_another_target_is_pointed_out(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    identity = generate.identity(str(target_folder))
    changed = variant(tmp_path / "changed", target_folder)
    for name, digests in (
        ("new", identity),
        ("old", {k: identity[k] for k in ("target", "target_sha256")}),
    ):
        with CorpusWriter(
            tmp_path / name, {**digests, "temperatures": [0.0]}, vocab_size=tiny.VOCAB
        ) as writer:
            for i in range(len(corpus)):
                writer.add(corpus[i])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepared(target_folder, tmp_path / name, tmp_path / f"{name}-own")
    digests = rf"{identity['target_weights']}\), not by .*{fingerprint(changed)}"
    with pytest.warns(UserWarning, match=digests):
        prepared(changed, tmp_path / "new", tmp_path / "other")


def test_a_run_of_an_earlier_version_is_resumed(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    trained(target_folder, corpus.folder, tmp_path, stop=2)
    (tmp_path / "training" / "sources.json").unlink()
    trained(target_folder, corpus.folder, tmp_path)
    sources = json.loads((tmp_path / "training" / "sources.json").read_text())
    assert sources == {"corpus": corpus.digest, "target": fingerprint(target_folder)}


def test_features_are_of_this_target_and_these_tokens(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    data = tmp_path / "corpus"
    shutil.copytree(corpus.folder, data)
    model = tiny.model("llama")
    digest = fingerprint(target_folder)
    list(precompute(model, Corpus(data), digest))
    prepared(target_folder, data, tmp_path / "a").trainer.one_step()
    changed = variant(tmp_path / "changed", target_folder)
    another = fingerprint(changed)
    message = (
        rf"features-00000.safetensors holds states of the target with target_weights = {digest}, "
        rf"not {another}.*specdiff data --features"
    )
    with pytest.raises(CorpusError, match=message):
        prepared(changed, data, tmp_path / "b")
    with pytest.raises(CorpusError, match=message):
        list(precompute(model, Corpus(data), another))
    prepared(changed, data, tmp_path / "c", "objective=denoise")  # which uses none
    features = data / "features-00001.safetensors"
    stored = load_file(features)
    metadata = Corpus(data).feature_metadata(0, digest)
    save_file(stored, features, metadata=metadata)
    with pytest.raises(
        CorpusError,
        match=r"features-00001.safetensors holds states of the target with shard_sha256 = ",
    ):
        prepared(target_folder, data, tmp_path / "d")
    save_file(stored, features)
    with pytest.raises(CorpusError, match="with target_weights = unknown, not"):
        prepared(target_folder, data, tmp_path / "e")


def test_a_changed_shard_is_not_trained_on(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    data = tmp_path / "corpus"
    shutil.copytree(corpus.folder, data)
    shard = data / "shard-00000.safetensors"
    tensors = load_file(shard)
    tensors["tokens"] = tensors["tokens"].int().flip(0).to(torch.uint16)
    save_file(tensors, shard)
    with pytest.raises(
        CorpusError, match=r"shard-00000.safetensors was changed after it was written"
    ):
        prepared(target_folder, data, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_folders_of_others_are_left_alone(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("my notes")
    drafter = tmp_path / "drafter"
    tiny.sedd(tiny.sedd_config()).save_pretrained(drafter)
    for folder in (mine, drafter, corpus.folder):
        before = contents(folder)
        with pytest.raises(
            UsageError, match=r"holds .*, but no training/recipe.yaml.*choose another --out"
        ):
            prepared(target_folder, corpus.folder, folder)
        assert contents(folder) == before
    (tmp_path / "empty").mkdir()
    prepared(target_folder, corpus.folder, tmp_path / "empty")


def test_a_target_is_not_trained_in_its_own_folder(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    target = tmp_path / "target"
    shutil.copytree(target_folder, target)
    for marked in (False, True):
        if marked:  # as after an earlier run
            (target / "training").mkdir()
            (target / "training" / "recipe.yaml").write_text(recipe.as_yaml(recipe.load("target")))
        before = contents(target)
        with pytest.raises(UsageError, match="choose another --out"):
            prepared(target, corpus.folder, target, kind="target")
        assert contents(target) == before


def test_one_run_at_a_time(tmp_path: Path, target_folder: Path, corpus: Corpus) -> None:
    first = prepared(target_folder, corpus.folder, tmp_path).trainer
    with pytest.raises(StorageError, match="another process is writing"):
        prepared(target_folder, corpus.folder, tmp_path)
    steps = first.run()
    assert [next(steps).step, next(steps).step] == [1, 2]
    with pytest.raises(StorageError, match="another process is writing"):
        prepared(target_folder, corpus.folder, tmp_path)
    steps.close()  # an abandoned run holds nothing
    with pytest.raises(UsageError, match="begun with lr"):
        prepared(target_folder, corpus.folder, tmp_path, "lr=0.5")
    trained(target_folder, corpus.folder, tmp_path)  # nor does a refused one


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    trained(target_folder, corpus.folder, whole)
    trained(target_folder, corpus.folder, out, stop=2)
    before = contents(out / CHECKPOINTS)
    exported = {
        name: (out / name).read_bytes()
        for name in ("model.safetensors", "config.json", "README.md")
    }
    trainer = prepared(target_folder, corpus.folder, out).trainer
    with (
        largest_file(3000),
        pytest.raises(
            StorageError, match=r"ulimit -f.*checkpoint of step 2 is intact: make room, then repeat"
        ),
    ):
        list(trainer.run())
    assert contents(out / CHECKPOINTS) == before
    assert {name: (out / name).read_bytes() for name in exported} == exported
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]
    trained(target_folder, corpus.folder, out)
    assert (out / "training" / "log.jsonl").read_text() == (
        whole / "training" / "log.jsonl"
    ).read_text()
    last = f"{CHECKPOINTS}/00000006/training.safetensors"
    a = load_file(whole / last)
    b = load_file(out / last)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_full_disk_is_one_line_of_the_command(
    tmp_path: Path,
    target_folder: Path,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = [part for change in (*SMALL, *BOOKS) for part in ("--set", change)]
    out = tmp_path / "out"
    arguments = [
        "--target",
        str(target_folder),
        "--data",
        str(corpus.folder),
        "--out",
        str(out),
        "--device",
        "cpu",
        "-q",
        *settings,
    ]
    monkeypatch.setattr(sys, "argv", ["specdiff", "train", *arguments])
    capfd.readouterr()
    with largest_file(3000), pytest.raises(SystemExit) as end:
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 1
    assert line.startswith("specdiff: error: cannot write ")
    assert "there is no checkpoint yet" in line


def test_training_does_not_depend_on_the_order_of_writing(
    tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    losses: list[Any] = []
    for name, order in (("a", range(len(corpus))), ("b", reversed(range(len(corpus))))):
        copied(corpus, tmp_path / name, order)
        trainer = prepared(target_folder, tmp_path / name, tmp_path / f"out-{name}").trainer
        losses.append(
            [trainer.one_step()["loss"] for _ in range(3)] + [trainer.held_out()["held_out_loss"]]
        )
    assert losses[0] == losses[1]
