"""L1 for sampling options: one round enumerated.

The target's rows come from the real code, its law from a slow reference.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import Cases, emitted_law, worst

import reference
from specdiff import verify
from specdiff.sampling import distribution
from specdiff.types import Batch, Draft, SamplingParams

V, K = 3, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.3},
    "filters": {"temperature": 1.4, "top_k": 2, "top_p": 0.9, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.9},
    "presence": {"presence_penalty": 1.6},
    "frequency": {"frequency_penalty": -1.2},
    "bias": {"logit_bias": ((0, 1.5), (2, -2.0))},
    "allowed": {"allowed_token_ids": (0, 2)},
    "all": {
        "temperature": 0.7, "repetition_penalty": 0.6, "presence_penalty": 0.5,
        "frequency_penalty": 0.9, "logit_bias": ((1, 3.0),), "allowed_token_ids": (1, 2),
        "top_p": 0.9,
    },
}  # fmt: skip
PROMPT = [1, 1]
ANSWER = [1, 0]  # nowhere a 2: whether it occurs is for the draft to say


def logits_after(table: torch.Tensor, draft: tuple[int, ...]) -> torch.Tensor:
    """A target that reads its last two tokens, several of it at once: [C, V]."""
    before, last = [*ANSWER, *draft][-2:]
    return table[:, before, last]


def exact(options: dict[str, Any], count: int = 40, seed: int = 0) -> tuple[Cases, torch.Tensor]:
    """Cases whose p is the reference's, random left-to-right q; and the tables of p."""
    cases = Cases.random("left-to-right", V, K, count, seed=seed)
    table = 2 * torch.randn(
        count, V, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    params = SamplingParams(**options)
    p = []
    for k in range(K + 1):
        rows = []
        for index in range(V**k):
            draft = tuple(index // V ** (k - 1 - i) % V for i in range(k))
            laws = [
                reference.law(row, PROMPT, [*ANSWER, *draft], params)
                for row in logits_after(table, draft).tolist()
            ]
            rows.append(torch.tensor(laws, dtype=torch.float64))
        p.append(torch.stack(rows, dim=1))
    return replace(cases, p=p), table


def scored(
    options: dict[str, Any], draft: Draft, table: torch.Tensor
) -> tuple[torch.Tensor, Batch]:
    """The target's logits at every position of every draft, and the batch they are scored for."""
    rows = len(draft.tokens)
    repeated = table.repeat_interleave(rows // len(table), dim=0)
    ids = torch.cat([torch.tensor([[*ANSWER]]).expand(rows, -1), draft.tokens], dim=1)
    logits = torch.stack(
        [repeated[torch.arange(rows), ids[:, k], ids[:, k + 1]] for k in range(K + 1)], dim=1
    )
    batch = Batch.of(
        [[*PROMPT, *ANSWER]] * rows, [SamplingParams(max_tokens=9, **options)] * rows, range(rows)
    )
    return logits, replace(batch, prompt_length=batch.prompt_length - len(ANSWER))


@pytest.mark.parametrize("name", ["token", "block", "match"])
@pytest.mark.parametrize("option", OPTIONS)
def test_emits_exactly_the_law_the_options_define(option: str, name: str) -> None:
    cases, table = exact(rounded(OPTIONS[option]))
    draft = cases.rows()[0]
    logits, batch = scored(rounded(OPTIONS[option]), draft, table)
    plan = verify.PLANS[name](draft, distribution(logits, batch, draft))
    assert worst(emitted_law(cases, plan, longest=name == "block")[0], cases) <= 1e-12


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_moves_the_law(option: str) -> None:
    """So the test above says something of each."""
    assert (
        max(
            float((one - two).abs().max())
            for one, two in zip(exact(rounded(OPTIONS[option]))[0].p, exact({})[0].p, strict=True)
        )
        > 0.1
    )


@pytest.mark.parametrize("name", ["token", "block", "match"])
@pytest.mark.parametrize("option", ["repetition", "presence", "frequency", "all"])
@pytest.mark.parametrize("bug", ["committed only", "one row late", "the whole draft"])
def test_counting_the_wrong_tokens_breaks_the_law(bug: str, option: str, name: str) -> None:
    cases, table = exact(rounded(OPTIONS[option]))
    draft = cases.rows()[0]
    logits, batch = scored(rounded(OPTIONS[option]), draft, table)
    if bug == "one row late":
        late = Draft(torch.nn.functional.pad(draft.tokens, (1, 0)))
        late = replace(
            late, parents=torch.tensor([[-1, -1, 1, 2]]).expand(len(draft.tokens), -1)
        )  # row k + 1 of it counts k - 1
        p = distribution(torch.nn.functional.pad(logits, (0, 0, 1, 0)), batch, late)[:, :-1]
    else:
        p = distribution(
            logits, batch, draft.tokens[:, :0] if bug == "committed only" else draft.tokens
        )
    assert (
        worst(emitted_law(cases, verify.PLANS[name](draft, p), longest=name == "block")[0], cases)
        > 1e-3
    )


def rounded(options: dict[str, Any]) -> dict[str, Any]:
    """The options as float32 holds them, so that only the law itself can differ."""
    held = {
        name: float(torch.tensor(value))
        for name, value in options.items()
        if isinstance(value, float)
    }
    return options | held
