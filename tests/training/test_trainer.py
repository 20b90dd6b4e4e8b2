"""Runs of the trainer on tiny targets: they learn, resume exactly, and leave folders that run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from specdiff import catalog
from specdiff.data.corpus import Corpus
from specdiff.errors import CorpusError, MissingExtraError, UsageError, WeightsError
from specdiff.targets.causal import CausalTarget
from specdiff.training import checkpoint, prepare, recipe

TINY = {
    "sedd": [
        "heads=4",
        "draft_vocab=40",
        "context_window=16",
        "rows=4",
        "canvas_tokens=16",
        "warmup=5",
        "lr=3e-3",
    ],
    "autoregressive": ["draft_vocab=40", "rows=4", "warmup=5", "lr=3e-3", "init=null"],
    "target": ["rows=4", "warmup=5", "lr=1e-3"],
}
OWN_EMBEDDINGS = ["borrow_embeddings=false", "draft_vocab=null", "hidden_size=32", "lr=1e-2"]
BOOKS = ["log_every=1", "save_every=5", "eval_every=1000", "eval_prompts=2", "eval_tokens=8"]


def trained(
    kind: str, out: Path, target: Path, corpus: Corpus, *changes: str, stop: int | None = None
) -> list[dict[str, Any]]:
    """Start or resume a run; returns its log."""
    r = recipe.load(kind, [*TINY[kind], *BOOKS, *changes])
    plan = prepare.prepare(r, model=str(target), data=corpus.folder, out=out, device="cpu")
    for progress in plan.trainer.run():
        if stop is not None and progress.step >= stop:
            break
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sedd", []),
        ("sedd", ["objective=denoise", "weights=streak"]),
        ("sedd", ["taps=[0]"]),
        (
            "sedd",
            [
                "divergence=forward",
                "weights=d_pace",
                "truth_share=0.5",
                "auxiliary=0",
                "init=target",
            ],
        ),
        (
            "sedd",
            [
                "attention=bidirectional",
                "length=24",
                "drafting_share=0.5",
                "time_conditioning=true",
                "rows=24",
            ],
        ),
        (
            "sedd",
            [
                "attention=bidirectional",
                "length=24",
                "objective=denoise",
                "drafting_share=0",
                *OWN_EMBEDDINGS,
                "rows=24",
            ],
        ),
        ("autoregressive", []),
        ("autoregressive", ["objective=denoise", "init=target"]),
        ("target", []),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_learns_and_leaves_a_folder_that_runs(
    kind: str,
    changes: list[str],
    tmp_path: Path,
    target_folder: Path,
    model: PreTrainedModel,
    corpus: Corpus,
) -> None:
    log = trained(kind, tmp_path, target_folder, corpus, "steps=80", "eval_every=80", *changes)
    losses = [entry["loss"] for entry in log]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    (curve,) = [
        json.loads(line)
        for line in (tmp_path / "training" / "curve.jsonl").read_text().splitlines()
    ]
    assert curve["step"] == 80 and curve["held_out_loss"] > 0
    card = (tmp_path / "README.md").read_text()
    assert "specdiff train" in card
    assert f"kind: {kind}" in card
    assert str(corpus.tokens) in card.replace(",", "")
    if kind == "target":
        AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    assert curve["tau_at_0"] >= 1 and len(curve["per_position_at_1"]) == 4
    target = CausalTarget(tiny.copy_of(model), "tiny")
    drafter = catalog.drafter(str(tmp_path), target.info)
    prompts = tiny.prompts(3)
    expected = [tiny.plain(model, p, 20) for p in prompts]
    assert tiny.decoded(target, drafter, tiny.batch_of(prompts, 20, temperature=0)) == expected


@pytest.mark.parametrize("process", ["absorb", "uniform"])
def test_score_entropy_pretraining_and_finetuning(
    process: str, tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    """The paper's own way, from scratch and then from that checkpoint; the average is exported."""
    sizes = [
        "blocks=1",
        "hidden_size=32",
        "heads=4",
        "length=24",
        "rows=16",
        "accumulation=1",
        "warmup=5",
        "lr=1e-2",
        f"process={process}",
    ]
    books = [
        "log_every=1",
        "save_every=50",
        "eval_every=1000",
        "eval_prompts=2",
        "eval_tokens=4",
        "draft_len=4",
        "ema=0.9",
    ]
    r = recipe.load("sedd-pretrain", [*sizes, *books, "steps=100"])
    plan = prepare.prepare(
        r, model=str(target_folder), data=corpus.folder, out=tmp_path / "a", device="cpu"
    )
    before = plan.trainer.held_out()["held_out_loss"]
    for _ in plan.trainer.run():
        pass
    after = plan.trainer.held_out()["held_out_loss"]
    assert after < 0.95 * before
    assert (
        json.loads((tmp_path / "a" / "training" / "curve.jsonl").read_text().splitlines()[-1])[
            "tau_at_1"
        ]
        >= 1
    )
    exported = load_file(tmp_path / "a" / "model.safetensors")
    last = checkpoint.complete(tmp_path / "a" / "training" / "checkpoints")[-1]
    tensors, _ = checkpoint.read(last)
    name = "blocks.0.attn_qkv.weight"
    assert torch.equal(exported[name], tensors[f"e.network.{name}"])
    assert not torch.equal(exported[name], tensors[f"m.network.{name}"])
    r = recipe.load("sedd-finetune", [*sizes, *books, "steps=5", f"init={tmp_path / 'a'}"])
    plan = prepare.prepare(
        r, model=str(target_folder), data=corpus.folder, out=tmp_path / "b", device="cpu"
    )
    assert (
        plan.trainer.held_out()["held_out_loss"] < 0.95 * before
    )  # it starts where the other ended, not from scratch
    assert [(p.step, bool(p.evaluated)) for p in plan.trainer.run()] == [
        *((s, False) for s in range(1, 6)),
        (5, True),
    ]


