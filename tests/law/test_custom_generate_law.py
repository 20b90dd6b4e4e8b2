"""The law of sampled text inside transformers, against many texts.

It is enumerated with transformers' own processors on the model's logits.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import compare
from torch import Tensor
from transformers import PreTrainedModel

import specdiff
import tiny
from doubles import ToyDenoiser
from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.hf import processed_target
from specdiff.targets.causal import attached
from specdiff.types import PADDING

V, NEW, END, ROWS = 4, 4, 2, 20_000
PROMPT = (1, 3, 1)
SETTINGS: dict[str, dict[str, Any]] = {
    "counting": {"top_k": 0, "repetition_penalty": 2.5, "temperature": 1.4},
    "filtered": {
        "temperature": 1.5,
        "top_k": 3,
        "top_p": 0.9,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 2,
    },
    "constrained": {
        "top_k": 0,
        "min_p": 0.05,
        "prefix_allowed_tokens_fn": lambda _, ids: [
            t for t in range(V) if (t + int(ids.sum())) % 3
        ],
    },
    "uniform": {"top_k": 0, "temperature": math.inf},
    "own": {
        "top_k": 0,
        "logits_processor": [
            lambda ids, scores: scores.masked_fill(
                (ids.sum(1, keepdim=True) + torch.arange(V)) % 3 == 0, -torch.inf
            )
        ],
    },
}


@pytest.fixture(scope="module")
def net() -> PreTrainedModel:
    model = tiny.model("llama", vocab=V, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(
            1.5
        )  # some tokens likelier than others, and every text with a chance
    return model


def options(setting: str, rows: int) -> dict[str, Any]:
    ids = torch.tensor([PROMPT])
    common: dict[str, Any] = {
        "input_ids": ids,
        "max_new_tokens": NEW,
        "do_sample": True,
        "eos_token_id": END,
        "pad_token_id": 0,
    }
    return common | {"num_return_sequences": rows} | SETTINGS[setting]


def law(net: PreTrainedModel, setting: str) -> dict[tuple[int, ...], float]:
    """Every text up to its end, with its chance."""
    got: list[Any] = []

    def listening(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any
    ) -> Tensor:
        got.append(logits_processor)
        return input_ids

    net.generate(custom_generate=listening, **options(setting, 1))
    running = {(): 1.0}
    ended = {}
    for _ in range(NEW):
        ids = torch.tensor([[*PROMPT, *text] for text in running])
        grown = {}
        with torch.no_grad():
            chances = got[0](ids, net(ids).logits[:, -1].float()).double().softmax(-1).tolist()
        for (text, chance), row in zip(running.items(), chances, strict=True):
            for token, p in enumerate(row):
                if p > 0:
                    (ended if token == END else grown)[(*text, token)] = chance * p
        running = grown
    return ended | running


def texts(net: PreTrainedModel, setting: str, verifier: str, drafter: Drafter[Any]) -> Tensor:
    torch.manual_seed(0)
    stats = specdiff.Stats()
    drafting: dict[str, Any] = {
        "drafter": drafter,
        "verifier": verifier,
        "draft_len": 3,
        "stats": stats,
    }
    out = net.generate(
        custom_generate=specdiff.custom_generate, **drafting, **options(setting, ROWS)
    )[:, len(PROMPT) :]
    assert stats.accepted > ROWS / 10
    after = ((out == END).cumsum(1) - (out == END).long()) > 0
    return out.masked_fill(after, PADDING)


CASES = [
    ("counting", "token"),
    ("counting", "block"),
    ("counting", "match"),
    ("filtered", "token"),
    ("filtered", "block"),
    ("constrained", "match"),
    ("uniform", "token"),
    ("own", "token"),
    ("own", "block"),
]


@pytest.mark.parametrize(("setting", "verifier"), CASES)
def test_sampled_text_has_the_prepared_law(
    net: PreTrainedModel, setting: str, verifier: str
) -> None:
    """One G-test a case, each with a fixed seed: an honest one fails at chance 1e-3."""
    drafter = DenoisingDrafter(ToyDenoiser(V, seed=5), steps=2)
    assert compare(texts(net, setting, verifier, drafter), law(net, setting)) > 1e-3


def test_point_masses_and_transformers_own_sampling(net: PreTrainedModel) -> None:
    """The yardstick fits transformers itself, and a drafter without probabilities."""
    assert (
        compare(
            texts(net, "counting", "token", NGramDrafter(attached(net).info, longest=2)),
            law(net, "counting"),
        )
        > 1e-3
    )
    torch.manual_seed(1)
    out = net.generate(**options("counting", ROWS))[:, len(PROMPT) :]
    after = ((out == END).cumsum(1) - (out == END).long()) > 0
    assert compare(out.masked_fill(after, PADDING), law(net, "counting")) > 1e-3


def test_an_end_seen_too_early_is_caught(
    net: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BUG: the position of a drafted end itself is left unprocessed, not only those after it."""
    honest = processed_target._ended

    def early(batch: Any, draft: Any) -> Any:
        shorter, reach = honest(batch, draft)
        return shorter, (reach - 1).clamp(min=0)

    monkeypatch.setattr(processed_target, "_ended", early)
    drafter = DenoisingDrafter(ToyDenoiser(V, seed=5), steps=2)
    assert compare(texts(net, "counting", "token", drafter), law(net, "counting")) < 1e-6


def test_processors_that_miss_the_draft_are_caught(
    net: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BUG: every position is processed with the committed tokens alone."""
    honest = processed_target.padded_rows

    def blind(prompt: Tensor, batch: Any, pad: int, draft: Any = None) -> Tensor:
        return honest(
            prompt,
            batch,
            pad,
            None
            if draft is None
            else replace(draft, tokens=torch.full_like(draft.tokens, PROMPT[0])),
        )

    monkeypatch.setattr(processed_target, "padded_rows", blind)
    drafter = DenoisingDrafter(ToyDenoiser(V, seed=5), steps=2)
    for setting, verifier in (("counting", "token"), ("counting", "block"), ("filtered", "match")):
        assert compare(texts(net, setting, verifier, drafter), law(net, setting)) < 1e-6, verifier
