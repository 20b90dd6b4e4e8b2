"""Losses, draws and rates of training, worked out again in plain loops over a corpus of three rows.

Networks and target run on one unpadded text at a time; distributions, divergences, weights and
means are computed here from their logits, token by token.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import tiny
from specdiff.data.corpus import Corpus, CorpusWriter, Row
from specdiff.errors import UnsupportedModelError
from specdiff.nn.ddit import SEDD
from specdiff.training import initialize, recipe
from specdiff.training.canvas_task import CanvasTask
from specdiff.training.causal_task import AutoregressiveTask, TargetTask
from specdiff.training.recipe import Recipe
from specdiff.training.score_entropy_task import ScoreEntropyTask
from specdiff.training.teacher import OnlineTeacher

VOCAB = 12
WORDS = 8  # of the draft vocabulary
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8], [11, 0, 10]]
PROMPTS = [4, 2, 1]
NEAR = 2e-5
SMALL = ["blocks=1", f"draft_vocab={WORDS}", "heads=4", "dropout=0"]
CANVASES = [*SMALL, "context_window=3", "draft_lens=[3]", "canvas_tokens=18", "revealed=0.4"]
WINDOWS = [
    *SMALL,
    "attention=bidirectional",
    "time_conditioning=true",
    "context_window=4",
    "draft_lens=[3]",
]
SCORES = ["objective=score_entropy", "draft_vocab=null"]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.model("llama", vocab=VOCAB)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("three")
    with CorpusWriter(folder, {"target": "tiny", "source": "test"}, vocab_size=VOCAB) as writer:
        for key, (tokens, prompt_length) in enumerate(zip(ROWS, PROMPTS, strict=True)):
            writer.add(Row(torch.tensor(tokens), prompt_length, 0.0, key))
    return Corpus(folder)


# ---- the slow computation ----


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.fsum(math.exp(v - top) for v in logits)
    return [math.exp(v - top) / total for v in logits]


def distribution_after(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    """The target's distribution of the token that follows."""
    with torch.no_grad():
        return softmax(model(torch.tensor([tokens])).logits[0, -1].tolist())


def accepted(logits: list[float], p: list[float] | None, truth: int, vocab: list[int]) -> float:
    """The acceptance probability: the overlap with the target, or the probability of the truth."""
    q = softmax(logits)
    if p is None:
        return q[vocab.index(truth)] if truth in vocab else 0.0
    return math.fsum(min(q[column], p[token]) for column, token in enumerate(vocab))


def loss_of(
    logits: list[float], p: list[float] | None, truth: int, vocab: list[int], r: Recipe
) -> float:
    """Loss of one position; a token outside the draft vocabulary has no cross-entropy."""
    q = softmax(logits)
    cross_entropy = -math.log(q[vocab.index(truth)]) if truth in vocab else 0.0
    if p is None:
        return cross_entropy
    forward = math.fsum(
        p[token] * math.log(p[token] / q[column]) for column, token in enumerate(vocab)
    )
    divergence = forward
    if r.divergence == "hybrid":
        overlap = accepted(logits, p, truth, vocab)
        trust = math.exp(-3 * overlap)
        divergence = trust * forward + (1 - trust) * (1 - overlap)
    return (1 - r.truth_share) * divergence + r.truth_share * cross_entropy


def weights_of(q: list[float], r: Recipe) -> list[float]:
    """The weight of each drafted position."""
    if r.weights == "exponential":
        return [math.exp(-k / r.weight_scale) for k in range(len(q))]
    if r.weights == "streak":
        return [math.prod(q[:k]) for k in range(len(q))]
    if r.weights == "d_pace":
        reached = [math.prod(0.5 + 0.5 * v for v in q[: k + 1]) for k in range(len(q))]
        return [math.fsum(reached[k:]) for k in range(len(q))]
    return [1.0] * len(q)


