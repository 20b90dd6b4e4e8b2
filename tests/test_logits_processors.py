"""Penalties, bias and allowed ids at every position of a draft.

Against slow references and transformers' processors.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

import reference
from doubles import ToyDenoiser
from specdiff import decode
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.logits_processors import process_logits
from specdiff.nn.small_lm import SmallLM
from specdiff.noise import Noise
from specdiff.sampling import distribution, probabilities
from specdiff.targets.table import TableTarget
from specdiff.tree import above
from specdiff.types import Batch, Context, Draft, SamplingParams

V = 11
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.8},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1.5, "presence_penalty": 1.0, "repetition_penalty": 2.0},
    {"logit_bias": ((0, -100.0), (3, 2.5), (10, -0.5))},
    {"logit_bias": ((4, 100.0),), "repetition_penalty": 1.5},
    {"allowed_token_ids": (0, 2, 10)},
    {"allowed_token_ids": (5,), "presence_penalty": 1.0},
    {
        "allowed_token_ids": (1, 2, 3, 4),
        "logit_bias": ((2, 1.0), (9, 50.0)),
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
    },
]
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.8,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.9,
}
PROMPTS = [[1], [2, 2, 5], [7, 0, 7, 7, 3, 9]]


def running(options: list[dict[str, Any]], generated: int = 6, seed: int = 0) -> Batch:
    """A batch in mid-flight: answers of different lengths, with scratch after them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [SamplingParams(max_tokens=generated + 4, **row) for row in options]
    batch = Batch.of([PROMPTS[i % 3] for i in range(len(rows))], rows, range(len(rows)))
    answer = torch.randint(V, batch.ids.shape, generator=generator)
    generated_slots = torch.arange(batch.ids.shape[1]) >= batch.prompt_length[:, None]
    length = batch.prompt_length + torch.arange(len(rows)) % (generated + 1)
    return replace(batch, ids=torch.where(generated_slots, answer, batch.ids), length=length)


def texts(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    ids = batch.ids[row, : batch.length[row]].tolist()
    n = int(batch.prompt_length[row])
    return ids[:n], ids[n:]


def soft(logits: list[float]) -> Tensor:
    return torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)


def some_draft(rows: int, K: int, seed: int = 1) -> tuple[Draft, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, K + 1, V, generator=generator, dtype=torch.float64)
    return Draft(
        torch.randint(4, (rows, K), generator=generator)
    ), logits  # few tokens, so that they repeat


@pytest.mark.parametrize("K", [0, 1, 5])
def test_row_k_counts_the_first_k_draft_tokens(K: int) -> None:
    batch = running(OPTIONS)
    draft, logits = some_draft(len(OPTIONS), K)
    result = process_logits(logits, batch, draft)
    for row, options in enumerate(OPTIONS):
        prompt, answer = texts(batch, row)
        for k in range(K + 1):
            own = draft.tokens[row, :k].tolist()
            expected = reference.adjusted(
                logits[row, k].tolist(), prompt, [*answer, *own], SamplingParams(**options)
            )
            assert result[row, k].tolist() == pytest.approx(expected, abs=1e-6), (options, k)


def test_a_drafters_rows_count_all_it_has_drawn() -> None:
    batch = running(OPTIONS)
    draft, logits = some_draft(len(OPTIONS), 3)
    result = process_logits(logits, batch, draft.tokens)
    for row, options in enumerate(OPTIONS):
        prompt, answer = texts(batch, row)
        for k in range(4):
            text = [*answer, *draft.tokens[row].tolist()]
            assert result[row, k].tolist() == pytest.approx(
                reference.adjusted(
                    logits[row, k].tolist(), prompt, text, SamplingParams(**options)
                ),
                abs=1e-6,
            )


