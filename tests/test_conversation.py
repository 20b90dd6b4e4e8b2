"""Conversations: answers equal those of the messages alone, and each turn reads only new tokens."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

import tiny
from specdiff import Conversation, SpeculativeLM, prefix_cache, rows
from specdiff.errors import UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.text.conversation import Reading
from test_lm import END, VOCAB, scripted, tokenizer  # noqa: F401

SAID = ("the rain", "in spain", "falls mainly", "on the plain")


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    return tiny.target("llama", vocab=VOCAB, positions=512)


@pytest.fixture(scope="module", params=["plain", "drafted"])
def lm(request: pytest.FixtureRequest, target: CausalTarget, tokenizer: Any) -> SpeculativeLM:
    drafter = "none" if request.param == "plain" else tiny.drafter(target.info, **tiny.CACHED)
    return SpeculativeLM(target, drafter, tokenizer, max_len=500)


def answered(conversation: Conversation, text: str, **options: Any) -> tuple[str, list[int]]:
    pieces = list(conversation.say(text, **options))
    assert (
        "".join(p.text for p in pieces)
        == pieces[-1].generation.text
        == conversation.messages[-1]["content"]
    )
    return pieces[-1].generation.text, pieces[-1].generation.token_ids


def roles(conversation: Conversation) -> list[str]:
    return [m["role"] for m in conversation.messages]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "verifier": "match", "top_p": 0.9}]
)
def test_each_answer_is_that_of_its_messages_alone(
    lm: SpeculativeLM, options: dict[str, Any]
) -> None:
    conversation, held, read, reused = (
        Conversation(lm, "be brief", max_tokens=25, **options),
        [],
        0,
        0,
    )
    for text in SAID:
        messages = [*conversation.messages, {"role": "user", "content": text}]
        prompt, alone = lm.render(messages), lm.chat(messages, max_tokens=25, **options)
        assert answered(conversation, text) == (alone.text, alone.token_ids)
        assert conversation.messages == [*messages, {"role": "assistant", "content": alone.text}]
        overlap = min(prefix_cache.shared(held[:-1], prompt), len(prompt) - 1)
        read, reused, held = (
            read + len(prompt) - overlap,
            reused + overlap,
            [*prompt, *alone.token_ids],
        )
        assert (conversation.reading.read, conversation.reading.reused) == (read, reused)
        assert conversation.size == len(held)
    assert conversation.stats.tokens == 25 * len(SAID) and reused > read / 3


def test_a_position_too_many_would_show(lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what a row holds is thought one longer than it is."""

    def seats(held: Any, prompts: Any) -> list[tuple[int, int]]:
        return [
            (row, min(length + 1, len(p) - 1))
            for (row, length), p in zip(prefix_cache.seats(held, prompts), prompts, strict=True)
        ]

    monkeypatch.setattr(rows, "seats", seats)
    conversation, same = Conversation(lm, max_tokens=25, temperature=0), []
    for text in SAID:
        messages = [*conversation.messages, {"role": "user", "content": text}]
        same.append(
            answered(conversation, text)[0] == lm.chat(messages, max_tokens=25, temperature=0).text
        )
    assert not all(same)


def test_an_answer_that_is_tokenised_as_it_was_written_is_read_once(tokenizer: Any) -> None:
    """All but the last token, which was never scored; `parted` counts texts split differently."""
    for answer, parted in (
        (tokenizer("falls mainly on the plain,")["input_ids"], 0),
        (list(tokenizer("spain").input_ids[:1]) * 2, None),
    ):
        model = scripted(tokenizer, lmprompt(tokenizer, "the rain"), [*answer, END])
        conversation = Conversation(model, temperature=0, draft_len=3)
        answered(conversation, "the rain")
        first = conversation.reading.read
        list(conversation.say("in spain", max_tokens=2))
        tokens = [*lmprompt(tokenizer, "the rain"), *answer, END]
        prompt = model.render(conversation.messages[:3])
        assert conversation.reading.reused == prefix_cache.shared(tokens[:-1], prompt)
        assert conversation.reading.read == first + len(prompt) - conversation.reading.reused
        assert conversation.reading.parted == (conversation.reading.reused < len(tokens) - 1)
        if parted is not None:
            assert conversation.reading.parted == parted


