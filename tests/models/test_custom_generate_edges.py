"""custom_generate at the edges of generate's options: each is served, or refused by name."""

import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_custom_generate import EOS, NEW, Columns, ours, padded, theirs
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
)

import specdiff
import tiny
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.errors import UsageError
from specdiff.hf import custom_generate, inputs
from specdiff.noise import Noise
from specdiff.targets.causal import attached
from specdiff.types import Context, Draft
from specdiff.verify import VERIFIERS

PLAIN: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
PROMPT = [44, 15, 5, 6]


@pytest.fixture(scope="module")
def net() -> PreTrainedModel:
    return tiny.model("llama")


class Fixed(NoDrafter):
    """Drafts the same tokens in every round and row, whatever the text."""

    draft_len = 5

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        return Draft(torch.tensor([self.tokens[:draft_len]] * len(context.batch.length)))


# where a text ends


def silent_folder(path: Path, end: int) -> Path:
    """A model folder whose config.json says nothing of an end; its generation_config.json does."""
    tiny.model("llama").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [end], "pad_token_id": 0})
    )
    return path


def test_both_doors_stop_at_the_same_tokens(tmp_path: Path) -> None:
    """The end that the config class fills in (2) is in neither file, so it ends no text."""
    net, prompts, end = tiny.model("llama"), tiny.prompts(40), 7
    texts = [tiny.plain(net, p, 16)[len(p) :] for p in prompts]
    assert any(LlamaConfig().eos_token_id in text for text in texts)
    assert any(end in text for text in texts)
    lm = specdiff.load(str(silent_folder(tmp_path, end)), "ngram", device="cpu", dtype="float32")
    wants = [text[: text.index(end) + 1] if end in text else text for text in texts]
    for prompt, want in zip(prompts, wants, strict=True):
        ids = torch.tensor([prompt])
        answer = ours(
            lm.target.model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
        )
        assert answer[0, len(prompt) :].tolist() == want
    assert [
        lm.generate(prompt, max_tokens=16, temperature=0).token_ids for prompt in prompts
    ] == wants


@pytest.mark.parametrize("end", [-1, [-1, EOS]])
def test_an_end_that_no_token_has(net: PreTrainedModel, end: int | list[int]) -> None:
    options: dict[str, Any] = {**padded(4), **PLAIN, "eos_token_id": end}
    assert torch.equal(ours(net, **options, draft_len=5), theirs(net, **options))


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_constraint_is_not_asked_behind_an_end(net: PreTrainedModel, verifier: str) -> None:
    """Draft tokens after an end are no text, be it the draft's own or the only allowed token."""
    prompt = torch.tensor([PROMPT])

    def until_the_end(batch: int, ids: Tensor) -> list[int]:
        answer = ids[prompt.shape[1] :].tolist()
        if EOS in answer:
            return []
        return (
            [EOS]
            if len(answer) == 14
            else [t for t in range(tiny.VOCAB) if t != EOS or len(answer) % 2]
        )

    options: dict[str, Any] = {
        "input_ids": prompt,
        **PLAIN,
        "eos_token_id": EOS,
        "prefix_allowed_tokens_fn": until_the_end,
    }
    want = theirs(net, **options)
    assert want.shape[1] < prompt.shape[1] + NEW
    drafters = [
        Fixed([EOS, 5, 5, 5, 5]),
        Fixed([5, EOS, 5, EOS, 5]),
        Fixed([12] * 5),
        tiny.Hinted([[*want[0].tolist(), *[5] * NEW]], 48),
    ]
    for drafter in drafters:
        for draft_len in (1, 5):
            assert torch.equal(
                ours(net, **options, drafter=drafter, draft_len=draft_len, verifier=verifier), want
            )