def test_a_tree_counts_ancestors() -> None:
    """Two branches: 0 -> 1 -> 3 and 0 -> 2 -> 4; a third root 5."""
    parents = torch.tensor([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, 2, 3, 4]])
    draft = Draft(
        torch.randint(4, (2, 6), generator=torch.Generator().manual_seed(2)), parents=parents
    )
    lineage = [
        [[], [0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [5]],
        [list(range(k)) for k in range(7)],
    ]
    ancestors = above(draft)
    for row in range(2):
        assert [mask.nonzero()[:, 0].tolist() for mask in ancestors[row]] == lineage[row]
    assert torch.equal(ancestors[1], above(replace(draft, parents=None))[0])
    options = {"repetition_penalty": 1.7, "frequency_penalty": 0.4}
    batch = running([options] * 2)
    logits = torch.randn(2, 7, V, dtype=torch.float64)
    result = process_logits(logits, batch, draft)
    for row in range(2):
        prompt, answer = texts(batch, row)
        for n in range(7):
            text = [*answer, *draft.tokens[row, lineage[row][n]].tolist()]
            expected = reference.adjusted(
                logits[row, n].tolist(), prompt, text, SamplingParams(**options)
            )
            assert result[row, n].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_is_transformers(penalty: float) -> None:
    batch = running([{"repetition_penalty": penalty}] * 6)
    draft, logits = some_draft(6, 4)
    result = process_logits(logits, batch, draft)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for row in range(6):
        for k in range(5):
            ids = torch.cat([batch.ids[row, : batch.length[row]], draft.tokens[row, :k]])[None]
            assert torch.allclose(
                result[row, k], processor(ids, logits[row, k][None])[0], atol=1e-6
            )


def test_bias_and_repetition_are_transformers_in_its_order() -> None:
    bias = ((3, 2.5), (0, -4.0), (7, 9.0))
    batch = running([{"logit_bias": bias, "repetition_penalty": 1.4}] * 4)
    draft, logits = some_draft(4, 2)
    result = process_logits(logits, batch, draft)
    processors = [
        SequenceBiasLogitsProcessor([[[i], v] for i, v in bias]),
        RepetitionPenaltyLogitsProcessor(1.4),
    ]
    for row in range(4):
        for k in range(3):
            ids = torch.cat([batch.ids[row, : batch.length[row]], draft.tokens[row, :k]])[None]
            scores = logits[row, k][None]
            for processor in processors:
                scores = processor(ids, scores)
            assert torch.allclose(result[row, k], scores[0], atol=1e-6)


def test_unused_options_cost_nothing() -> None:
    batch = running([{}, {"temperature": 0.5}])
    draft, logits = some_draft(2, 3)
    assert process_logits(logits, batch, draft) is logits
    assert batch.params.active == {"temperature"} and batch.params.logprobs is None
    assert torch.equal(distribution(logits, batch, draft), probabilities(logits, batch.params))


def test_a_row_does_not_feel_its_neighbours_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = running(OPTIONS)
    logits = torch.randn(len(OPTIONS), 4, V, generator=generator)
    draft = some_draft(len(OPTIONS), 3)[0]
    result = process_logits(logits, batch, draft)
    assert torch.equal(result[0], logits[0])  # asks for nothing
    for row in range(len(OPTIONS)):
        at = slice(row, row + 1)
        alone = Batch.of([[0]], [SamplingParams(max_tokens=4, **OPTIONS[row])], [0])
        alone = replace(
            alone, ids=batch.ids[at], length=batch.length[at], prompt_length=batch.prompt_length[at]
        )
        assert torch.equal(process_logits(logits[at], alone, Draft(draft.tokens[at])), result[at])


def test_the_logits_handed_in_stay_as_they_were() -> None:
    batch = running(OPTIONS)
    draft, logits = some_draft(len(OPTIONS), 3)
    before = logits.clone()
    distribution(logits, batch, draft)
    assert torch.equal(logits, before)


def test_rows_that_join_bring_their_own_lists() -> None:
    wide = {"logit_bias": ((1, 1.0), (2, -1.0), (3, 5.0)), "allowed_token_ids": (1, 2, 3, 4, 5)}
    batch = Batch.of([[1]] * 3, [SamplingParams(max_tokens=5)] * 3, [0] * 3)
    for row, options in [
        (1, wide),
        (2, {"logprobs": 4}),
        (0, {"presence_penalty": 1.0}),
        (2, {"logit_bias": ((0, 3.0),), "logprobs": 2}),
    ]:
        batch = batch.with_rows(
            torch.tensor([row]), Batch.of([[1]], [SamplingParams(max_tokens=5, **options)], [0])
        )
    rows = [{"presence_penalty": 1.0}, wide, {"logit_bias": ((0, 3.0),)}]
    logits = torch.randn(3, 1, V, dtype=torch.float64)
    result = process_logits(
        logits,
        replace(batch, ids=torch.ones_like(batch.ids), length=batch.length + 1),
        Draft.empty(batch),
    )
    for row, options in enumerate(rows):
        expected = reference.adjusted(logits[row, 0].tolist(), [1], [1], SamplingParams(**options))
        assert result[row, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.params.logprobs == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_in_float32(dtype: torch.dtype) -> None:
    batch = running(OPTIONS)
    draft, logits = some_draft(len(OPTIONS), 3)
    result = process_logits(logits.to(dtype), batch, draft)
    assert result.dtype == torch.float32 and torch.equal(
        result, process_logits(logits.to(dtype).float(), batch, draft)
    )


@pytest.mark.parametrize("penalty", [1e-300, 1e-39, 1e39, 1e300])
def test_absurd_repetition_penalties_stay_finite(penalty: float) -> None:
    batch = running([{"repetition_penalty": penalty, "temperature": 0.01}] * 3)
    result = distribution(50 * torch.randn(3, 1, V), batch, Draft.empty(batch))
    assert bool(result.isfinite().all()) and result.sum(-1)[:, 0].tolist() == pytest.approx(
        [1.0] * 3
    )


def test_allowed_ids_that_a_drafter_cannot_say() -> None:
    """A draft vocabulary that holds none of them: any distribution is valid, NaN is not."""
    batch = running([{"allowed_token_ids": (2, 4)}, {"allowed_token_ids": (3,)}, {}])
    logits = torch.zeros(3, 2, V).index_fill(2, torch.tensor([2, 4]), -torch.inf)
    result = distribution(logits, batch, batch.ids[:, :0])
    assert result[0].tolist() == [[0, 0, 0.5, 0, 0.5, 0, 0, 0, 0, 0, 0]] * 2
    assert result[1].tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]] * 2
    assert torch.equal(result[2], torch.softmax(logits[2], -1))


