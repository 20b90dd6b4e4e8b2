"""`generate(custom_generate=specdiff.custom_generate)` gives the same output as `generate`."""

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    WatermarkingConfig,
)

import specdiff
import tiny
from specdiff.drafters.ngram import NGramDrafter
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.targets.causal import attached
from specdiff.verify import VERIFIERS

NEW, EOS = 24, 42  # greedy text of the tiny llama holds EOS here and there
NAMES = (
    "GPT-2",
    "GPT-Neo",
    "OPT",
    "Mistral",
    "Qwen2, sliding",
    "Gemma 2",
    "Gemma 3",
    "Falcon",
    "GPT-OSS",
    "DeepSeek-V3",
)


def padded(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of different lengths in one left-padded batch."""
    prompts = tiny.prompts(rows, seed=seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def ours(net: PreTrainedModel, **options: Any) -> Any:
    return net.generate(
        custom_generate=specdiff.custom_generate,
        **({"drafter": "ngram", "pad_token_id": 0} | options),
    )


def theirs(net: PreTrainedModel, **options: Any) -> Any:
    return net.generate(**({"pad_token_id": 0} | options))


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def net(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.model(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_of_many_families(name: str) -> None:
    net = families.model(next(f for f in families.SUPPORTED if f.name.startswith(name)))
    want = theirs(net, **padded(4), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        ours(net, **padded(4), max_new_tokens=NEW, do_sample=False, draft_len=4), want
    )
    assert torch.equal(theirs(net, **padded(4), max_new_tokens=NEW, do_sample=False), want), (
        "the model's own text has changed"
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("draft_len", [1, 4, 8])
def test_greedy_text(net: PreTrainedModel, rows: int, draft_len: int) -> None:
    options: dict[str, Any] = {**padded(rows), "max_new_tokens": NEW, "do_sample": False}
    texts = [tiny.plain(net, p, NEW) for p in tiny.prompts(rows)]
    info = attached(net).info
    drafters = [
        "ngram",
        tiny.Hinted(texts, tiny.VOCAB, 5),
        tiny.drafter(info, steps=2),
        tiny.drafter(info, **tiny.CACHED),
    ]
    turns = itertools.cycle(("token", "block", "match"))
    for end in (None, texts[0][-NEW + 6]):
        want = theirs(net, **options, eos_token_id=end)
        for drafter, verifier in zip(drafters, turns, strict=False):
            got = ours(
                net,
                **options,
                eos_token_id=end,
                drafter=drafter,
                draft_len=draft_len,
                verifier=verifier,
            )
            assert torch.equal(got, want)


def ruled(batch: int, ids: Tensor) -> list[int]:
    """Every row has a rule of its own, on all that stands before."""
    return [token for token in range(tiny.VOCAB) if (token + int(ids.sum()) + batch) % 3]


class Waning(LogitsProcessor):
    """A user's own: works in place, and depends on the width alone."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids.shape[1] % tiny.VOCAB] -= 9
        return scores


SETTINGS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[26], [43, 6], [37, 18]]},
    "minimum": {"min_new_tokens": 14, "eos_token_id": EOS},
    "minimal length": {"min_length": 16, "eos_token_id": EOS},
    "forced end": {"forced_eos_token_id": 5},
    "forced beginning": {"forced_bos_token_id": 7},
    "bias": {"sequence_bias": {(3,): 5.0, (26,): -9.0, (43, 6): 4.0}},
    "suppressed": {"suppress_tokens": [26, 43, 37], "begin_suppress_tokens": [8, 9]},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": EOS},
    "of the prompt": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "constrained": {"prefix_allowed_tokens_fn": ruled},
    "marked": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "own": {
        "logits_processor": [Waning()],
        "remove_invalid_values": True,
        "renormalize_logits": True,
    },
    "several": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "prefix_allowed_tokens_fn": ruled,
        "eos_token_id": EOS,
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_processors_count_the_draft_above_them(setting: str) -> None:
    """Greedy text under each of transformers' processors; right, wrong and untrained drafts."""
    net, rows = tiny.model("llama"), 4
    options: dict[str, Any] = {
        **padded(rows),
        "max_new_tokens": NEW,
        "do_sample": False,
    } | SETTINGS[setting]
    want = theirs(net, **options)
    # the first matters to one-token prompts alone
    if setting not in (
        "forced beginning",
        "minimal length",
    ):
        assert not torch.equal(
            want, theirs(net, **padded(rows), max_new_tokens=NEW, do_sample=False)
        )
    texts = [
        row[mask.argmax() :].tolist()
        for row, mask in zip(want, options["attention_mask"], strict=True)
    ]
    for drafter in (
        "ngram",
        tiny.Hinted(texts, tiny.VOCAB, 3),
        tiny.Hinted(texts, tiny.VOCAB, 99),
        tiny.drafter(attached(net).info),
    ):
        assert torch.equal(ours(net, **options, drafter=drafter, draft_len=5), want)


