"""Logprobs are the raw target's everywhere: in a draft, at a rejection, at the bonus token."""

from typing import Any

import pytest
import torch

import tiny
from specdiff import SpeculativeLM

ASKED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5},
    {"repetition_penalty": 1.5, "logit_bias": {3: 5.0}},
]


@pytest.mark.parametrize("verifier", ["token", "block", "match"])
@pytest.mark.parametrize("options", ASKED, ids=str)
@pytest.mark.parametrize("drafter", ["sedd", "hinted", "none"])
def test_they_are_the_log_softmax_of_the_raw_logits(
    drafter: str, options: dict[str, Any], verifier: str
) -> None:
    net, target, prompts = tiny.model("llama"), tiny.target("llama"), tiny.prompts(3)
    proposer: Any = {"sedd": tiny.drafter(target.info), "none": "none"}.get(drafter)
    proposer = proposer or tiny.Hinted([tiny.plain(net, prompts[0], 20)] * 3, tiny.VOCAB, 3)
    lm = SpeculativeLM(target, proposer, None, 128)
    outs = lm.generate(
        prompts, max_tokens=12, seed=3, draft_len=4, verifier=verifier, logprobs=3, **options
    )
    assert (
        outs[0].token_ids
        == lm.generate(prompts, max_tokens=12, seed=3, draft_len=4, verifier=verifier, **options)[
            0
        ].token_ids
    )
    for prompt, out in zip(prompts, outs, strict=True):
        with torch.no_grad():
            rows = (
                net(torch.tensor([[*prompt, *out.token_ids]]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
            )
        best = rows.topk(3)
        assert len(out.logprobs) == len(out.top_logprobs) == len(out.token_ids)
        for i, token in enumerate(out.token_ids):
            assert out.logprobs[i] == pytest.approx(float(rows[i, token]), abs=1e-4)
            assert [t for t, _ in out.top_logprobs[i]] == best.indices[i].tolist()
            assert [v for _, v in out.top_logprobs[i]] == pytest.approx(
                best.values[i].tolist(), abs=1e-4
            )


def test_each_request_is_told_what_it_asked_for() -> None:
    from specdiff import engine
    from specdiff.types import SamplingParams
    from specdiff.verify import token

    target = tiny.target("gpt2")
    counts = [None, 0, 2, 20]
    requests = [
        engine.Request([i + 1], SamplingParams(max_tokens=5, logprobs=n), i)
        for i, n in enumerate(counts)
    ]
    for p in engine.run(
        target, tiny.drafter(target.info), requests, verifier=token, draft_len=3, rows=2
    ):
        n = counts[p.request]
        assert len(p.logprobs) == len(p.top_logprobs) == (0 if n is None else len(p.tokens))
        assert all(len(top) == n for top in p.top_logprobs)


def test_nobody_is_told_what_nobody_asked() -> None:
    out = SpeculativeLM(tiny.target("gpt2"), "none", None, 64).generate([1], max_tokens=3)
    assert out.logprobs == [] and out.top_logprobs == []