def test_drafted_ends_beside_other_rows(net: PreTrainedModel) -> None:
    """A row with a drafted end looks like one that has ended, where the others continue: padded.

    So is one whose only valid token is an end, where the draft holds another.
    """
    prompts, answers = padded(3), list[list[int]]()
    width = prompts["input_ids"].shape[1]

    def listening(batch: int, ids: Tensor) -> list[int]:
        answers.append(ids[width:].tolist())
        closes = batch == 0 and len(answers[-1]) == 6
        return [EOS] if closes else list(range(tiny.VOCAB))

    options: dict[str, Any] = {
        **prompts,
        **PLAIN,
        "eos_token_id": EOS,
        "prefix_allowed_tokens_fn": listening,
    }
    want = theirs(net, **options)
    texts = [tiny.plain(net, p, NEW) for p in tiny.prompts(3)]
    for drafter in (Fixed([3, EOS, 5, 5, 5]), Fixed([3] * 5), tiny.Hinted(texts, tiny.VOCAB, 99)):
        assert torch.equal(ours(net, **options, drafter=drafter, draft_len=5), want)
    after = [answer[answer.index(EOS) + 1 :] for answer in answers if EOS in answer]
    assert after
    assert not any(any(rest) for rest in after)  # 0 is the pad


# processors with a memory


class Counter(LogitsProcessor):
    """Answers by the number of its calls."""

    def __init__(self, after: int = 0, until: int = 10**9) -> None:
        self.calls, self.after, self.until = 0, after, until

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.after < self.calls <= self.until:
            scores[:, self.calls % tiny.VOCAB] += 20
        return scores


class Matcher(LogitsProcessor):
    """Advances by the last token of each call, as a grammar's automaton does.

    Restarts where the text is `start` wide.
    """

    def __init__(self, start: int | None = None, *, strict: bool = False) -> None:
        self.state, self.start, self.strict, self.width = 0, start, strict, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = input_ids.shape[1]
        if self.strict and self.width and width != self.width + 1:
            raise RuntimeError("not the next text")
        self.state = 0 if width == self.start else (3 * self.state + int(input_ids[0, -1])) % 17
        self.width = width
        allowed = (torch.arange(tiny.VOCAB) + self.state) % 3 > 0
        return scores.masked_fill(~allowed, -torch.inf)


def remembering_fn() -> Callable[[int, Tensor], list[int]]:
    calls = list[int]()

    def allowed(batch: int, ids: Tensor) -> list[int]:
        calls.append(batch)
        return [t for t in range(tiny.VOCAB) if (t + len(calls)) % 4]

    return allowed


MEMORIES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "counter": ("Counter", lambda: {"logits_processor": [Counter()]}),
    "late counter": ("Counter", lambda: {"logits_processor": [Counter(after=12)]}),
    "counter of a while": ("Counter", lambda: {"logits_processor": [Counter(after=12, until=14)]}),
    "matcher": ("Matcher", lambda: {"logits_processor": [Matcher()]}),
    "matcher that begins anew": ("Matcher", lambda: {"logits_processor": [Matcher(start=4)]}),
    "strict matcher": (
        "Matcher .*RuntimeError: not the next text",
        lambda: {"logits_processor": [Matcher(strict=True)]},
    ),
    "constraint": (
        "prefix_allowed_tokens_fn",
        lambda: {"prefix_allowed_tokens_fn": remembering_fn()},
    ),
    "after a filter": (
        "Counter",
        lambda: {"logits_processor": [Counter()], "repetition_penalty": 1.2},
    ),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_processor_with_a_memory_is_refused(
    net: PreTrainedModel, memory: str, sampled: bool
) -> None:
    name, options = MEMORIES[memory]
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=f"^{name}.*"):
        ours(
            net,
            input_ids=torch.tensor([PROMPT]),
            max_new_tokens=NEW,
            do_sample=sampled,
            **options(),
        )


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("end", [None, EOS])
def test_without_drafts_a_memory_is_kept(
    net: PreTrainedModel, memory: str, end: int | None
) -> None:
    options = MEMORIES[memory][1]
    for rows in (1, 3):
        arguments: dict[str, Any] = {**padded(rows), **PLAIN, "eos_token_id": end}
        assert torch.equal(
            ours(net, **arguments, **options(), drafter="none"),
            theirs(net, **arguments, **options()),
        )