def test_a_constraint_never_sees_what_it_forbids() -> None:
    """After a draft token of probability 0 it sees an allowed text, as it would without drafts."""
    net, prompt = tiny.model("llama"), torch.tensor([[1, 2, 3]])

    def strict(batch: int, ids: Tensor) -> list[int]:
        for n in range(3, len(ids)):
            assert int(ids[n]) in ruled(batch, ids[:n])
        return ruled(batch, ids)

    options: dict[str, Any] = {
        "input_ids": prompt,
        "max_new_tokens": NEW,
        "do_sample": False,
        "prefix_allowed_tokens_fn": strict,
    }
    want = theirs(net, **options)
    for drafter in (
        "ngram",
        tiny.Hinted(want.tolist(), tiny.VOCAB, 3),
        tiny.drafter(attached(net).info),
    ):
        assert torch.equal(ours(net, **options, drafter=drafter, draft_len=6), want)


WARPERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.2, "top_k": 0},
    "typical": {"typical_p": 0.7, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta": {"eta_cutoff": 0.03, "top_k": 0},
    "top-h": {"top_h": 0.4, "top_k": 0},
    "several": {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
    },
}


@pytest.mark.parametrize("warper", WARPERS)
def test_every_sampled_token_came_from_the_prepared_scores(warper: str) -> None:
    """Reported scores are the processors' on the model's logits; each token had a chance."""
    net, rows, prepared = tiny.model("llama"), padded(4), list[Any]()

    def listening(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any
    ) -> Tensor:
        prepared.append(logits_processor)
        return input_ids

    sampling: dict[str, Any] = {
        **rows,
        "max_new_tokens": 12,
        "do_sample": True,
        "pad_token_id": 0,
        **WARPERS[warper],
    }
    net.generate(custom_generate=listening, **sampling)
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = ours(net, **sampling, **details, drafter=tiny.drafter(attached(net).info), draft_len=4)
    width = rows["input_ids"].shape[1]
    assert len(out.scores) == len(out.logits) == 12
    mask = torch.cat([rows["attention_mask"], torch.ones(4, 12, dtype=torch.long)], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = net(out.sequences, attention_mask=mask, position_ids=places).logits
    for step, (scores, raw) in enumerate(zip(out.scores, out.logits, strict=True)):
        own = logits[:, width + step - 1]
        torch.testing.assert_close(raw, own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            scores, prepared[0](out.sequences[:, : width + step], own), atol=1e-3, rtol=1e-3
        )
        assert (scores.gather(1, out.sequences[:, width + step][:, None]) > -torch.inf).all()


@pytest.mark.parametrize("end", [None, EOS])
def test_scores_of_greedy_text_are_transformers(end: int | None) -> None:
    net = tiny.model("qwen3")
    options: dict[str, Any] = {
        **padded(3),
        "max_new_tokens": NEW,
        "do_sample": False,
        "repetition_penalty": 1.4,
        "eos_token_id": end,
    }
    options |= {"return_dict_in_generate": True, "output_scores": True}
    want, got = theirs(net, **options), ours(net, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert got.logits is None
    assert len(got.scores) == len(want.scores)
    mask = padded(3)["attention_mask"]
    for step, (a, b) in enumerate(zip(got.scores, want.scores, strict=True)):
        before = want.sequences[:, mask.shape[1] : mask.shape[1] + step]
        running = ~(before == (-1 if end is None else end)).any(1)
        torch.testing.assert_close(a[running], b[running], atol=1e-3, rtol=1e-3)
        assert not a[~running].any()


class Odd(StoppingCriteria):
    """Ends a row where its own tokens and their number add up to a multiple of five."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert scores is None
        return (input_ids.sum(1) + input_ids.shape[1]) % 5 == 0


@pytest.mark.parametrize("end", [None, EOS])
@pytest.mark.parametrize("rows", [1, 4])
def test_own_criteria_cut_inside_a_draft(net: PreTrainedModel, rows: int, end: int | None) -> None:
    """With an end of text ended rows are padded; without one all continue until the last ends."""
    options: dict[str, Any] = {
        **padded(rows),
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": end,
    }
    options["stopping_criteria"] = StoppingCriteriaList([Odd()])
    want = theirs(net, **options)
    assert want.shape[1] < padded(rows)["input_ids"].shape[1] + NEW
    texts = [tiny.plain(net, p, NEW) for p in tiny.prompts(rows)]
    for drafter in (
        "ngram",
        "none",
        tiny.Hinted(texts, tiny.VOCAB, 7),
        tiny.Hinted(texts, tiny.VOCAB, 99),
    ):
        columns, stats = Columns(), specdiff.Stats()
        got = ours(net, **options, drafter=drafter, text_streamer=columns, stats=stats)
        assert torch.equal(got, want)
        columns.match(got, options["input_ids"])
        if rows == 1:
            assert stats.tokens == len(columns.put_) - 1


class Columns:
    """A streamer that stores what it gets."""

    def __init__(self) -> None:
        self.put_: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.put_.append(value)

    def end(self) -> None:
        self.ended += 1

    def match(self, sequences: Tensor, prompts: Tensor) -> None:
        """The prompts, then every column once and in order."""
        assert self.ended == 1
        assert torch.equal(self.put_[0], prompts)
        assert torch.equal(torch.stack(self.put_[1:], dim=1), sequences[:, prompts.shape[1] :])


def test_columns_come_while_rows_are_written() -> None:
    net = tiny.model("llama")
    texts = [tiny.plain(net, p, NEW) for p in tiny.prompts(4)]
    rounds_so_far = list[int]()

    class Early(Columns):
        def put(self, value: Tensor) -> None:
            super().put(value)
            rounds_so_far.append(rounds.rounds)

    columns, rounds = Early(), specdiff.Stats()
    options: dict[str, Any] = {
        **padded(4),
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": EOS,
    }
    got = ours(
        net,
        **options,
        drafter=tiny.Hinted(texts, tiny.VOCAB, 5),
        draft_len=3,
        text_streamer=columns,
        stats=rounds,
    )
    assert torch.equal(got, theirs(net, **options))
    columns.match(got, options["input_ids"])
    assert len(set(rounds_so_far)) > 3


def test_time_that_is_up() -> None:
    """The first new position is the last, as in transformers."""
    net = tiny.model("llama")
    out = ours(
        net, **padded(3), max_new_tokens=NEW, do_sample=False, max_time=1e-9, eos_token_id=EOS
    )
    assert out.shape[1] == padded(3)["input_ids"].shape[1] + 1


def test_sampling_follows_the_global_seed(net: PreTrainedModel) -> None:
    def drawn(seed: int, **options: Any) -> Tensor:
        transformers.set_seed(seed)
        arguments = {"drafter": tiny.drafter(attached(net).info), **options}
        return ours(
            net,
            input_ids=torch.tensor([[1, 2, 3]]),
            max_new_tokens=12,
            do_sample=True,
            num_return_sequences=3,
            **arguments,
        )

    out = drawn(1)
    assert out.shape == (3, 15)
    assert torch.equal(out, drawn(1))
    assert not torch.equal(out, drawn(2))
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert torch.equal(drawn(1, verifier="match"), drawn(1, verifier="match", drafter="none"))
    before = torch.get_rng_state()
    ours(net, input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_drafter_sees_what_is_asked() -> None:
    """A drafter with the target's distribution is always right, under temperature and filters."""
    from specdiff.drafters.autoregressive import AutoregressiveDrafter
    from specdiff.nn.small_lm import SmallLM

    net = tiny.model("llama")
    same = SmallLM(net.config)
    same.net.load_state_dict(net.state_dict())
    drafter, stats = AutoregressiveDrafter(same.eval(), attached(net).info), specdiff.Stats()
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 12,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
    }
    ours(net, **padded(4), max_new_tokens=NEW, **options, drafter=drafter, draft_len=4, stats=stats)
    assert stats.alpha > 0.9  # some drafts run over the limit


def test_the_model_stays_the_users_own(net: PreTrainedModel) -> None:
    own = tiny.copy_of(net)
    options: dict[str, Any] = {**padded(4), "max_new_tokens": NEW, "do_sample": False}
    ours(net, **options)
    assert attached(net) is attached(net)
    assert torch.equal(theirs(net, **options), theirs(own, **options))
    twin = copy.deepcopy(net)
    assert attached(twin).model is twin
    assert torch.equal(ours(twin, **options), theirs(own, **options))
    double = attached(net.double())
    assert double.info.dtype == torch.float64
    assert torch.equal(ours(net, **options), theirs(own, **options))
    net.float()


def test_a_model_can_be_forgotten() -> None:
    net = tiny.model("llama")
    ours(net, **padded(2), max_new_tokens=3, do_sample=False)
    ours(net, **padded(2), max_new_tokens=3, do_sample=False, drafter_options={"longest": 2})
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


def test_auto_says_where_there_is_no_drafter() -> None:
    net = tiny.model("llama")
    with pytest.warns(RuntimeWarning, match="no drafter was trained for"):
        out = ours(net, **padded(2), max_new_tokens=5, do_sample=False, drafter="auto")
    assert torch.equal(out, theirs(net, **padded(2), max_new_tokens=5, do_sample=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(net, **padded(2), max_new_tokens=5, do_sample=False, drafter="auto")


def right(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in rows.items()}


def holey(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return rows | {
        "attention_mask": torch.ones_like(rows["input_ids"]).index_fill(1, torch.tensor([1]), 0)
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "not beam_search; leave out"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "not assisted_generation"),
    "attentions": (
        {"return_dict_in_generate": True, "output_attentions": True},
        "output_attentions cannot be given",
    ),
    "states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states cannot be given",
    ),
    "guidance": (
        {"guidance_scale": 1.5},
        "UnbatchedClassifierFreeGuidanceLogitsProcessor cannot be asked",
    ),
    "cache": (
        {"past_key_values": transformers.DynamicCache()},
        "past_key_values cannot be continued",
    ),
    "positions": ({"position_ids": torch.arange(10).expand(2, 10)}, "position_ids must count"),
    "room": ({"max_new_tokens": 300}, "may reach 309 tokens, but the model has 256 positions"),
    "drafter": ({"drafter": "unheard-of"}, "unknown drafter 'unheard-of'"),
    "options": (
        {"drafter": NGramDrafter, "drafter_options": {"longest": 1}},
        "drafter_options need a drafter given by name",
    ),
    "verifier": ({"verifier": "maybe"}, "unknown verifier 'maybe'"),
    "length": ({"draft_len": 0}, "draft_len must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_refused(case: str) -> None:
    net = tiny.model("gpt2")
    options, message = REFUSED[case]
    if options.get("drafter") is NGramDrafter:
        options = options | {"drafter": NGramDrafter(attached(net).info)}
    with pytest.raises(UsageError, match=message):
        ours(net, **({**padded(2), "max_new_tokens": 8, "do_sample": False} | options))


@pytest.mark.parametrize("change", [right, holey])
def test_padding_elsewhere_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    with pytest.raises(UsageError, match="padding_side='left'"):
        ours(tiny.model("llama"), **change(padded(3)), max_new_tokens=4, do_sample=False)


def test_other_models_and_modes_are_refused() -> None:
    net, ids = tiny.model("gpt2"), torch.tensor([[1, 2, 3]])
    with pytest.raises(UsageError, match="token_type_ids as model input is not supported"):
        ours(net, input_ids=ids, token_type_ids=torch.ones_like(ids), max_new_tokens=4)
    with pytest.raises(UsageError, match=r"call model\.eval\(\) first"):
        ours(net.train(), input_ids=ids, max_new_tokens=4)
    with pytest.raises(UsageError, match="inputs_embeds as model input is not supported"):
        ours(net.eval(), inputs_embeds=torch.randn(1, 3, tiny.WIDTH), max_new_tokens=4)
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 16,
        "decoder_start_token_id": 0,
    }
    with pytest.raises(UnsupportedModelError, match="encodes its prompt separately"):
        ours(
            transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval(),
            input_ids=ids,
            max_new_tokens=4,
        )


@pytest.mark.real
def test_smollm_in_a_padded_batch(lm: specdiff.SpeculativeLM) -> None:
    """The bundled drafter is the default; stop strings, penalties, streaming as transformers'."""
    net, tokenizer = lm.target.model, lm.tokenizer
    prompts = [
        lm.encode("Count from one to five."),
        lm.encode("Say: one, two, three. Say it again. Say it again."),
    ]
    width = max(map(len, prompts))
    rows = {
        "input_ids": torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts]
        ),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }
    options: dict[str, Any] = {
        **rows,
        "max_new_tokens": 16,
        "do_sample": False,
        "repetition_penalty": 1.05,
    }
    want = net.generate(**options)
    stats = specdiff.Stats()
    assert torch.equal(
        net.generate(**options, custom_generate=specdiff.custom_generate, draft_len=4, stats=stats),
        want,
    )
    assert stats.accepted > 0
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, ["3.", "hree"])])
    want = net.generate(**options, stopping_criteria=stop)
    assert want.shape[1] < width + 16
    assert torch.equal(
        net.generate(
            **options,
            stopping_criteria=stop,
            custom_generate=specdiff.custom_generate,
            drafter="ngram",
        ),
        want,
    )


def test_all_verifiers_are_known() -> None:
    net = tiny.model("llama")
    want = theirs(net, **padded(2), max_new_tokens=8, do_sample=False)
    for verifier in VERIFIERS:
        assert torch.equal(
            ours(net, **padded(2), max_new_tokens=8, do_sample=False, verifier=verifier), want
        )