def expected_accepted(q: list[float]) -> float:
    return math.fsum(math.prod(q[: k + 1]) for k in range(len(q)))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def shaken(network: torch.nn.Module) -> None:
    """No parameter stays at its initial value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def task_of(network: SEDD) -> type[CanvasTask] | type[ScoreEntropyTask]:
    return CanvasTask if network.config.attention == "causal-context" else ScoreEntropyTask


def sedd_task(r: Recipe, corpus: Corpus, model: PreTrainedModel) -> Any:
    network = initialize.sedd(r, corpus, range(3), model)
    shaken(network)
    head = model.get_output_embeddings().weight.detach()
    teacher = OnlineTeacher(model) if r.objective == "distill" else None
    task = task_of(network)(r, corpus, network, head, teacher, {})
    return task.eval()


def vocab_of(network: Any) -> list[int]:
    return network.draft_vocab.tolist()


def on_canvas(task: CanvasTask, past: list[int], canvas: list[int]) -> list[list[list[float]]]:
    """Logits [clean, canvas] of one canvas after one text.

    A clean token sees `window` clean ones, a canvas token its anchor's past and the canvas.
    """
    window = task.network.config.context_window
    L = len(past)
    G = len(canvas)
    mask = torch.zeros(1, 1, L + G, L + G, dtype=torch.bool)
    for i in range(L + G):
        last = min(i, L - 1)
        for j in range(L + G):
            mask[0, 0, i, j] = last - window < j <= last or (i >= L and j >= L)
    with torch.no_grad():
        states = task.network.hidden(torch.tensor([past + canvas]), torch.zeros(1), mask=mask)
        logits = task.network.logits(states)[0].tolist()
    return [logits[:L], logits[L:]]


def alone(task: ScoreEntropyTask, x: list[int], t: float) -> list[list[float]]:
    """Logits of a whole corrupted text, its noise level that of the log-linear schedule."""
    sigma = -math.log(1 - (1 - 1e-3) * t)
    with torch.no_grad():
        states = task.network.hidden(torch.tensor([x]), torch.tensor([sigma]))
        return task.network.logits(states)[0].tolist()


# ---- losses ----


@pytest.mark.parametrize(
    "changes",
    [
        ["objective=denoise", "weights=exponential", "weight_scale=2"],
        ["divergence=forward", "weights=streak", "auxiliary=0"],
        ["divergence=hybrid", "truth_share=0.2", "weights=exponential", "weight_scale=2"],
        ["divergence=forward", "truth_share=0.8", "weights=uniform"],
        ["objective=denoise", "weights=d_pace"],
    ],
    ids=" ".join,
)
def test_canvases(changes: list[str], corpus: Corpus, model: PreTrainedModel) -> None:
    r = recipe.load("sedd", [*CANVASES, *changes])
    task = sedd_task(r, corpus, model)
    vocab = vocab_of(task.network)
    mask = VOCAB
    batch = task.prepare(range(3), torch.Generator().manual_seed(1))
    progress = 0.25
    with torch.no_grad():
        loss, records = task(batch, progress)

    sums = []
    weights = []
    first = []
    accepts = []
    following = []
    beyond = revealed_canvases = 0
    for b, row in enumerate(ROWS):
        for anchor, revealed in zip(
            batch.anchors[b].tolist(), batch.revealed[b].tolist(), strict=True
        ):
            true = row[anchor + 1 : anchor + 4]
            canvas = [true[k] if k < revealed else mask for k in range(3)]
            _, logits = on_canvas(task, row[: anchor + 1], canvas)
            q = []
            losses = []
            for k in range(3):
                if k >= len(true):
                    q.append(0.0)
                    losses.append(None)
                elif k < revealed:
                    q.append(1.0)
                    losses.append(None)
                else:
                    p = (
                        distribution_after(model, row[: anchor + 1 + k])
                        if r.objective == "distill"
                        else None
                    )
                    q.append(accepted(logits[k], p, true[k], vocab))
                    losses.append(loss_of(logits[k], p, true[k], vocab, r))
            for weight, value in zip(weights_of(q, r), losses, strict=True):
                if value is not None:
                    sums.append(weight * value)
                    weights.append(weight)
            if revealed == 0 and len(true) == 3:
                first.append(q[0])
                accepts.append(expected_accepted(q))
            beyond += len(true) < 3
            revealed_canvases += revealed > 0
        clean, _ = on_canvas(task, row, [mask])
        for i in range(len(row) - 1):
            if row[i + 1] in vocab:
                following.append(-math.log(softmax(clean[i])[vocab.index(row[i + 1])]))
    assert first
    assert beyond
    assert revealed_canvases  # every case is there
    expected = math.fsum(sums) / math.fsum(weights) + r.auxiliary * (1 - progress) * mean(following)
    assert loss.item() == pytest.approx(expected, rel=NEAR)
    assert records["q1"].item() == pytest.approx(mean(first), rel=NEAR)
    assert records["expected_tau"].item() == pytest.approx(1 + mean(accepts), rel=NEAR)


@pytest.mark.parametrize(
    "changes",
    [
        ["objective=denoise", "weights=exponential", "weight_scale=2"],
        ["divergence=hybrid", "truth_share=0.2", "weights=exponential", "weight_scale=2"],
        ["divergence=forward", "truth_share=0.8", "weights=streak"],
    ],
    ids=" ".join,
)
def test_a_window_as_it_is_drafted(
    changes: list[str], corpus: Corpus, model: PreTrainedModel
) -> None:
    r = recipe.load("sedd", [*WINDOWS, *changes])
    task = sedd_task(r, corpus, model)
    vocab = vocab_of(task.network)
    mask = VOCAB
    sums = []
    weights = []
    first = []
    accepts = []
    rows = [0, 1, 2, 0, 0, 1]
    batch = task.prepare(rows, torch.Generator().manual_seed(5))
    with torch.no_grad():
        loss, records = task(batch, 0.0)
    for b, row in enumerate(ROWS[i] for i in rows):
        anchor = int(batch.corrupted.start[b]) + batch.end.index[b].tolist().index(0) - 1
        past = row[max(0, anchor + 1 - 4) : anchor + 1]
        t = min(1.0, 3 / (len(past) + 3) / (1 - 1e-3))
        logits = alone(task, past + [mask] * 3, t)[len(past) :]
        q = [0.0] * 3
        losses = [0.0] * 3
        for k, truth in enumerate(row[anchor + 1 : anchor + 4]):
            p = (
                distribution_after(model, row[: anchor + 1 + k])
                if r.objective == "distill"
                else None
            )
            q[k] = accepted(logits[k], p, truth, vocab)
            losses[k] = loss_of(logits[k], p, truth, vocab, r)
        inside = min(3, len(row) - anchor - 1)
        sums += [w * v for w, v in zip(weights_of(q, r), losses, strict=True)][:inside]
        weights += weights_of(q, r)[:inside]
        first.append(q[0])
        accepts.append(expected_accepted(q))
    assert len(weights) < 3 * len(rows)  # some canvas reaches beyond its row
    assert loss.item() == pytest.approx(math.fsum(sums) / math.fsum(weights), rel=NEAR)
    assert records["q1"].item() == pytest.approx(mean(first), rel=NEAR)
    assert records["expected_tau"].item() == pytest.approx(1 + mean(accepts), rel=NEAR)


@pytest.mark.parametrize(
    "changes", [["objective=denoise"], ["divergence=forward", "truth_share=0.2"]], ids=" ".join
)
def test_masks_at_uniform_time(changes: list[str], corpus: Corpus, model: PreTrainedModel) -> None:
    """The sum over masked positions of loss / t, over all positions: MDLM's bound, per token."""
    r = recipe.load("sedd", [*WINDOWS, "drafting_share=0", "length=5", *changes])
    task = sedd_task(r, corpus, model)
    vocab = vocab_of(task.network)
    mask = VOCAB
    rows = [0, 1, 2, 2, 1, 0, 1]
    batch = task.prepare(rows, torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss, _ = task(batch, 0.0)
    terms = []
    tokens = 0
    unpredictable = 0
    for b, row in enumerate(ROWS[i] for i in rows):
        start = int(batch.corrupted.start[b])
        t = batch.corrupted.t[b].item()
        crop = row[start : start + 5]
        x = batch.corrupted.x[b].tolist()[: len(crop)]
        assert all(x[i] in (token, mask) for i, token in enumerate(crop))
        assert batch.corrupted.real[b].tolist() == [i < len(crop) for i in range(5)]
        logits = alone(task, x, t)
        tokens += len(crop)
        for i, token in enumerate(x):
            if token != mask:
                continue
            if start + i == 0:
                unpredictable += 1  # nothing comes before the first token
                continue
            p = distribution_after(model, row[: start + i]) if r.objective == "distill" else None
            terms.append(loss_of(logits[i], p, crop[i], vocab, r) / t)
    assert unpredictable
    assert batch.corrupted.start.max() > 0
    assert loss.item() == pytest.approx(math.fsum(terms) / tokens, rel=NEAR)


@pytest.mark.parametrize("drafted", [True, False])
def test_score_entropy(drafted: bool, corpus: Corpus, model: PreTrainedModel) -> None:
    """sigma'(t) (sum of scores - r log s(truth) + r (log r - 1)) at every MASK.

    r = 1 / (e^sigma - 1); in nats per token, or per MASK of a canvas.
    """
    share = 1 if drafted else 0
    r = recipe.load("sedd", [*WINDOWS, *SCORES, f"drafting_share={share}", "length=7"])
    task = sedd_task(r, corpus, model)
    rows = [0, 1, 2, 0]
    batch = task.prepare(rows, torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss, _ = task(batch, 0.0)
    terms = []
    count = 0
    for b, row in enumerate(ROWS[i] for i in rows):
        start = int(batch.corrupted.start[b])
        t = batch.corrupted.t[b].item()
        masked = 1 - (1 - 1e-3) * t  # e^-sigma
        sigma = -math.log(masked)
        rate = (1 - 1e-3) / masked
        ratio = 1 / math.expm1(sigma)
        real = int(batch.corrupted.real[b].sum())
        x = batch.corrupted.x[b].tolist()[:real]
        logits = alone(task, x, t)
        for i, token in enumerate(x):
            inside = start + i < len(row)
            if inside and (token == VOCAB or not drafted):
                count += 1
            if not inside or token != VOCAB:
                continue
            offset = math.log(math.expm1(sigma)) + math.log(
                VOCAB
            )  # the authors' parametrization of an absorbing score
            log_score = [v - offset for v in logits[i]]
            truth = row[start + i]
            entropy = math.fsum(math.exp(v) for v in log_score)
            entropy += ratio * (math.log(ratio) - 1) - ratio * log_score[truth]
            terms.append(rate * entropy * (t if drafted else 1))
    assert loss.item() == pytest.approx(math.fsum(terms) / count, rel=NEAR)


@pytest.mark.parametrize(
    "changes",
    [["objective=denoise"], ["divergence=hybrid", "truth_share=0.2"], ["divergence=forward"]],
    ids=" ".join,
)
def test_autoregressive(changes: list[str], corpus: Corpus, model: PreTrainedModel) -> None:
    r = recipe.load("autoregressive", ["blocks=1", f"draft_vocab={WORDS}", "init=null", *changes])
    network = initialize.autoregressive(r, corpus, range(3), model)
    shaken(network)
    head = model.get_output_embeddings().weight.detach()
    teacher = OnlineTeacher(model) if r.objective == "distill" else None
    task = AutoregressiveTask(r, corpus, network, head, teacher, {}).eval()
    vocab = vocab_of(network)
    with torch.no_grad():
        loss, records = task(task.prepare(range(3), torch.Generator()), 0.0)
    losses = []
    answers = []
    for row, prompt_length in zip(ROWS, PROMPTS, strict=True):
        for i in range(1, len(row)):
            with torch.no_grad():
                logits = network.logits(network.hidden(torch.tensor([row[:i]])))[0, -1].tolist()
            p = distribution_after(model, row[:i]) if teacher is not None else None
            losses.append(loss_of(logits, p, row[i], vocab, r))
            if i >= prompt_length:
                answers.append(accepted(logits, p, row[i], vocab))
    assert loss.item() == pytest.approx(mean(losses), rel=NEAR)
    assert records["q1"].item() == pytest.approx(mean(answers), rel=NEAR)


def test_the_target_itself(corpus: Corpus, model: PreTrainedModel) -> None:
    task = TargetTask(recipe.load("target"), corpus, model, None)
    with torch.no_grad():
        loss, _ = task(task.prepare(range(3), torch.Generator()), 0.0)
    losses = [
        -math.log(distribution_after(model, row[:i])[row[i]])
        for row in ROWS
        for i in range(1, len(row))
    ]
    assert loss.item() == pytest.approx(mean(losses), rel=NEAR)


# ---- batches ----


def test_draft_lengths_are_drawn_from_the_list(corpus: Corpus, model: PreTrainedModel) -> None:
    """Each entry as often, and as many canvases as fit the tokens."""
    r = recipe.load(
        "sedd", [*CANVASES, "objective=denoise", "draft_lens=[2,4,4,7]", "canvas_tokens=9"]
    )
    task = sedd_task(r, corpus, model)
    counts = {2: 0, 4: 0, 7: 0}
    for seed in range(400):
        batch = task.prepare([0], torch.Generator().manual_seed(seed))
        draft_len = batch.draft_len
        counts[draft_len] += 1
        assert batch.anchors.shape == (1, 9 // draft_len)
    assert all(abs(counts[n] - expected) < 50 for n, expected in {2: 100, 4: 200, 7: 100}.items())


def test_a_drafted_window_fits_the_network(corpus: Corpus, model: PreTrainedModel) -> None:
    """With its canvas it has at most `length` tokens, however long a context the recipe allows."""
    changes = [*WINDOWS, "objective=denoise", "context_window=100", "length=7"]
    task = sedd_task(recipe.load("sedd", changes), corpus, model)
    widths = set()
    for seed in range(30):
        batch = task.prepare([0], torch.Generator().manual_seed(seed))
        widths.add(int(batch.corrupted.real.sum()))
        anchor = int(batch.corrupted.start[0]) + batch.end.index[0].tolist().index(0) - 1
        assert int(batch.corrupted.start[0]) == max(0, anchor + 1 - 4)
    assert max(widths) == 7


# ---- where a network begins ----


@pytest.mark.parametrize(
    ("blocks", "layers", "expected"),
    [(1, 2, [0]), (2, 30, [0, 29]), (4, 10, [0, 3, 6, 9]), (3, 3, [0, 1, 2])],
)
def test_layers_are_spread(blocks: int, layers: int, expected: list[int]) -> None:
    assert initialize._spread(blocks, layers) == expected


def test_a_small_model_begins_with_the_target_s_first_and_last_layer(corpus: Corpus) -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=4, num_key_value_heads=2)
    target = LlamaForCausalLM(config)
    r = recipe.load("autoregressive", ["blocks=2", "draft_vocab=null"])
    own = initialize.autoregressive(r, corpus, range(3), target).net.state_dict()
    source = target.state_dict()
    assert sum(name.startswith("model.layers.") for name in own) == 2 * 9
    for name, tensor in own.items():
        origin = name.replace("layers.1.", "layers.3.")
        assert torch.equal(tensor, source[origin])


def test_a_block_begins_with_the_target_s_attention(corpus: Corpus) -> None:
    """Equal states in, equal states out: heads see their group's keys, positions rotate alike."""
    torch.manual_seed(0)
    target = LlamaForCausalLM(
        LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2)
    ).eval()
    for parameter in target.parameters():
        parameter.data.normal_(std=0.3)  # norms too, which are all alike at first
    r = recipe.load("sedd", ["blocks=2", f"draft_vocab={WORDS}", "heads=4", "init=target"])
    network = initialize.sedd(r, corpus, range(3), target)
    L = 7
    states = torch.randn(1, L, 32)
    positions = torch.arange(L)[None]
    causal = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    angle = positions[..., None] * torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)])
    turns = target.model.rotary_emb(states, positions)
    for block, layer in zip(
        network.blocks, (target.model.layers[0], target.model.layers[2]), strict=True
    ):
        with torch.no_grad():
            ours = block.attn_out(block.attend(states, angle, causal, None))
            expected, _ = layer.self_attn(states, turns, None)
        assert (ours - expected).abs().max() < 1e-5
        assert torch.equal(block.norm1.weight, layer.input_layernorm.weight)
        assert torch.equal(block.norm2.weight, layer.post_attention_layernorm.weight)
        assert torch.equal(block.mlp[0].weight[:64], layer.mlp.up_proj.weight)
        assert torch.equal(block.mlp[2].weight[:, :64], layer.mlp.down_proj.weight)