def test_a_memory_that_shows_last_is_refused_at_the_end(net: PreTrainedModel) -> None:
    """It is seen by no check between: the first rounds came before it, and the next is not due."""
    calls = list[int]()

    def late(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        return scores + 20 * (torch.arange(tiny.VOCAB) == 7) if len(calls) > 80 else scores

    stats = specdiff.Stats()
    with pytest.raises(UsageError, match=r"^late answers differently"):
        options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, "stats": stats}
        ours(
            net,
            input_ids=torch.tensor([PROMPT]),
            **options,
            logits_processor=[late],
            drafter=Fixed([1] * 5),
            draft_len=5,
        )
    assert stats.rounds == 15
    calls.clear()
    stats = specdiff.Stats()
    with pytest.raises(UsageError, match=r"^late answers differently"):
        options = {"max_new_tokens": 100, "do_sample": False, "stats": stats}
        ours(
            net,
            input_ids=torch.tensor([PROMPT]),
            **options,
            logits_processor=[late],
            drafter=Fixed([1] * 5),
            draft_len=5,
        )
    assert stats.rounds < 30  # in a long answer, soon


@pytest.mark.parametrize("start", range(80, 110, 7))
def test_a_counter_is_watched_in_every_round(net: PreTrainedModel, start: int) -> None:
    """Three calls of another answer, in rounds that would not be checked of others."""
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, "draft_len": 5}
    counter = Counter(after=start, until=start + 3)
    with pytest.raises(UsageError, match=r"^Counter answers differently"):
        ours(
            net,
            input_ids=torch.tensor([PROMPT]),
            **options,
            logits_processor=[counter],
            drafter=Fixed([1] * 5),
        )


class Harmless(LogitsProcessor):
    """Counts its calls and prepares a table at the first, but answers by its arguments alone."""

    def __init__(self) -> None:
        self.calls = 0
        self.table: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.arange(scores.shape[1]) % 5 * 3.0
        return scores + self.table.roll(input_ids.shape[1])


def test_a_harmless_count_is_taken(net: PreTrainedModel) -> None:
    options: dict[str, Any] = {**padded(4), **PLAIN, "eos_token_id": EOS}
    want = theirs(net, **options, logits_processor=[Harmless()])
    assert torch.equal(ours(net, **options, logits_processor=[Harmless()], draft_len=4), want)


def test_processors_that_work_in_place_are_told_apart(net: PreTrainedModel) -> None:
    def raised(token: int) -> Callable[[Tensor, Tensor], Tensor]:
        def raising(input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, (input_ids.shape[1] + token) % tiny.VOCAB] += 6
            return scores

        return raising

    options: dict[str, Any] = {
        **padded(3),
        **PLAIN,
        "logits_processor": [raised(3), raised(9), raised(20)],
    }
    assert torch.equal(ours(net, **options, draft_len=4), theirs(net, **options))


