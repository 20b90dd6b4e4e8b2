"""What training sees is what decoding computes: logits of both paths agree to float32 rounding."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from specdiff.data.corpus import Corpus, pad
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.errors import CorpusError
from specdiff.models.cache import RaggedCache
from specdiff.models.ragged import RaggedModel
from specdiff.targets.causal import CausalTarget
from specdiff.training import initialize, recipe
from specdiff.training.canvas_task import CanvasTask
from specdiff.training.score_entropy_task import ScoreEntropyTask
from specdiff.training.teacher import OnlineTeacher, PrecomputedTeacher, precompute
from specdiff.types import Batch, Context, SamplingParams

TOLERANCE = 1e-4
SIZES = [
    "heads=4",
    "draft_vocab=20",
    "context_window=12",
    "rows=6",
    "canvas_tokens=24",
    "objective=denoise",
    "dropout=0.5",
]


def shaken(network: torch.nn.Module, seed: int = 3) -> None:
    """No parameter stays at its initial value: an ignored one would agree by accident."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


def batch_at(rows: list[torch.Tensor]) -> Batch:
    params = SamplingParams(max_tokens=32)
    return Batch.of([r.tolist() for r in rows], [params] * len(rows), range(len(rows)))


def context_of(batch: Batch) -> Context:
    return Context(batch, None, torch.zeros_like(batch.length), None)


@pytest.mark.parametrize("draft_len", [1, 4, 7])
@pytest.mark.parametrize("init", ["null", "target"])
def test_causal_context(corpus: Corpus, model: PreTrainedModel, draft_len: int, init: str) -> None:
    """Many canvases in one pass, against one at a time over the cache, some tokens revealed."""
    r = recipe.load("sedd", [*SIZES, f"draft_lens=[{draft_len}]", f"init={init}", "revealed=0.5"])
    target = CausalTarget(tiny.copy_of(model), "tiny")
    network = initialize.sedd(r, corpus, range(40), model)
    shaken(network)
    task = CanvasTask(r, corpus, network, target.info.head, None, {}).eval()
    sample = task.prepare(range(40, 46), torch.Generator().manual_seed(0))
    L = sample.rows.ids.shape[1]
    with torch.no_grad():
        layout, states = task.states(sample)
        trained = network.logits(states[:, L:].view(*layout.slot.shape, -1))
    denoiser = SEDDDenoiser(network, target.info)
    compared = 0
    for n in range(layout.slot.shape[1]):
        prompts = [sample.rows.ids[b, : sample.anchors[b, n] + 1] for b in range(6)]
        batch = batch_at(prompts)
        state = denoiser.open(6, 128)
        denoiser.admit(state, context_of(batch), torch.arange(6))
        canvas = layout.ids[:, L:].view(6, -1, draft_len)[:, n]
        with torch.inference_mode():
            decoded = denoiser.denoise(context_of(batch), state, canvas, ~layout.hidden[:, n])
        hidden = layout.hidden[:, n] & layout.inside[:, n]
        difference = (decoded - trained[:, n])[hidden]
        assert difference.numel() == 0 or difference.abs().max() <= TOLERANCE
        compared += int(hidden.sum())
    assert compared > 50


@pytest.mark.parametrize("draft_len", [1, 4, 7])
@pytest.mark.parametrize("init", ["null", "target"])
def test_taps(corpus: Corpus, model: PreTrainedModel, draft_len: int, init: str) -> None:
    """The same with the target's states: each canvas begins with its anchor, which has none."""
    r = recipe.load(
        "sedd",
        [*SIZES, "taps=[0]", f"draft_lens=[{draft_len}]", f"init={init}", "revealed=0.5"],
    )
    target = CausalTarget(tiny.copy_of(model), "tiny")
    network = initialize.sedd(r, corpus, range(40), model)
    shaken(network)
    teacher = OnlineTeacher(model, network.config.taps)
    task = CanvasTask(r, corpus, network, target.info.head, teacher, {}).eval()
    sample = task.prepare(range(40, 46), torch.Generator().manual_seed(0))
    sample = replace(sample, anchors=sample.anchors.index_fill(1, torch.tensor([0]), 0))
    L = sample.rows.ids.shape[1]
    with torch.no_grad():
        layout, states = task.states(sample)
        trained = network.logits(states[:, L:].view(*layout.slot.shape, -1))[:, :, 1:]
    denoiser = SEDDDenoiser(network, target.info)
    compared = 0
    for n in range(layout.slot.shape[1]):
        prompts = [sample.rows.ids[b, : sample.anchors[b, n] + 1] for b in range(6)]
        batch = batch_at(prompts)
        size = batch.length - 1
        assert sample.features is not None
        context = replace(context_of(batch), features=sample.features, feature_size=size)
        state = denoiser.open(6, 128)
        denoiser.admit(state, replace(context, feature_size=size), torch.arange(6))
        canvas = layout.ids[:, L:].view(6, -1, draft_len + 1)[:, n]
        assert torch.equal(canvas[:, 0], batch.anchor)
        hidden = layout.hidden[:, n, 1:]
        with torch.inference_mode():
            decoded = denoiser.denoise(context, state, canvas[:, 1:], ~hidden)
        hidden = hidden & layout.inside[:, n, 1:]
        difference = (decoded - trained[:, n])[hidden]
        assert difference.numel() == 0 or difference.abs().max() <= TOLERANCE
        compared += int(hidden.sum())
    assert compared > 50


