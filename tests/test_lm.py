"""SpeculativeLM: shapes, seeds, exact ends, streaming, chat; tiny random weights and tokenizer."""

import pickle
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import tiny
from specdiff import SpeculativeLM, decode
from specdiff.errors import DrafterError, UsageError
from specdiff.noise import row_seed
from specdiff.targets.base import Target
from specdiff.targets.causal import CausalTarget
from specdiff.text.generation import Chunk
from specdiff.text.options import ChatOptions, GenerateOptions, Options
from specdiff.types import Batch, Draft, SamplingParams, TargetInfo, TargetOutput

CORPUS = "the rain in spain 🦊 falls mainly on the plain, naïve 日本 👩‍👩‍👧 "
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
VOCAB = 304  # a little more than the tokenizer has, as real models do
END = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([CORPUS] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    return tiny.target("llama", vocab=VOCAB)


@pytest.fixture(scope="module")
def lm(target: CausalTarget, tokenizer: Any) -> SpeculativeLM:
    return SpeculativeLM(
        target, tiny.drafter(target.info, steps=2, **tiny.CACHED), tokenizer, max_len=128
    )


@pytest.fixture(scope="module")
def plain(target: CausalTarget, tokenizer: Any) -> SpeculativeLM:
    return SpeculativeLM(target, "none", tokenizer, max_len=128)


class Script(Target[None]):
    """A target that says one thing: at position i comes `text[i]`, whatever stands before."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = torch.tensor([*text, *[END] * 64])
        self.info = TargetInfo("script", VOCAB, 1, 1, 10_000, torch.float32, torch.device("cpu"))

    def open(self, rows: int, slots: int, taps: Sequence[int] = ()) -> None:
        return None

    def admit(
        self, cache: None, rows: Tensor, prompts: Sequence[Tensor], prefix_lengths: Tensor
    ) -> None:
        return None

    def score(self, cache: None, batch: Batch, draft: Draft) -> TargetOutput:
        at = (batch.length[:, None] + torch.arange(draft.tokens.shape[1] + 1)).clamp(
            max=len(self.text) - 1
        )
        return TargetOutput(100.0 * torch.nn.functional.one_hot(self.text[at], VOCAB))


def scripted(
    tokenizer: Any, prompt: list[int], answer: Sequence[int], flaw: int = 1000, max_len: int = 512
) -> SpeculativeLM:
    """An LM that answers `answer`; its drafter errs at every `flaw`-th position."""
    text = [*prompt, *answer]
    return SpeculativeLM(Script(text), tiny.Hinted([text] * 8, VOCAB, flaw), tokenizer, max_len)


# shapes of what goes in and comes out


def test_one_string_gives_one_answer(lm: SpeculativeLM, tokenizer: Any) -> None:
    out = lm.generate("the rain", max_tokens=9, seed=1, ignore_eos=True)
    assert len(out.token_ids) == len(out.accepted) == 9
    assert out.finish_reason == "length"
    assert out.text == tokenizer.decode(out.token_ids, skip_special_tokens=True)


def test_a_list_gives_a_list(lm: SpeculativeLM) -> None:
    out = lm.generate(["the rain", "in", "spain"], max_tokens=5, seed=1)
    assert [type(o).__name__ for o in out] == ["Generation"] * 3
    assert [type(o).__name__ for o in lm.generate(["in"], max_tokens=2)] == ["Generation"]
    assert lm.generate([], max_tokens=2) == []


def test_token_ids_need_no_tokenizer(target: CausalTarget) -> None:
    bare = SpeculativeLM(target, "none", None, max_len=64)
    out = bare.generate([1, 2, 3], max_tokens=4, seed=0)
    assert len(out.token_ids) == 4
    assert out.text == ""
    assert [len(o.token_ids) for o in bare.generate([[1, 2, 3], [4]], max_tokens=4, seed=0)] == [
        4,
        4,
    ]
    assert [p.text for p in bare.stream([1, 2], max_tokens=4, seed=0)][-1] == ""
    with pytest.raises(UsageError, match="no tokenizer; give prompts as lists of token ids"):
        bare.generate("the rain")


def test_strings_and_their_ids_are_the_same_prompt(lm: SpeculativeLM, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "seed": 5}
    ids = tokenizer("the rain")["input_ids"]
    assert (
        lm.generate("the rain", raw=True, **options).token_ids
        == lm.generate(ids, **options).token_ids
    )


# seeds


def test_same_seed_same_tokens_in_lists_batches_and_streams(lm: SpeculativeLM) -> None:
    prompts = ["the rain", "in spain falls", "mainly", "on", "the plain"]
    options: dict[str, Any] = {"max_tokens": 12, "seed": 7, "draft_len": 4}
    listed = lm.generate(prompts, **options)
    for rows in (1, 2):
        assert [o.token_ids for o in lm.generate(prompts, rows=rows, **options)] == [
            o.token_ids for o in listed
        ]
    alone = lm.generate(prompts[0], **options)
    assert alone.token_ids == listed[0].token_ids
    last = list(lm.stream(prompts[0], **options))[-1].generation
    assert (last.token_ids, last.text, last.accepted) == (
        alone.token_ids,
        alone.text,
        alone.accepted,
    )


@pytest.mark.parametrize("verifier", ["token", "block", "match", "match-gumbel"])
def test_row_i_draws_from_hash_of_seed_and_i(lm: SpeculativeLM, verifier: str) -> None:
    from specdiff.verify import VERIFIERS

    prompts = [[5, 9, 2], [8], [1, 1, 4, 3]]
    listed = lm.generate(
        prompts, max_tokens=10, seed=7, draft_len=3, verifier=verifier, ignore_eos=True
    )
    for i, prompt in enumerate(prompts):
        batch = Batch.of([prompt], [SamplingParams(max_tokens=10)], [row_seed(7, i)])
        (row,) = tiny.rows_of(
            list(
                decode.decode(
                    lm.target, lm.drafter, batch, draft_len=3, verifier=VERIFIERS[verifier]
                )
            )[-1].batch
        )
        assert row[len(prompt) :] == listed[i].token_ids


def test_seeds_and_rows_differ(lm: SpeculativeLM) -> None:
    texts = {
        tuple(lm.generate("the", max_tokens=12, seed=s, ignore_eos=True).token_ids)
        for s in (0, 1, 2, -1, 2**63, 2**64 - 2)
    }
    assert len(texts) == 6
    rows = lm.generate(["the"] * 4, max_tokens=12, seed=0, ignore_eos=True)
    assert len({tuple(o.token_ids) for o in rows}) == 4
    assert (
        lm.generate("the", max_tokens=12, ignore_eos=True).token_ids
        != lm.generate("the", max_tokens=12, ignore_eos=True).token_ids
    )


@pytest.mark.parametrize("verifier", ["match", "match-gumbel"])
def test_match_gives_the_same_text_with_any_drafter(
    lm: SpeculativeLM, plain: SpeculativeLM, verifier: str
) -> None:
    options: dict[str, Any] = {
        "max_tokens": 16,
        "seed": 11,
        "verifier": verifier,
        "ignore_eos": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    want = plain.generate("falls mainly", **options).token_ids
    for draft_len in (1, 3, 8, "auto"):
        assert lm.generate("falls mainly", draft_len=draft_len, **options).token_ids == want


def test_interleaved_streams_never_meet(lm: SpeculativeLM) -> None:
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("the rain", {"seed": 1}),
        ("plain plain plain", {"seed": 2, "verifier": "block"}),
    ]
    alone = [lm.generate(p, max_tokens=20, **o).token_ids for p, o in jobs]
    streams = [lm.stream(p, max_tokens=20, **o) for p, o in jobs]
    last: list[Chunk | None] = [None, None]
    open_ = [0, 1]
    while open_:
        for i in [*open_]:
            piece = next(streams[i], None)
            if piece is None:
                open_.remove(i)
            else:
                last[i] = piece
    assert [p.generation.token_ids for p in last if p] == alone


def test_a_stream_may_be_left(lm: SpeculativeLM) -> None:
    stream = lm.stream("the rain", max_tokens=50, seed=1)
    next(stream)
    stream.close()
    assert len(lm.generate("the rain", max_tokens=3, seed=1, ignore_eos=True).token_ids) == 3


# where an answer ends


@pytest.mark.parametrize("draft_len", [1, 4, 8])
@pytest.mark.parametrize("flaw", [3, 1000])
@pytest.mark.parametrize("where", range(1, 12))
def test_max_tokens_cuts_inside_a_draft(
    tokenizer: Any, draft_len: int, flaw: int, where: int
) -> None:
    answer = list(range(30, 60))
    out = scripted(tokenizer, [7, 8], answer, flaw).generate(
        [7, 8], max_tokens=where, draft_len=draft_len, temperature=0
    )
    assert out.token_ids == answer[:where]
    assert len(out.accepted) == where
    assert out.finish_reason == "length"


@pytest.mark.parametrize("draft_len", [1, 4, 8])
@pytest.mark.parametrize("flaw", [3, 1000])
@pytest.mark.parametrize("where", range(12))
def test_a_stop_id_cuts_inside_a_draft(
    tokenizer: Any, draft_len: int, flaw: int, where: int
) -> None:
    """Tokens after the stop id are dropped, the id is kept, and the first of several counts."""
    for stop, options in (
        (END, {}),
        (99, {"stop_token_ids": (98, 99)}),
        (98, {"stop_token_ids": [99, 98], "ignore_eos": True}),
    ):
        answer = [*range(30, 30 + where), stop, 70, 99, 98, END, 71, 72]
        model = scripted(tokenizer, [7, 8], answer, flaw)
        out = model.generate([7, 8], max_tokens=40, draft_len=draft_len, temperature=0, **options)
        assert out.token_ids == answer[: where + 1]
        assert out.finish_reason == "stop"
        assert len(out.accepted) == out.stats.tokens == where + 1
        assert out.stats.accepted == sum(out.accepted)
        streamed = list(
            model.stream([7, 8], max_tokens=40, draft_len=draft_len, temperature=0, **options)
        )
        assert streamed[-1].generation.token_ids == out.token_ids
        assert "".join(p.text for p in streamed) == out.text
        assert "<|end|>" not in out.text


def test_a_stop_on_the_last_token_is_a_stop(tokenizer: Any) -> None:
    out = scripted(tokenizer, [7], [30, 31, END, 32]).generate(
        [7], max_tokens=3, draft_len=8, temperature=0
    )
    assert (out.token_ids, out.finish_reason) == ([30, 31, END], "stop")


def test_ignore_eos_goes_on(tokenizer: Any) -> None:
    model = scripted(tokenizer, [7], [30, END, 31, END, 32])
    out = model.generate([7], max_tokens=5, draft_len=8, temperature=0, ignore_eos=True)
    assert (out.token_ids, out.finish_reason) == ([30, END, 31, END, 32], "length")


def test_rows_of_a_list_end_each_on_their_own(tokenizer: Any) -> None:
    """One target text by position: longer prompts reach the stop sooner."""
    model = scripted(tokenizer, [7], [*range(30, 40), END])
    outs = model.generate(
        [[7], [7, 30, 31], [7, *range(30, 39)]], max_tokens=6, draft_len=4, temperature=0
    )
    assert [o.token_ids for o in outs] == [
        [30, 31, 32, 33, 34, 35],
        [32, 33, 34, 35, 36, 37],
        [39, END],
    ]
    assert [o.finish_reason for o in outs] == ["length", "length", "stop"]


def test_max_len_ends_an_answer(lm: SpeculativeLM, tokenizer: Any) -> None:
    short = SpeculativeLM(lm.target, lm.drafter, tokenizer, max_len=20)
    out = short.generate([3] * 15, max_tokens=100, seed=0, ignore_eos=True)
    assert (len(out.token_ids), out.finish_reason) == (5, "length")


def test_the_models_own_limit_holds(target: CausalTarget, tokenizer: Any) -> None:
    assert SpeculativeLM(target, "none", tokenizer, max_len=10_000).max_len == 256


# text


def test_streamed_pieces_join_to_the_text(lm: SpeculativeLM) -> None:
    """Over random bytes, where most of the text is no valid UTF-8 at all."""
    for seed in range(6):
        options: dict[str, Any] = {
            "max_tokens": 24,
            "seed": seed,
            "temperature": 1.3,
            "ignore_eos": seed % 2 == 0,
        }
        want, pieces = lm.generate("the 🦊", **options), list(lm.stream("the 🦊", **options))
        assert "".join(p.text for p in pieces) == want.text == pieces[-1].generation.text
        assert pieces[-1].generation.token_ids == want.token_ids
        assert pieces[-1].generation.finish_reason == want.finish_reason


@pytest.mark.parametrize(
    "text",
    ["🦊🦊🦊", "日本 naïve 日本", "👩‍👩‍👧 falls 👩‍👩‍👧", "naïve\n\n  the plain", "é́", "a🦊b日c"],
)
@pytest.mark.parametrize("draft_len", [1, 5])
def test_characters_are_never_split(tokenizer: Any, text: str, draft_len: int) -> None:
    answer = tokenizer(text)["input_ids"]
    assert len(answer) > len(text) / 2
    model = scripted(tokenizer, [40], [*answer, END], flaw=3)
    pieces = [
        p.text for p in model.stream([40], max_tokens=100, temperature=0, draft_len=draft_len)
    ]
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)
    assert all(text.startswith("".join(pieces[:i])) for i in range(len(pieces)))


def test_text_is_streamed_as_it_comes(tokenizer: Any) -> None:
    """Not held back to the end: each piece shows what the tokens so far spell."""
    answer = tokenizer("the rain in spain falls mainly on the plain")["input_ids"]
    model = scripted(tokenizer, [40], [*answer, END])
    stream = model.stream([40], max_tokens=100, temperature=0, draft_len=3)
    joined = ""
    for piece in stream:
        joined += piece.text
        assert piece.generation.text == joined
    assert joined == tokenizer.decode(answer)


def test_a_broken_character_at_the_end_is_shown(tokenizer: Any) -> None:
    """max_tokens inside an emoji: the stream ends with what generate's text ends with."""
    answer = tokenizer("ab🦊")["input_ids"]
    ids = answer[:-1] if len(answer) > 3 else answer
    model = scripted(tokenizer, [40], answer)
    options: dict[str, Any] = {"max_tokens": len(ids), "temperature": 0, "draft_len": 8}
    assert (
        "".join(p.text for p in model.stream([40], **options))
        == model.generate([40], **options).text
    )


def test_pieces_say_where_they_came_from(tokenizer: Any) -> None:
    answer = tokenizer("abcdefghij")["input_ids"]
    model = scripted(tokenizer, [40], [*answer, END], flaw=1000)
    out = model.generate([40], max_tokens=20, temperature=0, draft_len=3)
    assert out.accepted == ([True, True, True, False] * 3)[: len(answer) + 1]
    pieces = [p for p in model.stream([40], max_tokens=20, temperature=0, draft_len=3) if p.text]
    assert [p.accepted for p in pieces] == out.accepted[: len(answer)]


# chat


def test_a_string_is_a_users_turn(lm: SpeculativeLM, tokenizer: Any) -> None:
    assert tokenizer.decode(lm.encode("the rain")) == "[user] the rain\n[assistant] "
    assert (
        tokenizer.decode(lm.encode("the rain", system="in"))
        == "[system] in\n[user] the rain\n[assistant] "
    )
    assert tokenizer.decode(lm.encode("the rain", raw=True)) == "the rain"
    options: dict[str, Any] = {"max_tokens": 8, "seed": 2}
    ids = lm.generate("the rain", **options).token_ids
    assert ids == lm.chat([{"role": "user", "content": "the rain"}], **options).token_ids
    assert ids != lm.generate("the rain", raw=True, **options).token_ids
    assert lm.generate("the rain", system="in", **options).token_ids == lm.chat(
        [{"role": "system", "content": "in"}, {"role": "user", "content": "the rain"}], **options
    ).token_ids  # fmt: skip


def test_without_a_template_a_string_is_text(lm: SpeculativeLM, tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    model = SpeculativeLM(lm.target, "none", bare, 64)
    assert bare.decode(model.encode("the rain")) == "the rain"
    with pytest.raises(UsageError, match=r"no chat template.*raw=True"):
        model.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(UsageError, match="system prompt needs a chat template"):
        model.generate("the rain", system="in")


# bounds, and what is counted


@pytest.mark.parametrize("length", [20, 21, 300])
def test_a_prompt_that_is_too_long(lm: SpeculativeLM, tokenizer: Any, length: int) -> None:
    short = SpeculativeLM(lm.target, "none", tokenizer, max_len=20)
    with pytest.raises(
        UsageError, match=f"{length} tokens.*max_len 20; shorten it or raise max_len.*256"
    ):
        short.generate([5] * length)
    assert len(short.generate([5] * 19, ignore_eos=True, seed=0).token_ids) == 1


def test_a_prompt_without_tokens(lm: SpeculativeLM) -> None:
    for prompt in ("", [[]], ["the", ""]):
        with pytest.raises(UsageError, match="no tokens; give at least one"):
            lm.generate(prompt, raw=True)


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**9])
def test_a_token_id_nobody_has(lm: SpeculativeLM, bad: int) -> None:
    with pytest.raises(
        UsageError, match=f"token id {bad} is outside the target's vocabulary of {VOCAB}"
    ):
        lm.generate([1, bad, 2])