def test_a_new_network_is_open(corpus: Corpus, model: PreTrainedModel) -> None:
    """Gates at 1, the target's final norm at a tenth, a MASK embedding of the table's size."""
    network = initialize.sedd(recipe.load("sedd", CANVASES), corpus, range(3), model)
    norm = model.get_parameter("model.norm.weight")
    assert torch.allclose(network.output_layer.norm_final.weight, 0.1 * norm)
    for block in network.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation.bias.chunk(6)
        assert gate1.eq(1).all()
        assert gate2.eq(1).all()
        assert not any(part.any() for part in (shift1, scale1, shift2, scale2))
    table = model.get_input_embeddings().weight
    deviation = network.vocab_embed.mask_embedding.square().mean().sqrt()
    assert 0.5 < deviation / table.std() < 1.5


def test_an_earlier_network_takes_this_run_s_settings(
    corpus: Corpus, model: PreTrainedModel, tmp_path: Path
) -> None:
    """Its weights, but the run's own dropout and output; the exported network has no dropout."""
    first = sedd_task(
        recipe.load("sedd", [*WINDOWS, *SCORES, "length=7", "dropout=0.3"]), corpus, model
    )
    first.export(tmp_path, first.network.state_dict())
    assert SEDD.from_pretrained(tmp_path).config.dropout == 0
    changes = [
        *WINDOWS,
        "objective=denoise",
        "draft_vocab=null",
        "length=7",
        "dropout=0.4",
        f"init={tmp_path}",
        "save_dtype=float32",
    ]
    r = recipe.load("sedd", changes)
    second = initialize.sedd(r, corpus, range(3), model)
    assert (first.network.config.output, second.config.output) == ("score", "denoiser")
    assert {block.dropout for block in second.blocks} == {0.4}
    for name, tensor in first.network.state_dict().items():
        assert torch.allclose(second.state_dict()[name], tensor, rtol=1e-2)


