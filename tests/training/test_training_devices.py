"""Training on another device than the host, where only the corpus rows are."""

import json
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from second_device import DEVICE, HOST, SecondDevice
from transformers import PreTrainedModel

import tiny
from specdiff import SpeculativeLM
from specdiff.data.corpus import Corpus, CorpusWriter
from specdiff.data.generate import CorpusSettings, generate
from specdiff.data.ledger import Ledger
from specdiff.data.sources import Opening, SourcePrompt
from specdiff.targets.causal import CausalTarget
from specdiff.training import initialize, prepare, recipe
from specdiff.training.teacher import PrecomputedTeacher, precompute

SIZES = ["blocks=1", "draft_vocab=24", "context_window=12", "rows=2", "canvas_tokens=8"]
SMALL = [*SIZES, "accumulation=1", "warmup=1", "steps=2", "ema=0.9"]
BOOKS = ["log_every=1", "save_every=1", "eval_every=2", "eval_prompts=2", "eval_tokens=6"]
BIDIRECTIONAL = ["attention=bidirectional", "length=24"]
SCORES = [*BIDIRECTIONAL, "objective=score_entropy", "draft_vocab=null"]


class There(Accelerator):
    """Places models and batches on the second device."""

    @property
    def device(self) -> torch.device:
        return DEVICE


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondDevice]:
    """The second device, on, and runs placed there."""
    monkeypatch.setattr(prepare, "accelerator_for", lambda recipe, device: There(cpu=True))
    with SecondDevice() as mode:
        yield mode


@pytest.fixture(scope="module")
def taught(
    corpus: Corpus, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The corpus with the target's states."""
    folder = tmp_path_factory.mktemp("taught") / "corpus"
    shutil.copytree(corpus.folder, folder)
    store_states(model, folder)
    return folder


def store_states(model: PreTrainedModel, folder: Path) -> None:
    list(precompute(model, Corpus(folder), "digest"))


def test_the_device_itself(device: SecondDevice) -> None:
    here = torch.ones(3)
    there = torch.ones(3, device=DEVICE)
    assert (here.device, there.device, there[1:].device, there.cpu().device) == (
        HOST,
        DEVICE,
        DEVICE,
        HOST,
    )
    assert (
        (there + here.to(DEVICE)).device
        == (there * here[0]).device
        == torch.zeros_like(there).device
        == DEVICE
    )
    assert there[torch.tensor([0, 2])].tolist() == [1, 1]
    for meet in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.dot(here, there),
        lambda: here[there.long()],
    ):
        with pytest.raises(RuntimeError, match=r"two devices meet|of the second device"):
            meet()
    with pytest.raises(RuntimeError, match="a generator of the host"):
        torch.rand(3, generator=torch.Generator(), device=DEVICE)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sedd", []),
        ("sedd", ["truth_share=0.5", "weights=d_pace", "init=target", "heads=4"]),
        ("sedd", ["objective=denoise", "weights=streak"]),
        ("sedd", ["draft_vocab=null"]),
        ("sedd", [*BIDIRECTIONAL, "time_conditioning=true"]),
        ("sedd", [*BIDIRECTIONAL, "drafting_share=0", "objective=denoise"]),
        ("sedd", SCORES),
        ("sedd", [*SCORES, "drafting_share=0", "process=uniform", "borrow_embeddings=false"]),
        ("autoregressive", ["init=null"]),
        ("autoregressive", ["objective=denoise"]),
        ("target", []),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_a_run(
    kind: str,
    changes: list[str],
    tmp_path: Path,
    target_folder: Path,
    corpus: Corpus,
    request: pytest.FixtureRequest,
) -> None:
    """A forecast, then a run that is measured and resumed: the losses of the host."""
    r = recipe.load(kind, [*SMALL, *BOOKS, *changes])
    run = prepare.prepare(
        r, model=str(target_folder), data=corpus.folder, out=tmp_path / "host", device="cpu"
    )
    expected = records(run, r.steps)
    request.getfixturevalue("device")
    run = prepare.prepare(
        r, model=str(target_folder), data=corpus.folder, out=tmp_path / "forecast"
    )
    assert run.target.info.device == DEVICE
    assert {p.device for p in run.trainer.task.parameters()} == {DEVICE}
    assert {b.device for b in run.trainer.task.buffers()} == {DEVICE}
    assert prepare.forecast(run)["tokens_per_step"] > 0
    run = prepare.prepare(r, model=str(target_folder), data=corpus.folder, out=tmp_path / "there")
    measured = records(run, 1)
    run = prepare.prepare(r, model=str(target_folder), data=corpus.folder, out=tmp_path / "there")
    assert run.trainer.step == 1
    measured += records(run, r.steps)
    assert [m["loss"] for m in measured] == pytest.approx([e["loss"] for e in expected], rel=1e-6)
    curve, host = (
        json.loads((tmp_path / name / "training" / "curve.jsonl").read_text())
        for name in ("there", "host")
    )
    for name in host.keys() - {"minutes"}:
        assert curve[name] == pytest.approx(host[name], rel=1e-4)