def test_a_function_is_a_processor_too(net: PreTrainedModel) -> None:
    calls = list[int]()

    def shifting(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        return scores.roll(len(calls), dims=1)

    with pytest.raises(UsageError, match=r"^shifting answers differently"):
        ours(net, **padded(1), **PLAIN, logits_processor=[shifting])


def test_scores_of_infinity_name_a_token(net: PreTrainedModel) -> None:
    """As argmax reads them, so does sampling here. Reported scores are the processors' own."""

    def insisting(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids.shape[1] % tiny.VOCAB] = torch.inf
        return scores

    details = {"return_dict_in_generate": True, "output_scores": True}
    options: dict[str, Any] = {**padded(2), **PLAIN, **details, "logits_processor": [insisting]}
    want, answer = theirs(net, **options), ours(net, **options, draft_len=4)
    assert torch.equal(answer.sequences, want.sequences)
    assert all(
        torch.equal(a.isposinf(), b.isposinf())
        for a, b in zip(answer.scores, want.scores, strict=True)
    )
    assert torch.equal(
        ours(net, **{**options, "do_sample": True}, draft_len=4).sequences, want.sequences
    )


def test_a_dead_end_that_only_a_draft_enters(net: PreTrainedModel) -> None:
    """A token that the target does not choose leads to where nothing is allowed: never entered."""

    def dead_end(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(
            (input_ids[:, -1:] == 5) & (input_ids.shape[1] > len(PROMPT)), -torch.inf
        )

    options: dict[str, Any] = {
        "input_ids": torch.tensor([PROMPT]),
        **PLAIN,
        "logits_processor": [dead_end],
    }
    want = theirs(net, **options)
    assert 5 not in want[0, len(PROMPT) :]
    assert torch.equal(ours(net, **options, drafter=Fixed([5] * 5), draft_len=5), want)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("fault", [-torch.inf, torch.nan])
@pytest.mark.parametrize("rows", [1, 3])
def test_processors_that_allow_nothing_are_named(
    net: PreTrainedModel, fault: float, sampled: bool, rows: int
) -> None:
    """There is no distribution to draw from, whatever argmax makes of it."""
    width = padded(rows)["input_ids"].shape[1]

    def nothing(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= width + 4:
            scores[rows - 1] = fault
        return scores

    options: dict[str, Any] = {**padded(rows), "max_new_tokens": 12, "do_sample": sampled}
    for drafter in ("none", "ngram", Fixed([5] * 5)):
        with pytest.raises(UsageError, match=rf"in row {rows - 1} for token 4 of the answer"):
            ours(net, **options, logits_processor=[nothing], drafter=drafter)


# stopping criteria with a memory


class Countdown(StoppingCriteria):
    """Ends the row of the call's number where its last token is even; all of them at call 18."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.calls += 1
        place = torch.arange(len(input_ids))
        turn = (self.calls % 3 == 0) & (place == self.calls // 3 % len(input_ids))
        return (turn & (input_ids[:, -1] % 2 == 0)) | torch.tensor(self.calls >= 18)


@pytest.mark.parametrize("end", [None, EOS, -1])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_criteria_may_have_a_memory(net: PreTrainedModel, rows: int, end: int | None) -> None:
    """They are called once for every width, in order, however far ahead of the others a row is."""
    options: dict[str, Any] = {**padded(rows), **PLAIN, "eos_token_id": end}
    want = theirs(net, **options, stopping_criteria=StoppingCriteriaList([Countdown()]))
    texts = [tiny.plain(net, p, NEW) for p in tiny.prompts(rows)]
    uneven = tiny.Hinted(
        [text if row % 2 else [0] * len(text) for row, text in enumerate(texts)], tiny.VOCAB, 99
    )
    for drafter in ("none", "ngram", uneven, tiny.Hinted(texts, tiny.VOCAB, 7)):
        columns, stats = Columns(), specdiff.Stats()
        criteria = StoppingCriteriaList([Countdown()])
        answer = ours(
            net,
            **options,
            stopping_criteria=criteria,
            drafter=drafter,
            text_streamer=columns,
            stats=stats,
        )
        assert torch.equal(answer, want)
        columns.match(answer, options["input_ids"])
        if end is None:
            assert stats.tokens == answer[:, options["input_ids"].shape[1] :].numel()


# options of sampling that ours do not have, or bound otherwise

SAMPLING: dict[str, dict[str, Any]] = {
    "no temperature": {"temperature": None, "top_k": 0},
    "infinite temperature": {"temperature": math.inf, "top_k": 0},
    "hot": {"temperature": 1e30, "top_k": 0},
    "cold": {"temperature": 1e-12},
    "no top-k": {"top_k": None},
    "wide top-k": {"top_k": 10**6},
    "top-p of nothing": {"top_p": 0.0, "top_k": 0},
    "top-p of next to nothing": {"top_p": 1e-12},
    "top-p of all": {"top_p": 1.0, "top_k": 0},
    "min-p off": {"min_p": 0.0, "top_k": 0},
    "min-p of all": {"min_p": 1.0, "top_k": 0},
    "typical": {"typical_p": 0.01, "top_k": 0},
    "no cutoffs": {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_k": 0},
    "cutoffs": {"epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "top_k": 0},
    "renormalized": {"renormalize_logits": True, "top_p": 0.0},
    "strong penalty": {"repetition_penalty": 1e9, "top_k": 0},
    "weak penalty": {"repetition_penalty": 1e-9, "top_k": 0},
    "penalty that overflows": {"repetition_penalty": 1e-40, "top_k": 0},
}


@pytest.mark.parametrize("case", SAMPLING)
def test_the_processors_define_the_distribution(net: PreTrainedModel, case: str) -> None:
    """Reported scores are transformers' processors on the logits, and gave the token a chance."""
    lists, rows = list[Any](), padded(3)

    def listening(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any
    ) -> Tensor:
        lists.append(logits_processor)
        return input_ids

    options: dict[str, Any] = {
        **rows,
        "max_new_tokens": 10,
        "do_sample": True,
        "pad_token_id": 0,
        **SAMPLING[case],
    }
    net.generate(custom_generate=listening, **options)
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    width = rows["input_ids"].shape[1]
    for drafter in ("ngram", tiny.drafter(attached(net).info)):
        out = ours(net, **options, **details, drafter=drafter, draft_len=4)
        for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
            text = out.sequences[:, : width + step]
            torch.testing.assert_close(scores, lists[0](text, logits.clone()), rtol=1e-5, atol=1e-5)
            assert (scores.gather(1, out.sequences[:, width + step][:, None]) > -torch.inf).all()


@pytest.mark.parametrize(
    "cold",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-31, "top_p": 0.9},
        {"temperature": 1e-300, "min_p": 0.1},
    ],
)
@pytest.mark.parametrize("drafter", ["ngram", "sedd"])
def test_next_to_no_temperature_is_greedy(
    net: PreTrainedModel, cold: dict[str, Any], drafter: str
) -> None:
    """transformers divides by it, gets infinities, and fails."""
    instance: Any = drafter if drafter == "ngram" else tiny.drafter(attached(net).info)
    options: dict[str, Any] = {**padded(3), "max_new_tokens": NEW, "repetition_penalty": 1.2}
    want = theirs(net, **options, do_sample=False)
    assert torch.equal(ours(net, **options, do_sample=True, **cold, drafter=instance), want)


def test_a_cold_temperature_hides_no_processor_behind_it(net: PreTrainedModel) -> None:
    def even(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(tiny.VOCAB) % 2 == 1, -torch.inf)

    processors = [TemperatureLogitsWarper(1e-40), even]
    answer = ours(
        net,
        input_ids=torch.tensor([PROMPT]),
        max_new_tokens=12,
        do_sample=True,
        logits_processor=processors,
    )
    assert not (answer[0, len(PROMPT) :] % 2).any()


# the draft length


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_seed_fixes_the_draft_length(net: PreTrainedModel, sampled: bool, verifier: str) -> None:
    """Where the text depends on the length of drafts, clocks must not choose it: K in every round.

    An automatic length times a few plain rounds after its first drafts.
    """
    transformers.set_seed(5)
    stats, drafter = specdiff.Stats(), Fixed([5] * 5)
    options: dict[str, Any] = {
        "max_new_tokens": 60,
        "do_sample": sampled,
        "drafter": drafter,
        "verifier": verifier,
    }
    ours(net, input_ids=torch.tensor([[1, 2, 3]]), **options, stats=stats)
    assert stats.rounds > 20
    automatic = not sampled or verifier.startswith("match")
    assert (stats.plain_rounds > 0) == automatic
    if not automatic:
        assert stats.drafted == 5 * stats.rounds
    automatic_stats = specdiff.Stats()
    ours(
        net, input_ids=torch.tensor([[1, 2, 3]]), **options, stats=automatic_stats, draft_len="auto"
    )
    assert automatic_stats.plain_rounds > 0


def test_later_calls_start_from_what_earlier_ones_measured(net: PreTrainedModel) -> None:
    drafter = Fixed([5] * 5)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "drafter": drafter}
    ours(net, input_ids=torch.tensor([[1, 2, 3]]), **options)
    profile = custom_generate.PROFILES[attached(net)][drafter]
    seconds = profile.seconds
    assert seconds > 0
    ours(net, input_ids=torch.tensor([[1, 2, 3]]), **options)
    assert custom_generate.PROFILES[attached(net)][drafter] is profile
    assert profile.seconds > seconds