@pytest.mark.parametrize("draft_len", [1, 5])
def test_bidirectional_window(corpus: Corpus, model: PreTrainedModel, draft_len: int) -> None:
    """A drafting-shaped row of training is the canvas that drafting builds, time included."""
    r = recipe.load(
        "sedd",
        [
            *SIZES,
            "attention=bidirectional",
            "time_conditioning=true",
            "length=40",
            f"draft_lens=[{draft_len}]",
        ],
    )
    target = CausalTarget(tiny.copy_of(model), "tiny")
    network = initialize.sedd(r, corpus, range(40), model)
    shaken(network)
    task = ScoreEntropyTask(r, corpus, network, target.info.head, None, {}).eval()
    sample = task.prepare(range(40, 46), torch.Generator().manual_seed(0))
    corrupted = sample.corrupted
    with torch.no_grad():
        sigma = task.schedule.total(corrupted.t)
        states = network.hidden(corrupted.x, sigma, mask=corrupted.real[:, None, None])
        trained = network.logits(states)
    denoiser = SEDDDenoiser(network, target.info, window=12)
    for b in range(6):
        first = int((sample.end.index[b] == 0).nonzero())
        anchor = int(corrupted.start[b]) + first - 1
        batch = batch_at([sample.rows.ids[b, : anchor + 1]])
        canvas = torch.full((1, draft_len), network.config.tokens)
        with torch.inference_mode():
            decoded = denoiser.denoise(
                context_of(batch),
                denoiser.open(1, 64),
                canvas,
                torch.zeros(1, draft_len, dtype=torch.bool),
            )
        assert (decoded[0] - trained[b, first : first + draft_len]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("init", ["null", "target"])
def test_autoregressive(corpus: Corpus, model: PreTrainedModel, init: str) -> None:
    """One causal pass over whole rows, against the drafter's cache fed round by round."""
    r = recipe.load(
        "autoregressive", ["blocks=2", "draft_vocab=20", "objective=denoise", f"init={init}"]
    )
    network = initialize.autoregressive(r, corpus, range(40), model).eval()
    shaken(network)
    rows = [corpus[i].tokens for i in range(40, 44)]
    with torch.no_grad():
        trained = [network.logits(network.hidden(row[None]))[0] for row in rows]
    ragged = RaggedModel(network.net)
    cache = RaggedCache(4, 64)
    for start in range(0, 9, 3):
        ids = torch.stack([row[start : start + 3] for row in rows])
        logits, _ = ragged.forward(cache, ids, torch.arange(start, start + 3).expand(4, -1))
        for row in range(4):
            assert (logits[row] - trained[row][start : start + 3]).abs().max() <= TOLERANCE


def test_whole_target_as_its_own_drafter(corpus: Corpus, model: PreTrainedModel) -> None:
    """All of the target's layers, copied by name, give exactly the target's logits."""
    r = recipe.load(
        "autoregressive", ["blocks=2", "draft_vocab=null", "init=target", "objective=denoise"]
    )
    network = initialize.autoregressive(r, corpus, range(40), model).eval()
    row = corpus[0].tokens[None]
    with torch.no_grad():
        assert (network.logits(network.hidden(row)) - model(row).logits).abs().max() <= TOLERANCE


def test_teachers_agree(corpus: Corpus, model: PreTrainedModel, tmp_path: Path) -> None:
    """Stored states give the target's probabilities to bfloat16 rounding, and these sum to 1."""
    shutil.copytree(corpus.folder, tmp_path / "corpus")
    copied = Corpus(tmp_path / "corpus")
    with pytest.raises(CorpusError, match="--features"):
        PrecomputedTeacher(copied)
    assert list(precompute(model, copied, "digest", rows=4))[-1] == (corpus.tokens, corpus.tokens)
    assert list(precompute(model, copied, "digest", rows=4)) == []  # nothing is computed twice
    rows = [0, 5, 11]
    ids = pad([corpus[i].tokens for i in rows])
    head = model.get_output_embeddings().weight.detach()
    read = PrecomputedTeacher(Corpus(tmp_path / "corpus"))(rows, ids)
    run = OnlineTeacher(model)(rows, ids)
    stored, log_z = read.final, read.log_z
    live, live_log_z = run.final, run.log_z
    for i, row in enumerate(rows):
        n = len(corpus[row].tokens)
        probabilities = (stored[i, :n] @ head.T - log_z[i, :n, None]).exp()
        assert (probabilities.sum(-1) - 1).abs().max() < 1e-5
        assert (
            probabilities - (live[i, :n] @ head.T - live_log_z[i, :n, None]).exp()
        ).abs().max() < 0.05
