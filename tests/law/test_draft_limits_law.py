"""Requests with draft lengths of their own keep the target's law, next to requests without."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import DRAFTERS, TARGET, compare, law
from torch import Tensor

from specdiff import decode, engine
from specdiff.types import Draft, SamplingParams
from specdiff.verify import VERIFIERS

PARAMS = SamplingParams(max_tokens=5, stop_token_ids=(2,))
LIMITS = (None, 0, 1, 2)
PASSES = 1e-3 / (4 * 5 * len(VERIFIERS) + 2)
CAUGHT = 1e-6


def outputs(
    drafter: str, verifier: str, requests: list[engine.Request], rows: int
) -> Iterator[engine.RequestOutput]:
    return engine.run(
        TARGET,
        DRAFTERS[drafter],
        requests,
        verifier=VERIFIERS[verifier],
        draft_len=DRAFTERS[drafter].draft_len,
        rows=rows,
    )


def sample(drafter: str, verifier: str, count: int) -> dict[int | None, list[list[int]]]:
    """Texts by the request's limit; requests of all limits share the rows."""
    requests = [
        engine.Request([1], PARAMS, seed, draft_len=LIMITS[seed % len(LIMITS)])
        for seed in range(count)
    ]
    texts: dict[int, list[int]] = defaultdict(list)
    for output in outputs(drafter, verifier, requests, rows=256):
        limit = requests[output.request].draft_len
        assert limit is None or output.drafted <= limit
        texts[output.request] += output.tokens
    groups: dict[int | None, list[list[int]]] = defaultdict(list)
    for index, text in texts.items():
        groups[requests[index].draft_len].append(text)
    return groups


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("drafter", ["one-shot", "left-to-right", "autoregressive", "ngram", "any"])
def test_each_limit_keeps_the_law(drafter: str, verifier: str) -> None:
    for texts in sample(drafter, verifier, 4000).values():
        assert compare(texts, law(PARAMS)) > PASSES


def cut_at_a_token(draft: Draft, limits: Tensor | None) -> Draft:
    """Planted: the limit depends on a token of this round, which is then dropped."""
    if limits is None or draft.tokens.shape[1] == 0:
        return draft
    likely = (draft.tokens != 0).long().cumprod(1).sum(1)
    return replace(draft, size=torch.minimum(torch.minimum(draft.sizes, likely), limits + 1))


def overwritten(draft: Draft, limits: Tensor | None) -> Draft:
    """Planted: tokens after the limit are replaced, and their probabilities are not."""
    if limits is None or draft.tokens.shape[1] == 0:
        return draft
    index = torch.arange(draft.tokens.shape[1])
    return replace(draft, tokens=torch.where(index < limits[:, None], draft.tokens, 0))


@pytest.mark.parametrize("verifier", ["token", "block"])
@pytest.mark.parametrize("bug", [cut_at_a_token, overwritten])
def test_a_wrong_limit_is_caught(bug: Any, verifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(count: int) -> list[list[int]]:
        run = engine.run(
            TARGET,
            DRAFTERS["one-shot"],
            [engine.Request([1], PARAMS, seed, draft_len=seed % 2) for seed in range(count)],
            verifier=VERIFIERS[verifier],
            draft_len=3,
            rows=256,
        )
        texts: dict[int, list[int]] = defaultdict(list)
        for output in run:
            texts[output.request] += output.tokens
        return [text for index, text in texts.items() if index % 2 == 0]

    assert compare(texts(8000), law(PARAMS)) > PASSES
    monkeypatch.setattr(decode, "_limited", bug)
    assert compare(texts(8000), law(PARAMS)) < CAUGHT


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_limit_of_0_is_plain_decoding_in_any_batch(verifier: str) -> None:
    """The same tokens, next to rows that draft."""

    def texts(drafter: str, limits: tuple[int | None, ...]) -> list[list[int]]:
        requests = [
            engine.Request([1], PARAMS, seed, draft_len=limits[seed % len(limits)])
            for seed in range(64)
        ]
        texts: list[list[int]] = [[] for _ in requests]
        for output in outputs(drafter, verifier, requests, rows=8):
            texts[output.request] += output.tokens
        return texts

    plain = texts("none", (None,))
    assert texts("one-shot", (0,)) == plain
    assert texts("one-shot", (0, None))[::2] == plain[::2]
