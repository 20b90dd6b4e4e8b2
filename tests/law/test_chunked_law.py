"""Prompts read in chunks between the rounds of others give the tokens of whole prompts."""

from typing import Any

import pytest

import tiny
from specdiff import catalog, engine
from specdiff.types import SamplingParams
from specdiff.verify import token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chunked_prompt_is_the_whole_prompt(temperature: float) -> None:
    target = tiny.target("llama")
    drafter = catalog.drafter("ngram", target.info, {})
    prompts = [*tiny.prompts(3), [*range(40), *range(40)], [5, 6, 7] * 20, *tiny.prompts(3, seed=3)]
    params = SamplingParams(max_tokens=16, temperature=temperature)
    requests = [engine.Request(prompt, params, i) for i, prompt in enumerate(prompts)]

    def texts(**options: Any) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in requests]
        for step in engine.serve(target, drafter, requests, verifier=token, draft_len=3, **options):
            for output in step.outputs():
                out[output.request] += output.tokens
        return out

    alone = texts(rows=1)
    for rows in (1, 3, 8):
        for chunk in (1, 7, 512):
            assert texts(rows=rows, chunk=chunk) == alone