def test_resuming_is_exact(tmp_path: Path, target_folder: Path, corpus: Corpus) -> None:
    """A run stopped twice has the losses and the final tensors of an uninterrupted one."""
    options = ("steps=17", "dropout=0.3", "ema=0.9", "accumulation=2")
    whole = trained("sedd", tmp_path / "whole", target_folder, corpus, *options)
    for stop in (7, 13, None):
        parts = trained("sedd", tmp_path / "parts", target_folder, corpus, *options, stop=stop)
    assert parts == whole and len(whole) == 17
    for name in ("model.safetensors", "training/checkpoints/00000017/training.safetensors"):
        a = load_file(tmp_path / "whole" / name)
        b = load_file(tmp_path / "parts" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_time_limit_saves_and_resumes(tmp_path: Path, target_folder: Path, corpus: Corpus) -> None:
    r = recipe.load("sedd", [*TINY["sedd"], *BOOKS, "steps=8"])
    steps = []
    for _ in range(3):
        plan = prepare.prepare(
            r, model=str(target_folder), data=corpus.folder, out=tmp_path, device="cpu"
        )
        steps += [p.step for p in plan.trainer.run(max_seconds=0)]
    assert steps == [1, 2, 3]
    assert [p.name for p in checkpoint.complete(tmp_path / "training" / "checkpoints")] == [
        "00000002",
        "00000003",
    ]


def test_stopped_while_measuring(tmp_path: Path, target_folder: Path, corpus: Corpus) -> None:
    """The step was saved before it was measured, so only the measurement is repeated."""
    log = trained("sedd", tmp_path, target_folder, corpus, "steps=4", "eval_every=2", stop=2)
    assert [entry["step"] for entry in log] == [1, 2]
    assert not (tmp_path / "training" / "curve.jsonl").exists()
    log = trained("sedd", tmp_path, target_folder, corpus, "steps=4", "eval_every=2")
    curve = [
        json.loads(line)
        for line in (tmp_path / "training" / "curve.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert [point["step"] for point in curve] == [2, 4]
    assert (
        trained("sedd", tmp_path, target_folder, corpus, "steps=4", "eval_every=2") == log
    )  # finished: nothing runs again


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 5, {"m.x": torch.ones(2)}, {"spent": 1.0})
    (tmp_path / ".00000006.partial").mkdir()
    (tmp_path / "00000007").mkdir()  # renamed, but its marker is not there yet
    assert checkpoint.complete(tmp_path) == [tmp_path / "00000005"]
    (tmp_path / "00000005" / "training.safetensors").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="00000005"):
        checkpoint.read(tmp_path / "00000005")


def test_refusals(tmp_path: Path, target_folder: Path, corpus: Corpus) -> None:
    trained("sedd", tmp_path, target_folder, corpus, "steps=5")
    with pytest.raises(UsageError, match=r"begun with lr = 0.003, not 0.1.*--out"):
        trained("sedd", tmp_path, target_folder, corpus, "steps=5", "lr=0.1")
    with pytest.raises(UsageError, match="copies layers"):
        trained("sedd", tmp_path / "b", target_folder, corpus, "steps=5", "init=target", "heads=2")
    other = tmp_path / "gpt2"
    tiny.model("gpt2", vocab=50).save_pretrained(other)
    with pytest.raises(CorpusError, match=r"vocabulary of 48.*has 50"):
        trained("sedd", tmp_path / "c", other, corpus, "steps=5")
    with pytest.raises(CorpusError, match="specdiff data"):
        prepare.prepare(
            recipe.load("sedd"),
            model=str(target_folder),
            data=tmp_path / "nothing",
            out=tmp_path / "d",
            device="cpu",
        )


def test_tensorboard_and_trackio(
    tmp_path: Path, target_folder: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = recipe.load("sedd", [*TINY["sedd"], *BOOKS, "steps=3"])
    plan = prepare.prepare(
        r,
        model=str(target_folder),
        data=corpus.folder,
        out=tmp_path,
        device="cpu",
        log_to="tensorboard",
    )
    losses = [p.record["loss"] for p in plan.trainer.run() if not p.evaluated]
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path / "training" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses)
    assert [e.step for e in events.Scalars("tau_at_0")] == [3]
    with pytest.raises(UsageError, match="known are none, tensorboard, trackio"):
        prepare.prepare(
            r,
            model=str(target_folder),
            data=corpus.folder,
            out=tmp_path / "b",
            device="cpu",
            log_to="magic",
        )
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match="pip install trackio"):
        prepare.prepare(
            r,
            model=str(target_folder),
            data=corpus.folder,
            out=tmp_path / "c",
            device="cpu",
            log_to="trackio",
        )