def test_a_drafter_with_a_memory_samples_only_by_match(net: PreTrainedModel) -> None:
    """Two calls after the same set_seed would draw with the same noise."""
    options: dict[str, Any] = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "max_new_tokens": 8,
        "drafter": "ngram",
        "drafter_options": {"memory": 100},
    }
    for verifier in ("token", "block"):
        with pytest.raises(UsageError, match="remembers earlier requests") as error:
            ours(net, **options, do_sample=True, verifier=verifier)
        assert error.value.param == "drafter_options"
    ours(net, **options, do_sample=True, verifier="match")
    ours(net, **options, do_sample=False)


# what else may come


def test_streamer_of_generate(net: PreTrainedModel) -> None:
    """It gets what plain generate gives it: the prompts once, every column, and the end."""
    columns, rows = Columns(), padded(3)
    sequences = ours(net, **rows, **PLAIN, streamer=columns)
    columns.match(sequences, rows["input_ids"])
    with pytest.raises(UsageError, match="give one of them"):
        ours(net, **rows, **PLAIN, streamer=Columns(), text_streamer=Columns())


def test_reader_of_a_streamer_comes_to_an_end(net: PreTrainedModel) -> None:
    class Digits:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Digits(), skip_prompt=True, timeout=20)  # type: ignore[arg-type]
    options: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3]]), **PLAIN}
    writer = threading.Thread(target=lambda: ours(net, **options, streamer=streamer))
    writer.start()
    text = "".join(streamer)
    writer.join()
    assert [int(word) for word in text.split()] == theirs(net, **options)[0, 3:].tolist()


