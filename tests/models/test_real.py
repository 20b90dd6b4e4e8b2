"""L3 and the text room on the real target, SmolLM2-135M-Instruct in fp32."""

from typing import Any

import pytest
import torch
from test_greedy import flips
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from specdiff import SpeculativeLM, catalog
from specdiff.drafters.base import Drafter
from specdiff.verify import VERIFIERS

pytestmark = pytest.mark.real
NEW = 16
QUESTIONS = ("Write a haiku about rain.", "What is 12 + 30?", "List three colours, and say why you like each.")


@pytest.fixture(scope="module")
def untouched() -> PreTrainedModel:
    """The same weights in transformers' own hands."""
    return AutoModelForCausalLM.from_pretrained(catalog.model_folder("smollm2-135m"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(lm: SpeculativeLM, untouched: PreTrainedModel) -> list[list[int]]:
    """transformers' greedy answers, prompts included."""
    return [tiny.plain(untouched, lm.encode(q), NEW) for q in QUESTIONS]


@pytest.mark.parametrize("verifier", ["token", "block", "match"])
@pytest.mark.parametrize("draft_len", [1, 4, 8, 16])
def test_greedy_text_is_the_targets_own(
    lm: SpeculativeLM, untouched: PreTrainedModel, texts: list[list[int]], draft_len: int, verifier: str
) -> None:
    parted = 0
    for rows in (1, 3):
        chosen = texts[draft_len % 3 : draft_len % 3 + 1] if rows == 1 else texts
        batch = tiny.batch_of([t[:-NEW] for t in chosen], NEW, temperature=0.0)
        drafter: Drafter[Any] = tiny.Hinted(chosen, lm.target.info.vocab_size, flaw=9)
        if draft_len == 4 and lm.drafter.draft_len:
            drafter = lm.drafter
        got = tiny.decoded(lm.target, drafter, batch, draft_len=draft_len, verifier=VERIFIERS[verifier])
        parted += flips(untouched, got, chosen)
    assert parted <= 1


def test_a_random_sedd_drafter_over_the_real_vocabulary(lm: SpeculativeLM, untouched: PreTrainedModel, texts: list[list[int]]) -> None:
    info = lm.target.info
    borrowed: dict[str, Any] = {**tiny.CACHED, "hidden_size": info.hidden_size, "n_heads": 9, "n_blocks": 1, "draft_vocab_size": 4096}
    drafter = tiny.drafter(info, steps=2, **borrowed)
    assert drafter.denoiser.model.vocab_embed.weight.data_ptr() == info.embedding.data_ptr()
    got = tiny.decoded(lm.target, drafter, tiny.batch_of([t[:-NEW] for t in texts[:1]], NEW // 2, temperature=0.0), draft_len=3)
    assert flips(untouched, got, [texts[0][: -NEW // 2]]) <= 1


def test_a_question_is_answered(lm: SpeculativeLM, texts: list[list[int]]) -> None:
    out = lm.generate(QUESTIONS[0], temperature=0, max_tokens=NEW, ignore_eos=True, seed=0)
    assert out.token_ids == texts[0][-NEW:]
    assert out.text == lm.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    assert len(out.text.split()) > 3
    assert out.finish_reason == "length"


def test_the_chat_template_and_its_end(lm: SpeculativeLM) -> None:
    """A conversation ends where the model says so, and the mark of the end is no text."""
    out = lm.chat([{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=40)
    assert out.finish_reason == "stop"
    assert out.token_ids[-1] in lm.end_ids
    assert "<|im_end|>" not in out.text
    assert out.text == lm.generate("Say hello.", temperature=0, max_tokens=40).text
    ids = lm.encode("Say hello.", system="You are terse.")
    assert lm.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nSay hello.<|im_end|>")


def test_streamed_emoji(lm: SpeculativeLM) -> None:
    prompt = "Repeat after me: 🦊 naïve 日本 🦊 naïve 日本 🦊 naïve 日本 🦊"
    whole = lm.generate(prompt, raw=True, max_tokens=12, temperature=0)
    pieces = [p.text for p in lm.stream(prompt, raw=True, max_tokens=12, temperature=0)]
    assert "".join(pieces) == whole.text
    assert not any("\ufffd" in p for p in pieces[:-1])


def test_sampling_with_a_seed(lm: SpeculativeLM) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "seed": 3, "temperature": 0.9, "top_p": 0.95}
    once, both = lm.generate(QUESTIONS[1], **options), lm.generate([QUESTIONS[1], QUESTIONS[2]], **options)
    assert once.token_ids == both[0].token_ids
    assert once.token_ids != lm.generate(QUESTIONS[1], **options | {"seed": 4}).token_ids