def records(run: prepare.TrainingRun, last: int) -> list[dict[str, Any]]:
    """What is logged up to step `last`, and measured there where that is due."""
    logged = []
    for progress in run.trainer.run():
        if progress.evaluated is None:
            logged.append(progress.record)
        if progress.step == last and (
            progress.evaluated is not None or last < run.trainer.recipe.steps
        ):
            break
    return logged


@pytest.mark.parametrize(
    ("kind", "changes", "stored"),
    [
        ("sedd", [], False),
        ("sedd", ["weights=d_pace", "init=target", "heads=4"], True),
        ("sedd", BIDIRECTIONAL, True),
        ("autoregressive", [], False),
        ("target", [], False),
    ],
)
def test_in_half_precision(
    kind: str,
    changes: list[str],
    stored: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus: Corpus,
    taught: Path,
) -> None:
    """As on a GPU: a bfloat16 target and a network under autocast, with about float32's losses."""
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "target")
    r = recipe.load(kind, [*SMALL, *BOOKS, *changes])

    def losses(out: str) -> list[float]:
        run = prepare.prepare(
            r, model=str(tmp_path / "target"), data=corpus.folder, out=tmp_path / out, device="cpu"
        )
        if stored:
            run.trainer.task.teacher = PrecomputedTeacher(Corpus(taught))
        return [record["loss"] for record in records(run, r.steps)]

    host = losses("host")
    monkeypatch.setattr(
        prepare, "accelerator_for", lambda recipe, device: There(cpu=True, mixed_precision="bf16")
    )
    monkeypatch.setattr(
        AcceleratorState, "_shared_state", {}
    )  # it keeps the first precision of a process
    with SecondDevice():
        assert losses("there") == pytest.approx(host, rel=0.05, abs=0.05)


@pytest.mark.parametrize("kind", ["sedd", "autoregressive"])
def test_states_from_the_disk(
    kind: str,
    device: SecondDevice,
    tmp_path: Path,
    target_folder: Path,
    corpus: Corpus,
    taught: Path,
) -> None:
    r = recipe.load(kind, [*SMALL, *BOOKS, "init=null"])
    run = prepare.prepare(r, model=str(target_folder), data=corpus.folder, out=tmp_path)
    run.trainer.task.teacher = PrecomputedTeacher(Corpus(taught))
    assert run.trainer.one_step()["loss"] > 0
    assert run.trainer.held_out()["held_out_loss"] > 0


def test_states_are_computed_where_the_target_is(
    device: SecondDevice, tmp_path: Path, corpus: Corpus, taught: Path
) -> None:
    """The very states that the host computes, read back by a drafter's task."""
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    store_states(tiny.model("llama").to(DEVICE), folder)
    expected = Corpus(taught).features(3)
    actual = Corpus(folder).features(3)
    assert expected is not None and actual is not None
    for ours, host in zip(actual, expected, strict=True):
        assert torch.equal(ours, host)


def test_word_frequencies_where_the_head_is(device: SecondDevice) -> None:
    head = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(1, 10)
    shift = initialize.unigram_shift(head.to(DEVICE), counts)
    assert shift.device == DEVICE
    assert torch.equal(shift.cpu(), initialize.unigram_shift(head, counts))


class Prompts:
    """Three prompts; the target extends them before it answers."""

    longest = 8

    def __init__(self) -> None:
        self.opening = Opening(3)
        self.about: dict[str, Any] = {"kind": "test"}

    def prompts(self, keys: Container[int]) -> Iterator[SourcePrompt]:
        return (SourcePrompt(key, tuple(range(key + 1))) for key in range(3) if key not in keys)


def test_a_corpus_is_written_there(
    device: SecondDevice, tmp_path: Path, model: PreTrainedModel
) -> None:
    """The rows of the host, opening and answer drawn at several temperatures."""
    texts = {}
    for place in (HOST, DEVICE):
        lm = SpeculativeLM(
            CausalTarget(tiny.copy_of(model).to(place), "tiny"), "ngram", None, max_len=32
        )
        assert lm.target.info.device == place
        folder = tmp_path / place.type
        with CorpusWriter(
            folder, {"target": "tiny", "source": "test"}, vocab_size=tiny.VOCAB
        ) as writer:
            ledger = Ledger(writer, [])
            for _ in generate(
                lm, Prompts(), ledger, CorpusSettings(seed=1, max_tokens=8), tokens=10_000, rows=2
            ):
                pass
            ledger.close()
        rows = [Corpus(folder)[i] for i in range(3)]
        texts[place] = {row.key: row.tokens.tolist() for row in rows}
    assert texts[HOST] == texts[DEVICE]