# ---- q is what was drawn from, its own tokens counted ----


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_denoising_draft_counts_earlier_groups(steps: int) -> None:
    toy = ToyDenoiser(V, seed=1)
    params = SamplingParams(max_tokens=8, **PENALTIES)
    batch = Batch.of([[1, 2, 3]] * 8, [params] * 8, range(8))
    context = Context(batch, None, torch.zeros(8, dtype=torch.long), None)
    draft = DenoisingDrafter(toy, steps=steps).propose(context, None, Noise.of(batch), 4)
    assert draft.probs is not None
    for row in range(8):
        for k in range(4):
            first = k - k % (4 // steps)
            canvas = torch.where(torch.arange(4) < first, draft.tokens[row], toy.mask_id)[None]
            one = Context(
                replace(batch, ids=batch.ids[:1], length=batch.length[:1]),
                None,
                torch.zeros(1),
                None,
            )
            logits = toy.denoise(one, None, canvas, torch.arange(4)[None] < first)[0, k].tolist()
            own = draft.tokens[row, :first].tolist()
            assert torch.allclose(
                draft.probs[row, k],
                soft(reference.adjusted(logits, [1, 2, 3], own, params)),
                atol=1e-6,
            )


def test_an_autoregressive_draft_counts_all_before() -> None:
    torch.manual_seed(2)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    network = SmallLM(LlamaConfig(vocab_size=V, bos_token_id=None, eos_token_id=None, **sizes))
    for parameter in network.parameters():
        parameter.requires_grad_(False).normal_()
    target = TableTarget.random(V)
    drafter = AutoregressiveDrafter(network.double(), target.info)
    params = SamplingParams(max_tokens=8, **PENALTIES)
    batch = Batch.of([[1, 2, 3]] * 4, [params] * 4, range(4))
    run = decode.start(target, drafter, batch)
    decode.admit(run, torch.arange(4))
    with torch.inference_mode():
        draft = run.drafter.propose(run.context, run.state, Noise.of(batch), 4)
        assert draft.probs is not None
        for row in range(4):
            for k in range(4):
                own = draft.tokens[row, :k].tolist()
                logits = network.net(torch.tensor([[1, 2, 3, *own]])).logits[0, -1].tolist()
                assert torch.allclose(
                    draft.probs[row, k],
                    soft(reference.adjusted(logits, [1, 2, 3], own, params)),
                    atol=1e-6,
                )
