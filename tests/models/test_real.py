"""L3 and the text room on the real target, SmolLM2-135M-Instruct in fp32."""

from typing import Any

import pytest
import torch
from test_greedy import LENGTHS, flips
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from specdiff import SpeculativeLM, catalog
from specdiff.training.evaluation import acceptance
from specdiff.verify import VERIFIERS

pytestmark = pytest.mark.real
NEW = 16
QUESTIONS = (
    "Write a haiku about rain.", "What is 12 + 30?",
    "List three colours, and say why you like each.", "Explain why the sky is blue.",
    "Say hello.", "Name a river in Africa.",
    "Say 'good morning' in French.", "Give me one tip for sleeping well.",
)  # fmt: skip


@pytest.fixture(scope="module")
def untouched() -> PreTrainedModel:
    """The same weights in transformers' own hands."""
    return AutoModelForCausalLM.from_pretrained(
        catalog.model_folder("smollm2-135m"), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def texts(lm: SpeculativeLM, untouched: PreTrainedModel) -> list[list[int]]:
    """transformers' greedy answers, prompts included."""
    return [tiny.plain(untouched, lm.encode(q), NEW) for q in QUESTIONS]


@pytest.mark.parametrize("verifier", ["token", "block", "match"])
@pytest.mark.parametrize("draft_len", LENGTHS)
def test_greedy_text_is_the_targets_own(
    lm: SpeculativeLM,
    untouched: PreTrainedModel,
    texts: list[list[int]],
    draft_len: int,
    verifier: str,
) -> None:
    """Long accepted prefixes, and rejections in between."""
    first = texts[:3]
    batch = tiny.batch_of([t[:-NEW] for t in first], NEW, temperature=0.0)
    drafter = tiny.Hinted(first, lm.target.info.vocab_size, flaw=9)
    got = tiny.decoded(lm.target, drafter, batch, draft_len=draft_len, verifier=VERIFIERS[verifier])
    assert flips(untouched, got, first) <= 1


# Every draft length with every number of passes; each of both in a batch of one and of eight
# (forty by eight is slow).
IN_EIGHT = {(1, 2), (1, 4), (4, 1), (8, 2), (16, 4), (40, 1)}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("draft_len", LENGTHS)
def test_greedy_text_through_the_bundled_diffusion_drafter(
    lm: SpeculativeLM,
    untouched: PreTrainedModel,
    texts: list[list[int]],
    draft_len: int,
    steps: int,
) -> None:
    drafter = catalog.drafter("sedd", lm.target.info, {"steps": steps})
    new = 3 if draft_len == 40 else 6
    batch = texts if (draft_len, steps) in IN_EIGHT else texts[steps : steps + 1]
    prefixes = [t[: len(t) - NEW + new] for t in batch]
    got = tiny.decoded(
        lm.target,
        drafter,
        tiny.batch_of([t[:-new] for t in prefixes], new, temperature=0.0),
        draft_len=draft_len,
    )
    assert flips(untouched, got, prefixes) <= 1


@pytest.mark.parametrize("drafter", ["sedd", "autoregressive", "ngram"])
def test_matching_gives_the_text_of_plain_decoding_under_every_option(
    lm: SpeculativeLM, drafter: str
) -> None:
    """L4 of a real target: same seed, same tokens, with any drafter and batch, streamed or not."""
    options: dict[str, Any] = {
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "logit_bias": {198: 2.0},
        "temperature": 0.8,
    }
    options |= {"max_tokens": 6, "seed": 3, "verifier": "match", "ignore_eos": True}
    plain = SpeculativeLM(lm.target, "none", lm.tokenizer, lm.max_len)
    fast = SpeculativeLM(lm.target, drafter, lm.tokenizer, lm.max_len)
    expected = plain.generate(QUESTIONS[1], **options).token_ids
    assert fast.generate([QUESTIONS[1], QUESTIONS[2]], **options)[0].token_ids == expected
    *_, last = fast.stream(QUESTIONS[1], draft_len=7, **options)
    assert last.generation.token_ids == expected


# tokens a round over CHORES, temperature 0, 4 drafted tokens, 16 tokens each; after a drafter was
# trained or replaced, run the test below and copy the value from its failure
RECORDED = {"sedd": 1.3559, "autoregressive": 1.3793, "block": 1.7778}
CHORES = (
    "Count from 1 to 20.",
    "List the days of the week.",
    "Write a Python function that adds two numbers.",
    "Repeat: the cat sat on the mat, the cat sat on the mat.",
    "Give me three tips for learning a language.",
)


@pytest.mark.parametrize("drafter", RECORDED)
def test_the_bundled_drafters_are_as_good_as_they_were(lm: SpeculativeLM, drafter: str) -> None:
    """L6: nothing about loading, drafting or verifying may cost acceptance."""
    instance = catalog.drafter(drafter, lm.target.info)
    result = acceptance(
        lm.target,
        instance,
        [lm.encode(q) for q in CHORES],
        temperature=0.0,
        max_tokens=16,
        draft_len=4,
    )
    assert result["tau"] >= 0.95 * RECORDED[drafter], (
        f"{drafter}: tau {result['tau']}, recorded {RECORDED[drafter]}; all of it: {result}"
    )


def test_a_random_sedd_drafter_over_the_real_vocabulary(
    lm: SpeculativeLM, untouched: PreTrainedModel, texts: list[list[int]]
) -> None:
    info = lm.target.info
    borrowed: dict[str, Any] = {
        **tiny.CACHED,
        "hidden_size": info.hidden_size,
        "n_heads": 9,
        "n_blocks": 1,
        "draft_vocab_size": 4096,
    }
    drafter = tiny.drafter(info, steps=2, **borrowed)
    assert drafter.denoiser.model.vocab_embed.weight.data_ptr() == info.embedding.data_ptr()
    got = tiny.decoded(
        lm.target,
        drafter,
        tiny.batch_of([t[:-NEW] for t in texts[:1]], NEW // 2, temperature=0.0),
        draft_len=3,
    )
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
    assert lm.tokenizer.decode(ids).startswith(
        "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nSay hello.<|im_end|>"
    )


def test_streamed_emoji(lm: SpeculativeLM) -> None:
    prompt = "Repeat after me: 🦊 naïve 日本 🦊 naïve 日本 🦊 naïve 日本 🦊"
    whole = lm.generate(prompt, raw=True, max_tokens=12, temperature=0)
    pieces = [p.text for p in lm.stream(prompt, raw=True, max_tokens=12, temperature=0)]
    assert "".join(pieces) == whole.text
    assert not any("\ufffd" in p for p in pieces[:-1])


def test_sampling_with_a_seed(lm: SpeculativeLM) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "seed": 3, "temperature": 0.9, "top_p": 0.95}
    once, both = (
        lm.generate(QUESTIONS[1], **options),
        lm.generate([QUESTIONS[1], QUESTIONS[2]], **options),
    )
    assert once.token_ids == both[0].token_ids
    assert once.token_ids != lm.generate(QUESTIONS[1], **options | {"seed": 4}).token_ids
