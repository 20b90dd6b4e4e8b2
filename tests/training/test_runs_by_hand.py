"""A run's draws, rows, measurements and updates, worked out again in plain loops."""

import math
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from specdiff import SpeculativeLM, catalog, decode, verify
from specdiff.data import generate
from specdiff.data.corpus import Corpus, CorpusWriter, Row
from specdiff.data.generate import CorpusSettings
from specdiff.data.ledger import Ledger
from specdiff.data.sources import Opening, SourcePrompt
from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Loglinear
from specdiff.noise import Noise, Purpose, row_seed
from specdiff.targets.causal import CausalTarget
from specdiff.training import canvases, evaluation, initialize, prepare, recipe
from specdiff.training.checkpoint import TrainingState
from specdiff.training.trainer import learning_rate
from specdiff.types import Batch, SamplingParams

DRAWS = 40_000
SMALL = [
    "blocks=1",
    "draft_vocab=20",
    "context_window=6",
    "draft_lens=[2]",
    "canvas_tokens=4",
    "rows=2",
]
BOOKS = ["log_every=1", "save_every=1000", "eval_every=1000", "eval_prompts=3", "eval_tokens=6"]
SHARE = "held_out=0.3"


def near(count: int, chance: float) -> bool:
    """Whether a share of the draws is this chance, up to five standard deviations."""
    return abs(count / DRAWS - chance) <= 5 * math.sqrt(chance * (1 - chance) / DRAWS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """20 rows; row i repeats tokens 2i and 2i + 1, which no other row has."""
    folder = tmp_path_factory.mktemp("rows")
    with CorpusWriter(
        folder, {"target": "tiny", "source": "test"}, vocab_size=tiny.VOCAB, shard_tokens=60
    ) as writer:
        for i in range(20):
            writer.add(Row(torch.tensor([2 * i, 2 * i + 1] * (3 + i % 4)), 3, 0.0, i))
    return Corpus(folder)


def run_of(
    kind: str, corpus: Corpus, target_folder: Path, out: Path, *changes: str
) -> prepare.TrainingRun:
    r = recipe.load(kind, [*SMALL, *BOOKS, SHARE, *changes])
    return prepare.prepare(r, model=str(target_folder), data=corpus.folder, out=out, device="cpu")


# ---- draws ----


def test_anchors() -> None:
    """Nine in ten lie in the answer, one in ten anywhere; each leaves a token to draft.

    The first token drafted in an answer is the answer's first.
    """
    lengths = torch.tensor([8, 5, 2])
    prompts = torch.tensor([3, 1, 2])
    anchors = canvases.pick_anchors(lengths, prompts, DRAWS, torch.Generator().manual_seed(0))
    for row, (length, prompt) in enumerate(zip([8, 5, 2], [3, 1, 2], strict=True)):
        counts = Counter(anchors[row].tolist())
        first = min(prompt - 1, length - 2)
        last = length - 2
        expected = {}
        for anchor in range(last + 1):
            expected[anchor] = 0.1 / (last + 1)
            if anchor >= first:
                expected[anchor] += 0.9 / (last + 1 - first)
        assert counts.keys() == expected.keys()
        assert all(near(counts[anchor], chance) for anchor, chance in expected.items())


@pytest.mark.parametrize(("draft_len", "most"), [(1, 0), (2, 1), (3, 1), (8, 4)])
def test_revealed(draft_len: int, most: int) -> None:
    """A share of the canvases shows one token up to half of them, each number as often."""
    generator = torch.Generator().manual_seed(0)
    revealed = canvases.pick_revealed(torch.Size([1, DRAWS]), draft_len, 0.3, generator)
    counts = Counter(revealed[0].tolist())
    assert max(counts) == most
    for number in range(1, most + 1):
        assert near(counts[number], 0.3 / most)


@pytest.mark.parametrize("process", [Absorbing(9), Uniform(9)])
def test_uniform_time(process: Absorbing | Uniform) -> None:
    """t is uniform from 1e-3 to 1; a token is hidden (or drawn anew) with chance (1 - 1e-3) t."""
    ids = torch.full((DRAWS, 1), 4)
    lengths = torch.ones(DRAWS, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    corrupted = canvases.at_uniform_time(ids, lengths, 5, process, Loglinear(), generator)
    t = corrupted.t
    assert 1e-3 <= t.min() < 1.2e-3
    assert 0.999 < t.max() <= 1
    for edge in (0.25, 0.5, 0.75):
        assert near(int((t < edge).sum()), (edge - 1e-3) / (1 - 1e-3))
    changed = int((corrupted.x[:, 0] != 4).sum())
    hidden = (1 - 1e-3) * (1 + 1e-3) / 2  # the mean over t
    assert near(changed, hidden if isinstance(process, Absorbing) else hidden * 8 / 9)


def test_crops() -> None:
    """A crop begins anywhere it fits, and only there; a short row is whole."""
    ids = torch.arange(7).expand(DRAWS, 7)
    for length, starts in ((7, 4), (5, 2), (3, 1)):
        lengths = torch.full((DRAWS,), length)
        generator = torch.Generator().manual_seed(length)
        corrupted = canvases.at_uniform_time(ids, lengths, 4, Absorbing(9), Loglinear(), generator)
        counts = Counter(corrupted.start.tolist())
        assert counts.keys() == set(range(starts))
        assert all(near(count, 1 / starts) for count in counts.values()) or starts == 1
        assert (corrupted.real.sum(1) == min(4, length)).all()


# ---- rows ----


def test_which_rows_a_run_sees(
    corpus: Corpus, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps draw from all training rows; the held-out loss takes each held-out row once."""
    trainer = run_of(
        "sedd", corpus, target_folder, tmp_path, "steps=40", "objective=denoise"
    ).trainer
    rows: list[int] = []
    prepare = trainer.task.prepare

    def listening(batch: Any, generator: torch.Generator) -> Any:
        rows.extend(batch)
        return prepare(batch, generator)

    monkeypatch.setattr(trainer.task, "prepare", listening)
    training, held_out = corpus.split(0.3)
    for step in range(200):
        trainer._batches(step)
    assert set(rows) == set(training)
    assert not set(rows) & set(held_out)
    assert len(rows) == 200 * 2 * trainer.recipe.accumulation
    rows.clear()
    trainer.held_out()
    assert rows == list(held_out)
    rows.clear()
    trainer.training_rows = trainer.training_rows[5:8]
    for step in range(10):
        trainer._batches(step)
    assert set(rows) == set(training[5:8])


@pytest.mark.parametrize("kind", ["sedd", "autoregressive"])
def test_the_held_out_loss(kind: str, corpus: Corpus, target_folder: Path, tmp_path: Path) -> None:
    """The mean over batches of held-out rows, without dropout and auxiliary loss."""
    changes = ["objective=denoise", "draft_vocab=null", "dropout=0.5", "init=null"]
    trainer = run_of(kind, corpus, target_folder, tmp_path, *changes).trainer
    shake(trainer.task.network)
    trainer.model.train()  # as between two steps
    held_out = trainer.held_out()
    task = trainer.task.eval()
    rows = list(corpus.split(0.3)[1])
    losses = []
    first = []
    for start in range(0, len(rows), 2):
        batch = task.prepare(rows[start : start + 2], torch.Generator().manual_seed(start))
        with torch.no_grad():
            loss, records = task(batch, 1.0)
        losses.append(loss.item())
        first.append(records["q1"].item())
    assert held_out["held_out_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert held_out["held_out_q1"] == pytest.approx(sum(first) / len(first), abs=1e-4)


def shake(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["sedd", "autoregressive"])
def test_the_draft_vocabulary_is_of_the_training_rows(
    kind: str, corpus: Corpus, target_folder: Path, tmp_path: Path
) -> None:
    """Exactly their tokens, and the read-out of a new network says how often each occurs."""
    training, _ = corpus.split(0.3)
    counts = Counter(token for row in training for token in corpus[row].tokens.tolist())
    words = sorted(counts)
    run = run_of(
        kind,
        corpus,
        target_folder,
        tmp_path,
        f"draft_vocab={len(words)}",
        "objective=denoise",
        "init=null",
    )
    network = run.trainer.task.network
    assert network.draft_vocab.tolist() == words
    if kind == "sedd":
        width = network.config.hidden_size
        shift = network.output_layer.adaLN_modulation.bias[:width].detach()
        probabilities = torch.softmax(network.head @ shift, -1).tolist()
        total = sum(counts.values())
        for word, chance in zip(words, probabilities, strict=True):
            assert chance == pytest.approx(counts[word] / total, abs=0.03)
        expected = initialize.unigram_shift(
            network.head, torch.tensor([counts[word] for word in words])
        )
        assert torch.allclose(shift, expected, atol=1e-5)


# ---- measuring ----


def test_it_is_measured_on_held_out_prompts(
    corpus: Corpus, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def listening(folder: str, **options: Any) -> dict[str, Any]:
        calls.append(options)
        return {}

    monkeypatch.setattr(evaluation, "of_folder", listening)
    trainer = run_of("sedd", corpus, target_folder, tmp_path, "objective=denoise").trainer
    assert trainer.evaluate is not None
    trainer.evaluate(tmp_path)
    rows = list(corpus.split(0.3)[1])
    count = min(3, len(rows))
    sample = [rows[i * len(rows) // count] for i in range(count)]
    assert calls[0]["prompts"] == [corpus[row].tokens[:3].tolist() for row in sample]
    assert calls[0]["max_tokens"] == 6


def test_held_out_prompts(tmp_path: Path) -> None:
    """A row's prompt; the first half of a row without prompt or answer; at most one per row."""
    with CorpusWriter(
        tmp_path, {"target": "tiny", "source": "test"}, vocab_size=tiny.VOCAB
    ) as writer:
        for key, prompt_length in enumerate([2, 0, 5, 1]):
            writer.add(Row(torch.arange(key, key + 5), prompt_length, 0.0, key))
    prompts = evaluation.held_out_prompts(Corpus(tmp_path), range(4), 9)
    assert prompts == [[0, 1], [1, 2], [2, 3], [3]]


def test_acceptance(
    model: PreTrainedModel, corpus: Corpus, target_folder: Path, tmp_path: Path
) -> None:
    """Rounds of the decode loop, counted one by one, greedy and sampled."""
    changes = [
        "objective=denoise",
        "draft_vocab=null",
        "init=target",
        "draft_len=3",
        "save_dtype=float32",
    ]
    run_of("autoregressive", corpus, target_folder, tmp_path, *changes).trainer.save()
    target = CausalTarget(tiny.copy_of(model), "tiny")
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    measured = evaluation.of_folder(str(tmp_path), target, prompts, max_tokens=40)
    drafter = catalog.drafter(str(tmp_path), target.info)
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=40, temperature=temperature)
        rounds = tokens = drafted = accepted = 0
        reached = [0] * 3
        passed = [0] * 3
        for i, prompt in enumerate(prompts):
            batch = Batch.of([prompt], [params], [row_seed(0, i)])
            for step in decode.decode(target, drafter, batch, draft_len=3, verifier=verify.token):
                emitted = int(step.emitted)
                if emitted == 0:
                    continue
                accepted_here = min(int(step.verification.accepted), emitted)
                size = step.draft.tokens.shape[1]
                rounds += 1
                tokens += emitted
                drafted += size
                accepted += accepted_here
                cut = emitted <= int(step.verification.accepted)  # the text ended inside the draft
                for k in range(size):
                    passed[k] += k < accepted_here
                    reached[k] += k < accepted_here or (k == accepted_here and not cut)
        assert 0 < accepted < drafted
        shares = [k / n for k, n in zip(passed, reached, strict=True)]
        assert measured[f"tau_at_{temperature:g}"] == pytest.approx(tokens / rounds, abs=1e-4)
        assert measured[f"alpha_at_{temperature:g}"] == pytest.approx(accepted / drafted, abs=1e-4)
        assert measured[f"per_position_at_{temperature:g}"] == pytest.approx(shares, abs=1e-4)


# ---- what a step changes ----


def test_the_learning_rate() -> None:
    """Four steps up to the peak, the first not at 0, then half a cosine to a tenth of it."""
    r = recipe.load("sedd", ["lr=2", "warmup=4", "steps=8", "final_lr=0.1"])
    rates = [learning_rate(r, step) for step in range(9)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx(
        [0.5, 1, 1.5, 2, 2, 0.2 + 0.9 * (1 + half), 1.1, 0.2 + 0.9 * (1 - half), 0.2]
    )


def test_the_moving_average() -> None:
    """Average and parameters step by step; early values decay faster."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(5.0)
    state = TrainingState(layer, torch.optim.SGD(layer.parameters()), 0.9)
    average = 5.0
    for step in range(1, 101):
        layer.weight.data.fill_(math.sin(step))
        state.advance(step)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * math.sin(step)
        assert state.average["weight"].item() == pytest.approx(average, abs=1e-5)
    assert layer.weight.item() == pytest.approx(math.sin(100))
    without = TrainingState(layer, torch.optim.SGD(layer.parameters()), None)
    without.advance(1)
    assert without.average == {}


def test_three_steps(corpus: Corpus, target_folder: Path, tmp_path: Path) -> None:
    """AdamW written out: mean gradient, clipped as one vector; only matrices decay."""
    changes = [
        "objective=denoise",
        "ema=0.9",
        "accumulation=2",
        "clip=0.5",
        "lr=0.01",
        "warmup=2",
        "steps=5",
        "weight_decay=0.1",
    ]
    trainer = run_of("sedd", corpus, target_folder, tmp_path, *changes).trainer
    shake(trainer.task.network)
    parameters = {name: p for name, p in trainer.task.named_parameters() if p.requires_grad}
    values = {name: p.detach().clone() for name, p in parameters.items()}
    average = {name: trainer.state.average[name].clone() for name in values}
    first = {name: torch.zeros_like(v) for name, v in values.items()}
    second = {name: torch.zeros_like(v) for name, v in values.items()}
    beta1, beta2 = trainer.recipe.betas
    rates = [0.005, 0.01, 0.01]
    tokens = 0
    for step in range(1, 4):
        batches = trainer._batches(step - 1)
        losses = []
        for batch in batches:
            loss, _ = trainer.task(batch, (step - 1) / 5)
            loss.backward()
            losses.append(loss.item())
            tokens += int(batch.lengths.sum())
        gradients = {name: p.grad / 2 for name, p in parameters.items() if p.grad is not None}
        norm = math.sqrt(math.fsum(g.square().sum().item() for g in gradients.values()))
        assert norm > 0.5  # clipping does something
        for p in parameters.values():
            p.grad = None
        record = trainer.one_step()
        for name, gradient in gradients.items():
            g = gradient * (0.5 / norm)
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            if values[name].dim() > 1:
                values[name] = values[name] * (1 - rates[step - 1] * 0.1)
            mean = first[name] / (1 - beta1**step)
            square = second[name] / (1 - beta2**step)
            values[name] = values[name] - rates[step - 1] * mean / (square.sqrt() + 1e-8)
            torch.testing.assert_close(
                parameters[name].detach(), values[name], rtol=1e-4, atol=1e-5
            )
        for name, value in values.items():
            decay = min(0.9, (1 + step) / (10 + step))
            average[name] = decay * average[name] + (1 - decay) * value
            torch.testing.assert_close(
                trainer.state.average[name], average[name], rtol=1e-4, atol=1e-5
            )
            exported = trainer.state.network()[name.removeprefix("network.")]
            torch.testing.assert_close(exported, average[name], rtol=1e-4, atol=1e-5)
        assert record["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert record["norm"] == pytest.approx(norm, rel=1e-4)
        assert (record["step"], record["lr"], record["tokens"]) == (step, rates[step - 1], tokens)


# ---- the corpus ----


class Numbered:
    """Five prompts of different lengths, by key; the target extends them before it answers."""

    longest = 16

    def __init__(self, opening: Opening | None) -> None:
        self.opening = opening
        self.about: dict[str, Any] = {"kind": "test"}
        self.texts = {key: tuple(range(key, 2 * key + 1)) for key in (0, 1, 4, 6, 9)}

    def prompts(self, keys: Container[int]) -> Iterator[SourcePrompt]:
        return (SourcePrompt(key, ids) for key, ids in self.texts.items() if key not in keys)


@pytest.mark.parametrize("opening", [None, Opening(3)])
def test_a_row_is_drawn_with_its_own_seed(
    opening: Opening | None, model: PreTrainedModel, tmp_path: Path
) -> None:
    """Each token is the first whose cumulative probability exceeds the uniform of its position."""
    settings = CorpusSettings(seed=5, max_tokens=10, temperatures=(0.7,), shares=(1.0,))
    lm = SpeculativeLM(CausalTarget(tiny.copy_of(model), "tiny"), "none", None, max_len=64)
    source = Numbered(opening)
    with CorpusWriter(
        tmp_path, {"target": "tiny", "source": "test"}, vocab_size=tiny.VOCAB
    ) as writer:
        ledger = Ledger(writer, [])
        for _ in generate.generate(lm, source, ledger, settings, tokens=10_000, rows=3):
            pass
        ledger.close()
    corpus = Corpus(tmp_path)
    rows = [corpus[i] for i in range(len(corpus))]
    assert sorted(row.key for row in rows) == sorted(source.texts)
    for row in rows:
        text = list(source.texts[row.key])
        answer = len(text) + (3 if opening else 0)
        assert (row.prompt_length, row.temperature) == (answer, pytest.approx(0.7))
        while len(text) < answer + 10:
            temperature = 1.0 if len(text) < answer else 0.7
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, -1].double()
            probabilities = (logits / temperature).softmax(-1).tolist()
            batch = Batch.of([text], [SamplingParams()], [row_seed(5, row.key)])
            uniform = Noise.of(batch).uniform(Purpose.TARGET, 1).item()
            token = 0
            while math.fsum(probabilities[: token + 1]) <= uniform:
                token += 1
            text.append(token)
        assert row.tokens.tolist() == text