@pytest.mark.parametrize("draft_len", [1, 4, 9])
def test_stats_are_consistent(lm: SpeculativeLM, draft_len: int) -> None:
    for out in lm.generate(
        ["the rain", "in", "spain falls mainly"],
        max_tokens=23,
        seed=3,
        draft_len=draft_len,
        temperature=0.6,
    ):
        s = out.stats
        assert s.tokens == len(out.token_ids) == len(out.accepted)
        assert s.accepted == sum(out.accepted) == sum(s.passed)
        assert s.drafted == draft_len * s.rounds
        assert s.plain_rounds == 0
        assert s.tau == pytest.approx(s.tokens / s.rounds)
        assert s.alpha == pytest.approx(s.accepted / s.drafted)
        assert len(s.per_position) == draft_len
        assert s.reached[0] == s.rounds
        assert all(a >= b for a, b in zip(s.reached, s.reached[1:], strict=False))
        assert set(s.seconds) == {"draft", "score", "verify", "commit"}
        assert s.tokens <= s.accepted + s.rounds
        assert set(s.as_dict()) >= {"rounds", "tau", "alpha", "per_position", "seconds"}


def test_stats_of_plain_decoding(plain: SpeculativeLM) -> None:
    s = plain.generate("the rain", max_tokens=5, seed=0, ignore_eos=True).stats
    assert (s.rounds, s.plain_rounds, s.tokens, s.drafted, s.tau, s.alpha) == (5, 5, 5, 0, 1.0, 0.0)


