"""Drafts over a draft vocabulary: options act by id, guards see the columns, empty rows sit out."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.guarded import FAULTS, faults
from specdiff.logits_processors import process_logits
from specdiff.noise import Noise, Purpose
from specdiff.sampling import distribution, draw
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, SamplingParams, column_index
from specdiff.verify import VERIFIERS

V = 12
COLUMNS = torch.tensor([1, 4, 5, 7, 10])
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"logit_bias": {4: 3.0, 6: 9.0, 10: -2.0}},
    "penalties": {"repetition_penalty": 1.8, "presence_penalty": 1.5, "frequency_penalty": -1.2},
    "allowed": {"allowed_token_ids": [0, 4, 10]},
    "filters": {"temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.05},
    "all": {
        "logit_bias": {4: 3.0, 6: 9.0},
        "repetition_penalty": 1.8,
        "frequency_penalty": 0.7,
        "allowed_token_ids": [0, 4, 5, 10, 11],
        "temperature": 1.3,
        "top_k": 2,
    },
}


def some(options: dict[str, Any]) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """A batch of plain rows and rows with the options, logits of the columns, drawn tokens."""
    generator = torch.Generator().manual_seed(2)
    params = [SamplingParams(**options), SamplingParams()] * 3
    prompts = [torch.randint(V, (9,), generator=generator).tolist() for _ in params]
    logits = torch.randn(6, 3, len(COLUMNS), generator=generator)
    return Batch.of(prompts, params, range(6)), logits, COLUMNS[torch.tensor([[1, 1], [4, 0]] * 3)]


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_act_as_they_do_on_all_ids(name: str) -> None:
    batch, logits, drawn = some(OPTIONS[name])
    full = torch.full((6, 3, V), -torch.inf).index_copy(-1, COLUMNS, logits)
    for tokens in (drawn, drawn[:, :0], Draft(drawn)):
        over = logits if isinstance(tokens, torch.Tensor) else logits[:, :3]
        expected = process_logits(full, batch, tokens)[..., COLUMNS]
        torch.testing.assert_close(process_logits(over, batch, tokens, COLUMNS), expected)
        p = distribution(full, batch, tokens)
        assert (p.sum(-1) - p[..., COLUMNS].sum(-1)).abs().max() < 1e-6
        torch.testing.assert_close(distribution(over, batch, tokens, COLUMNS), p[..., COLUMNS])


def test_the_place_of_an_id() -> None:
    ids = torch.tensor([[0, 1, 4, 6], [10, 11, 7, 5]])
    assert column_index(ids, COLUMNS).tolist() == [[5, 0, 1, 5], [4, 5, 3, 2]]


class Subset(Drafter[None]):
    """Draws from random distributions over the columns."""

    draft_len = 3

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        q = torch.randn(len(COLUMNS), generator=torch.Generator().manual_seed(1)).softmax(-1)
        q = q.expand(*uniform.shape, -1)
        return Draft(COLUMNS[draw(q, uniform)], q, columns=COLUMNS)


class Wrong(Subset):
    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return replace(super().propose(context, state, noise, draft_len), **self.changes)


def run(drafter: Drafter[Any], verifier: str = "token") -> list[Any]:
    target = TableTarget.random(V, seed=1)
    batch = Batch.of([[1, 2], [3]], [SamplingParams(max_tokens=60)] * 2, [1, 2])
    return list(decode.decode(target, drafter, batch, verifier=VERIFIERS[verifier]))


@pytest.mark.parametrize("verifier", list(VERIFIERS))
def test_a_draft_of_columns_is_decoded(verifier: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounds = run(Subset(), verifier)
    assert sum(int(r.verification.accepted.sum()) for r in rounds) > 0


BAD = {
    "unsorted": (COLUMNS.flip(0), FAULTS[5]),
    "twice": (torch.tensor([1, 4, 4, 7, 10]), FAULTS[5]),
    "negative": (torch.tensor([-1, 4, 5, 7, 10]), FAULTS[5]),
    "beyond": (torch.tensor([1, 4, 5, 7, V]), FAULTS[5]),
    "other ids": (torch.tensor([0, 2, 3, 6, 9]), FAULTS[4]),
    "int32": (COLUMNS.int(), "columns of shape"),
    "a matrix": (COLUMNS[None], "columns of shape"),
    "none": (COLUMNS[:0], "columns of shape"),
    "too few": (COLUMNS[:4], "probabilities of shape"),
    "meta": (COLUMNS.to("meta"), "columns on meta"),
}


@pytest.mark.parametrize("case", list(BAD))
@pytest.mark.parametrize("verifier", list(VERIFIERS))
def test_bad_columns_disable_drafting_and_keep_the_plain_text(case: str, verifier: str) -> None:
    columns, message = BAD[case]
    with pytest.warns(RuntimeWarning) as warned:
        rounds = run(Wrong(columns=columns), verifier)
    assert message in str(warned[0].message)
    assert bool(rounds[-1].disabled.all())
    assert all(int(r.verification.accepted.sum()) == 0 for r in rounds)


def test_columns_without_probabilities_are_refused() -> None:
    with pytest.warns(RuntimeWarning, match="columns without probabilities"):
        run(Wrong(probs=None))


def test_a_token_outside_the_columns_is_found_where_it_stands() -> None:
    q = torch.full((1, 3, len(COLUMNS)), 1 / len(COLUMNS))
    draft = Draft(torch.tensor([[4, 6, 7]]), q, columns=COLUMNS)
    assert faults(draft, V).tolist() == [[0, 4, 0]]
    q = draft.token_probs()
    assert q is not None and torch.equal(q > 0, torch.tensor([[True, False, True]]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", list(VERIFIERS))
def test_a_row_whose_allowed_ids_leave_no_column_drafts_nothing(
    verifier: str, temperature: float
) -> None:
    target = tiny.target("llama")
    drafter = tiny.drafter(target.info, **tiny.CACHED)
    assert isinstance(drafter, DenoisingDrafter) and drafter.denoiser.columns is not None
    columns = drafter.denoiser.columns.tolist()
    outside = [i for i in range(tiny.VOCAB) if i not in columns]
    allowed = [outside, [*outside[:3], columns[2]], None]
    params = [
        SamplingParams(max_tokens=12, temperature=temperature, allowed_token_ids=ids)
        for ids in allowed
    ]
    batch = Batch.of([[1, 2], [3], [4]], params, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounds = list(decode.decode(target, drafter, batch, verifier=VERIFIERS[verifier]))
    for last in rounds:
        assert last.draft.sizes.tolist() == [0, 8, 8]
        assert not bool(last.disabled.any())
    for text, ids in zip(tiny.rows_of(rounds[-1].batch), allowed[:2], strict=False):
        assert set(text[-12:]) <= set(ids or [])