def lmprompt(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(f"[user] {text}\n[assistant] ", add_special_tokens=False)["input_ids"])


def test_stopped_from_another_thread_it_keeps_what_is_written(lm: SpeculativeLM) -> None:
    conversation, output = Conversation(lm, temperature=0, max_tokens=400), ""
    for piece in conversation.say("the rain"):
        output += piece.text
        if len(piece.generation.token_ids) >= 10:
            thread = threading.Thread(target=conversation.stop)
            thread.start()
            thread.join()
    assert (
        piece.generation.finish_reason == "interrupted"
        and 10 <= len(piece.generation.token_ids) <= 30
    )
    assert conversation.messages[-1] == {"role": "assistant", "content": output} and output
    goes_on(lm, conversation)
    assert conversation.reading.reused > 0


def goes_on(lm: SpeculativeLM, conversation: Conversation) -> None:
    """The next answer is that of the messages alone."""
    messages = [*conversation.messages, {"role": "user", "content": "in spain"}]
    assert (
        answered(conversation, "in spain", max_tokens=9)[0]
        == lm.chat(messages, temperature=0, max_tokens=9).text
    )
    assert roles(conversation) == ["user", "assistant"] * (len(messages) // 2 + 1)


def test_left_by_its_reader_it_keeps_what_was_read(lm: SpeculativeLM) -> None:
    conversation, output = Conversation(lm, temperature=0, max_tokens=400), ""
    for piece in conversation.say("the rain"):
        output += piece.text
        if len(output) > 10:
            break
    del piece
    assert conversation.messages[-1]["content"] == output
    goes_on(lm, conversation)


def test_an_empty_answer_leaves_the_messages_well_formed(tokenizer: Any) -> None:
    for answer, stops in (
        ([END], False),
        ([VOCAB - 1] * 50, True),
    ):  # ends at once; says only what is no text, and is stopped
        model = scripted(tokenizer, lmprompt(tokenizer, "the rain"), answer)
        conversation = Conversation(model, temperature=0, draft_len=3)
        chunks = conversation.say("the rain")
        if stops:
            chunks = stopping(conversation, chunks)
        assert [p.text for p in chunks] == [""]
        assert conversation.messages == [
            {"role": "user", "content": "the rain"},
            {"role": "assistant", "content": ""},
        ]
        list(conversation.say("in spain", max_tokens=3))
        assert roles(conversation) == ["user", "assistant"] * 2


def stopping(conversation: Conversation, chunks: Any) -> Any:
    """`said`, stopped in its first round."""
    score = conversation.lm.target.score

    def scored(*arguments: Any) -> Any:
        conversation.stop()
        return score(*arguments)

    conversation.lm.target.score = scored  # type: ignore[method-assign]
    return chunks


def test_a_conversation_that_no_longer_fits_says_so_and_is_not_lost(
    target: CausalTarget, tokenizer: Any
) -> None:
    conversation = Conversation(
        SpeculativeLM(target, "none", tokenizer, max_len=120), temperature=0, max_tokens=40
    )
    answered(conversation, "the rain")
    before = [dict(m) for m in conversation.messages]
    with pytest.raises(
        UsageError,
        match=r"the conversation has \d+ tokens .* max_len 120: "
        r"clear it, say less, or raise max_len .* 512",
    ):
        list(conversation.say("in spain " * 30))
    assert conversation.messages == before
    _, tokens = answered(conversation, "in")  # what fits is answered, up to max_len
    assert conversation.size == 120 or len(tokens) == 40
    with pytest.raises(UsageError, match="clear it"):
        list(conversation.say("on the plain " * 9))
    conversation.clear()
    assert (
        conversation.messages == []
        and answered(conversation, "the rain")[0] == before[1]["content"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"raw": True}, "unknown option 'raw'"),
        ({"verifier": "hope"}, "unknown verifier"),
    ],
)
def test_a_bad_option_loses_nothing(
    lm: SpeculativeLM, options: dict[str, Any], message: str
) -> None:
    conversation = Conversation(lm, temperature=0, max_tokens=9)
    answered(conversation, "the rain")
    with pytest.raises(UsageError, match=message):
        list(conversation.say("in spain", **options))
    assert len(conversation.messages) == 2
    goes_on(lm, conversation)
    assert conversation.reading.reused > 0