def test_a_knowing_drafter_pays(tokenizer: Any) -> None:
    s = (
        scripted(tokenizer, [7], range(30, 70))
        .generate([7], max_tokens=40, draft_len=7, temperature=0)
        .stats
    )
    assert (s.rounds, s.tau, s.alpha) == (5, 8.0, 1.0)
    assert s.per_position == [1.0] * 7


def test_options_of_a_drafter_given_by_name(
    target: CausalTarget, tokenizer: Any, tmp_path: Path
) -> None:
    tiny.sedd(tiny.sedd_config(VOCAB)).save_pretrained(tmp_path / "drafter", draft_len=5)
    model = SpeculativeLM(target, str(tmp_path / "drafter"), tokenizer, 128)
    assert model.drafter.draft_len == 5
    one = model.generate("the", max_tokens=8, seed=0)
    two = model.generate("the", max_tokens=8, seed=0, drafter_options={"steps": 2})
    assert (
        one.token_ids == model.generate("the", max_tokens=8, seed=0, drafter_options={}).token_ids
    )
    assert one.stats.drafted == 5 * one.stats.rounds
    assert (
        two.token_ids
        == model.generate("the", max_tokens=8, seed=0, drafter_options={"steps": 2}).token_ids
    )
    with pytest.raises(UsageError, match="stepz"):
        model.generate("the", drafter_options={"stepz": 2})


