"""A block drafter's training, worked out again one anchor at a time on a growing context."""

import torch
from transformers import PreTrainedModel

from specdiff.data.corpus import Corpus
from specdiff.nn.block import BlockNetwork
from specdiff.training import initialize_block, objectives, recipe
from specdiff.training.block_task import BlockTask
from specdiff.training.teacher import OnlineTeacher

SIZES = [
    "blocks=2",
    "heads=4",
    "draft_vocab=20",
    "taps=[0]",
    "markov_rank=5",
    "draft_lens=[4]",
    "draft_len=4",
    "canvas_tokens=24",
    "context_window=7",
    "intermediate_size=48",
]
ROWS = [3, 9, 20]


def shaken(network: BlockNetwork) -> None:
    """No parameter stays at its initial value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def block_task(corpus: Corpus, model: PreTrainedModel, *changes: str) -> BlockTask:
    r = recipe.load("block", [*SIZES, *changes])
    network = initialize_block.block(r, corpus, range(40), model)
    shaken(network)
    head = model.get_output_embeddings().weight.detach()
    teacher = OnlineTeacher(model, network.config.taps)
    return BlockTask(r, corpus, network, head, teacher, {}).eval()


def alone(
    network: BlockNetwork, model: PreTrainedModel, tokens: list[int], anchor: int, count: int
) -> torch.Tensor:
    """Logits [count, C] after `anchor`; the target reads nothing past the context."""
    past = torch.tensor([tokens[:anchor]])
    states = model.base_model(past, output_hidden_states=True).hidden_states
    features = torch.cat([states[tap + 1] for tap in network.config.taps], -1)
    context = network.context(features)
    start = max(0, anchor - network.config.window)
    slots = network.slots(torch.tensor([[tokens[anchor]]]), context[:, -1:], count)[:, 0]
    positions = torch.arange(start, anchor + count)[None]
    mask = torch.ones(1, 1, count, positions.shape[1], dtype=torch.bool)
    hidden = network(slots, context[:, start:], positions, mask)[0]
    logits = []
    for j in range(count):  # token by token, as it is drafted
        logits.append(network.logits(hidden[j]) + network.markov(torch.tensor(tokens[anchor + j])))
    return torch.stack(logits)


@torch.no_grad()
def test_logits_and_loss_are_those_of_decoding(corpus: Corpus, model: PreTrainedModel) -> None:
    task = block_task(corpus, model)
    network = task.network
    batch = task.prepare(ROWS, torch.Generator().manual_seed(1))
    G = batch.draft_len
    states = task.states(batch)
    head = model.get_output_embeddings().weight
    total = weights = 0.0
    compared = beyond = 0
    for b, row in enumerate(ROWS):
        tokens = corpus[row].tokens.tolist()
        for n, anchor in enumerate(batch.anchors[b].tolist()):
            count = min(G, len(tokens) - anchor - 1)
            beyond += count < G
            if count < 1:
                continue
            whole = tokens + [0] * G
            expected = alone(network, model, whole, anchor, G)[:count]
            previous = torch.tensor(tokens[anchor : anchor + count])
            actual = task.logits(states[b, n, :count], previous)
            assert (actual - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
            for j in range(count):
                past = torch.tensor([tokens[: anchor + j + 1]])
                log_p = model(past).logits[0, -1].log_softmax(-1)[network.draft_vocab]
                log_q = expected[j].log_softmax(-1)
                a = float(torch.minimum(log_p.exp(), log_q.exp()).sum())
                kl = float((log_p.exp() * (log_p - log_q)).sum())
                trust = float(torch.tensor(-3 * a).exp())
                weight = float(torch.tensor(-j / task.recipe.weight_scale).exp())
                total += weight * (trust * kl - 3 * (1 - trust) * float(torch.tensor(a).log()))
                weights += weight
                compared += 1
    loss, metrics = task(batch, 0.0)
    assert head is not None and compared > 40 and beyond
    assert abs(float(loss) - total / weights) < 2e-5 * abs(total / weights)
    assert {"q1", "q4", "expected_tau", "greedy_tau"} <= metrics.keys()


def test_the_closed_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float32, requires_grad=True)
    full = torch.randn(6, 12)
    teacher, log_z = full[:, :9], full.logsumexp(-1)
    loss, a = objectives.log_hybrid(logits, teacher, log_z, 2.0)
    (gradient,) = torch.autograd.grad((loss * torch.arange(6)).sum(), logits)
    log_q = logits.log_softmax(-1)
    log_p = teacher - log_z[:, None]
    overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    trust = torch.exp(-2.0 * overlap.detach())
    plain = trust * (log_p.exp() * (log_p - log_q)).sum(-1) - 3 * (1 - trust) * overlap.log()
    (expected,) = torch.autograd.grad((plain * torch.arange(6)).sum(), logits)
    assert torch.allclose(a, overlap, atol=1e-6)
    assert torch.allclose(loss, plain, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)