def test_a_target_that_changes_its_logits_cannot_teach() -> None:
    config = CohereConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=4, logit_scale=0.1)
    with pytest.raises(UnsupportedModelError, match="transforms its logits"):
        OnlineTeacher(CohereForCausalLM(config))


@pytest.mark.parametrize(
    "texts", [[[8, 9, 8, 9], [9, 8]], [[3], [8]]], ids=["words outside", "single tokens"]
)
@pytest.mark.parametrize("kind", ["canvases", "windows", "scores", "autoregressive", "target"])
def test_a_batch_that_teaches_nothing(
    kind: str, texts: list[list[int]], model: PreTrainedModel, tmp_path: Path
) -> None:
    """Where no token counts, the loss and its gradients are numbers still."""
    rows = [*texts, *([[0, 1, 2, 3, 4, 5, 6, 7]] * 3)]
    with CorpusWriter(tmp_path, {"target": "tiny", "source": "test"}, vocab_size=VOCAB) as writer:
        for key, tokens in enumerate(rows):
            writer.add(Row(torch.tensor(tokens), 1, 0.0, key))
    corpus = Corpus(tmp_path)
    task: Any
    if kind == "target":
        task = TargetTask(recipe.load("target"), corpus, tiny.copy_of(model), None)
    elif kind == "autoregressive":
        r = recipe.load(
            "autoregressive", ["blocks=1", f"draft_vocab={WORDS}", "objective=denoise", "init=null"]
        )
        network = initialize.autoregressive(r, corpus, range(2, 5), model)
        task = AutoregressiveTask(r, corpus, network, None, None, {})
    else:
        changes = {
            "canvases": [*CANVASES, "objective=denoise"],
            "windows": [*WINDOWS, "objective=denoise"],
            "scores": [*WINDOWS, *SCORES, "length=7"],
        }
        r = recipe.load("sedd", changes[kind])
        network = initialize.sedd(r, corpus, range(2, 5), model)
        task = task_of(network)(r, corpus, network, None, None, {})
    loss, records = task(task.prepare(range(2), torch.Generator().manual_seed(0)), 0.0)
    assert loss.isfinite()
    assert all(value.isfinite() for value in records.values())
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())
    if kind != "scores" and (kind != "target" or len(texts[0]) == 1):
        assert loss == 0