def test_a_failure_loses_nothing(lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first round nothing is kept; later the text is. The row is read again."""
    conversation = Conversation(lm, temperature=0, max_tokens=30)
    answered(conversation, "the rain")
    score = CausalTarget.score
    for rounds, messages in ((0, 2), (2, 4)):
        left = [rounds]

        def fails(*arguments: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("out of everything")
            return score(*arguments)

        monkeypatch.setattr(CausalTarget, "score", fails)
        with pytest.raises(RuntimeError, match="out of everything"):
            list(conversation.say("falls mainly"))
        monkeypatch.undo()
        assert len(conversation.messages) == messages
    goes_on(lm, conversation)


def test_one_answer_at_a_time(lm: SpeculativeLM) -> None:
    conversation = Conversation(lm, max_tokens=9, seed=0)
    running = conversation.say("the rain")
    next(running)
    with pytest.raises(UsageError, match="still running"):
        next(conversation.say("in spain"))
    with pytest.raises(UsageError, match="still running"):
        conversation.clear()
    list(running)
    answered(conversation, "in spain")
    assert len(conversation.messages) == 4


def test_clearing_keeps_the_system_prompt_and_what_is_held_of_it(lm: SpeculativeLM) -> None:
    conversation = Conversation(lm, "be brief", temperature=0, max_tokens=9)
    first = answered(conversation, "the rain")
    conversation.clear()
    assert (
        conversation.messages == [{"role": "system", "content": "be brief"}]
        and conversation.size == 0
    )
    assert answered(conversation, "the rain") == first
    assert conversation.reading == Reading(
        conversation.reading.read, len(lm.render(conversation.messages[:2])) - 1, 0
    )


def test_another_way_of_drafting_reads_anew(lm: SpeculativeLM) -> None:
    conversation = Conversation(lm, temperature=0, max_tokens=9)
    answered(conversation, "the rain")
    messages = [*conversation.messages, {"role": "user", "content": "in spain"}]
    text = answered(conversation, "in spain", verifier="block")[0]
    assert (
        conversation.reading.reused == 0
        and text == lm.chat(messages, temperature=0, max_tokens=9).text
    )


def test_a_bad_option_of_all_answers_is_told_at_once(lm: SpeculativeLM) -> None:
    with pytest.raises(UsageError, match="unknown option 'rows'"):
        Conversation(lm, rows=3)


@pytest.fixture(scope="module")
def smollm() -> SpeculativeLM:
    import specdiff

    return specdiff.load("smollm2-135m", dtype="float32")


@pytest.mark.real
def test_the_real_one_reads_only_what_is_new(smollm: SpeculativeLM) -> None:
    conversation = Conversation(smollm, temperature=0, max_tokens=12, draft_len=3)
    turns: Sequence[str] = ("Name three rivers.", "And three lakes?", "Hello!")
    for text in turns:
        messages = [*conversation.messages, {"role": "user", "content": text}]
        held, read = conversation.size, conversation.reading.read
        out = answered(conversation, text)[0]
        alone = smollm.chat(messages, temperature=0, max_tokens=12, draft_len=3)
        assert out == alone.text and out
        assert conversation.reading.read - read == len(smollm.render(messages)) - max(held - 1, 0)
    assert conversation.reading.parted == 0
