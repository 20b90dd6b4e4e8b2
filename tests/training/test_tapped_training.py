"""Training SEDD over its target's hidden states: stored or computed, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tiny
from specdiff import catalog
from specdiff.data.corpus import Corpus
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.errors import UsageError
from specdiff.nn.ddit import SEDD
from specdiff.targets.causal import CausalTarget
from specdiff.training import features, initialize, prepare, recipe
from specdiff.training.teacher import OnlineTeacher, PrecomputedTeacher

SIZES = [
    "taps=[0]",
    "heads=4",
    "draft_vocab=40",
    "context_window=16",
    "rows=4",
    "canvas_tokens=16",
    "warmup=2",
    "steps=6",
    "log_every=1",
    "save_every=3",
    "eval_every=6",
    "eval_prompts=2",
    "eval_tokens=8",
]


def prepared(out: Path, target: Path, corpus: Corpus, *changes: str) -> prepare.TrainingRun:
    r = recipe.load("sedd", [*SIZES, *changes])
    return prepare.prepare(r, model=str(target), data=corpus.folder, out=out, device="cpu")


def losses(plan: prepare.TrainingRun, out: Path) -> list[float]:
    list(plan.trainer.run())
    lines = (out / "training" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("objective", ["distill", "denoise"])
def test_stored_states_train_like_computed_ones(
    objective: str, tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    """Up to the rounding of what is stored; and the folder drafts with the target's states."""
    change = f"objective={objective}"
    online = prepared(tmp_path / "online", target_folder, corpus, change)
    assert isinstance(online.trainer.task.teacher, OnlineTeacher)
    shutil.copytree(corpus.folder, tmp_path / "corpus")
    target = CausalTarget(tiny.model("llama"), str(target_folder))
    features.store(target, tmp_path / "corpus", layers=(0,))
    stored = prepared(tmp_path / "stored", target_folder, Corpus(tmp_path / "corpus"), change)
    assert isinstance(stored.trainer.task.teacher, PrecomputedTeacher)
    pairs = zip(
        losses(online, tmp_path / "online"), losses(stored, tmp_path / "stored"), strict=True
    )
    assert all(abs(one - other) < 0.05 * one for one, other in pairs)
    drafter = catalog.drafter(str(tmp_path / "stored"), target.info)
    assert isinstance(drafter, DenoisingDrafter) and drafter.taps == (0,)
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    assert config["taps"] == [0]
    card = (tmp_path / "stored" / "README.md").read_text()
    assert "taps:" in card
    weights = load_file(tmp_path / "stored" / "model.safetensors")
    assert weights["fc.weight"].shape == (tiny.WIDTH, tiny.WIDTH)
    assert float(weights["direct.weight"].abs().max()) > 0  # it began at 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["attention=bidirectional"], "taps need attention: causal-context"),
        (["borrow_embeddings=false", "draft_vocab=null"], "borrow_embeddings: true"),
        (["kind=autoregressive"], "kind: autoregressive reads no layers of the target"),
    ],
)
def test_recipes_that_cannot_have_taps_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe.load("sedd", [*SIZES, *changes])


@pytest.mark.parametrize("layer", [1, 9])
def test_layers_that_the_target_cannot_show_are_refused(
    layer: int, tmp_path: Path, target_folder: Path, corpus: Corpus
) -> None:
    with pytest.raises(UsageError, match=rf"taps \[{layer}\]: the target's layers are 0..1"):
        prepared(tmp_path, target_folder, corpus, f"taps=[{layer}]")


def earlier(folder: Path, **changes: Any) -> Path:
    config = tiny.sedd_config(**{**tiny.CACHED, "context_window": 16, **changes})
    tiny.sedd(config).save_pretrained(folder)
    return folder


def test_a_run_goes_on_from_a_drafter_with_the_same_taps(
    tmp_path: Path, corpus: Corpus, model: PreTrainedModel
) -> None:
    plain = earlier(tmp_path / "plain")
    with pytest.raises(UsageError, match=r"reads layers \[\] of the target, .* says \[0\]"):
        initialize.sedd(recipe.load("sedd", [*SIZES, f"init={plain}"]), corpus, range(9), model)
    tapped = earlier(tmp_path / "tapped", taps=(0,))
    for change in ("taps=[0]", "taps=null"):
        r = recipe.load("sedd", [*SIZES, change, f"init={tapped}"])
        network = initialize.sedd(r, corpus, range(9), model)
        assert network.config.taps == (0,)
        assert torch.equal(network.fc.weight, SEDD.from_pretrained(tapped).fc.weight)