def test_options_of_a_drafter_given_as_an_object(lm: SpeculativeLM) -> None:
    with pytest.raises(DrafterError, match="drafter given by name"):
        lm.generate("the", drafter_options={"steps": 2})


def test_no_grad_is_left_behind(lm: SpeculativeLM) -> None:
    """Generating builds no graph and leaves the caller's grad mode alone."""
    stream = lm.stream("the", max_tokens=4, seed=0)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_stream_checks_and_encodes_at_once(
    lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt is encoded once, before the first chunk is asked for."""
    prompts: list[Any] = []
    encode = SpeculativeLM.encode

    def counted(self: SpeculativeLM, prompt: Any, **options: Any) -> list[int]:
        prompts.append(prompt)
        return encode(self, prompt, **options)

    monkeypatch.setattr(SpeculativeLM, "encode", counted)
    chunks = lm.stream("the rain", max_tokens=3)
    assert prompts == ["the rain"]
    assert list(chunks) and prompts == ["the rain"]
    lm.generate(["the rain", [1, 2]], max_tokens=1)
    assert prompts == ["the rain", "the rain", [1, 2]]


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ("", {"raw": True}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([1] * 1000, {}, "prompt"),
        (None, {}, "prompt"),
        ("a", {"hope": 1}, "hope"),
        ("a", {"stop": [""]}, "stop"),
        ("a", {"stop": 3}, "stop"),
        ("a", {"rows": 0}, "rows"),
        ("a", {"system": 3}, "system"),
        ("a", {"raw": True, "system": "b"}, "system"),
        ("a", {"tools": "b"}, "tools"),
        ("a", {"documents": [1]}, "documents"),
        ("a", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("a", {"drafter_options": 3}, "drafter_options"),
        ("a", {"verifier": 3}, "verifier"),
        ("a", {"logit_bias": {VOCAB: 1}}, "logit_bias"),
        ("a", {"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    ],
)
def test_a_stream_raises_at_once_and_names_the_option(
    lm: SpeculativeLM, prompt: Any, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(UsageError) as caught:
        lm.stream(prompt, **options)
    assert caught.value.param == param
    assert pickle.loads(pickle.dumps(caught.value)).param == param


def test_generate_options_are_all_options() -> None:
    own = {field.name for field in fields(Options)} - {"sampling"}
    sampling = {field.name for field in fields(SamplingParams)}
    assert set(ChatOptions.__optional_keys__) == own | sampling
    assert set(GenerateOptions.__optional_keys__) == own | sampling | {"raw", "system", "rows"}