def vision() -> PreTrainedModel:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    image = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    net = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=image, text_config=text, image_token_index=47)
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return net


def test_text_alone_for_a_model_that_sees() -> None:
    """transformers prepares an empty dict for the images that are not there."""
    net = vision()
    options: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3, 1, 2]]), **PLAIN}
    want = theirs(net, **options)
    assert len(set(want[0].tolist())) > 3
    for nothing in ({}, {"mm_encoder_outputs": {"image": None}}, {"mm_encoder_outputs": None}):
        assert torch.equal(ours(net, **options, **nothing, draft_len=4), want)
    image = torch.zeros(1, 3, 8, 8)
    with_image = {**options, "input_ids": torch.tensor([[1, 2, *[47] * 4, 3]])}
    with pytest.raises(UsageError, match="as model input is not supported"):
        ours(net, **with_image, pixel_values=image)


@pytest.mark.parametrize("value", [{}, (), [], (None, None), {"a": None, "b": {}}])
def test_empty_model_inputs_are_nothing(value: Any) -> None:
    assert inputs.is_empty(value)


@pytest.mark.parametrize("value", [0, False, "", torch.zeros(0), [0], {"a": 1}])
def test_other_model_inputs_are_something(value: Any) -> None:
    assert not inputs.is_empty(value) or value == ""


TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "no drafter": (
        {"drafter": None},
        "drafter must be a name, a folder or a specdiff.Drafter, not None",
    ),
    "a class": ({"drafter": Fixed}, "drafter must be a name"),
    "options": (
        {"drafter_options": "longest"},
        "drafter_options must be a mapping of keyword arguments, not 'longest'",
    ),
    "no verifier": ({"verifier": None}, "verifier must be a name, not None"),
    "list": ({"verifier": ["token"]}, "verifier must be a name"),
    "statistics": ({"stats": True}, "stats must be a specdiff.Stats, not True"),
    "half": ({"draft_len": 2.5}, "draft_len must be a whole number"),
    "word": ({"draft_len": "4"}, "draft_len must be a whole number"),
    "numpy": ({"draft_len": np.int64(0)}, "draft_len must be at least 1, not 0"),
}


@pytest.mark.parametrize("case", TYPES)
def test_arguments_of_other_types_are_refused(net: PreTrainedModel, case: str) -> None:
    options, message = TYPES[case]
    with pytest.raises(UsageError, match=message):
        ours(net, **padded(1), **PLAIN, **options)


def test_numpy_numbers_and_paths(net: PreTrainedModel, tmp_path: Path) -> None:
    stats = specdiff.Stats()
    ours(net, **padded(1), **PLAIN, drafter=Fixed([5] * 5), draft_len=np.int32(3), stats=stats)
    assert stats.drafted == 3 * stats.rounds
    file = tmp_path / "mine.py"
    file.write_text("from specdiff.drafters.ngram import NGramDrafter as Mine\n")
    assert torch.equal(
        ours(net, **padded(2), **PLAIN, drafter=Path(f"{file}:Mine")),
        theirs(net, **padded(2), **PLAIN),
    )


# drafters that are kept


def test_few_drafters_are_kept() -> None:
    net = tiny.model("llama")
    target = attached(net)
    first = custom_generate._drafter(target, "ngram", {"longest": 1})
    assert custom_generate._drafter(target, "ngram", {"longest": 1}) is first
    for longest in range(2, 30):
        custom_generate._drafter(target, "ngram", {"longest": longest})
        # used again and again
        assert custom_generate._drafter(target, "ngram", {"longest": 1}) is first
    assert len(custom_generate.CACHED_DRAFTERS[target]) == custom_generate.MOST_DRAFTERS
    assert custom_generate._drafter(target, "ngram", {"longest": 2}) is not None


def test_options_that_are_objects_are_never_confused(tmp_path: Path) -> None:
    """Two objects may print alike; a drafter built with the one is not the other's."""

    class Same:
        def __repr__(self) -> str:
            return "same"

    file = tmp_path / "keeping.py"
    file.write_text(
        "from specdiff.drafters.base import NoDrafter\n"
        "class Keeping(NoDrafter):\n"
        "    def __init__(self, info, what):\n"
        "        self.what = what\n"
    )
    target = attached(tiny.model("llama"))
    one, other = Same(), Same()
    drafters: Any = [
        custom_generate._drafter(target, f"{file}:Keeping", {"what": what}) for what in (one, other)
    ]
    assert drafters[0].what is one
    assert drafters[1].what is other


def test_threads_share_one_drafter() -> None:
    target = attached(tiny.model("llama"))
    barrier = threading.Barrier(8)

    def build(place: int) -> list[Drafter[Any]]:
        barrier.wait()
        return [
            custom_generate._drafter(target, "ngram", {"longest": 1 + (place + turn) % 12})
            for turn in range(200)
        ]

    with ThreadPoolExecutor(8) as pool:
        lists = list(pool.map(build, range(8)))
    for drafters in lists:
        assert {type(drafter).__name__ for drafter in drafters} == {"NGramDrafter"}
    assert len(custom_generate.CACHED_DRAFTERS[target]) <= custom_generate.MOST_DRAFTERS
    for place, drafters in enumerate(lists):
        assert [drafter.sizes.stop - 1 for drafter in drafters] == [
            1 + (place + turn) % 12 for turn in range(200)
        ]  # type: ignore[attr-defined]
