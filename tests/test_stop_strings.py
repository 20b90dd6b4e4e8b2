"""Stop strings: an exact cut however text is split, drafted or batched; none is ever shown."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from specdiff import SpeculativeLM
from specdiff.errors import UsageError
from specdiff.text.detokenizer import Detokenizer, StopStrings
from test_lm import END, VOCAB, scripted, tokenizer  # noqa: F401

letters = st.text("ab\u00e9🦊", max_size=14)
few_stops = st.lists(st.text("ab\u00e9🦊", min_size=1, max_size=4), min_size=1, max_size=3)


def cut(text: str, stops: Sequence[str], include: bool = False) -> tuple[str, bool]:
    """Character by character: stop where one is complete, at the longest of those."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end if include else end - max(map(len, whole))], True
    return text, False


@given(pieces=st.lists(letters, max_size=6), stops=few_stops, include=st.booleans())
def test_any_pieces_are_cut_alike(pieces: list[str], stops: list[str], include: bool) -> None:
    held, output = StopStrings(stops, include=include), ""
    want, complete = cut("".join(pieces), stops, include)
    for piece in pieces:
        output += held.add(piece)
        assert want.startswith(output)
    assert (output + held.finish(), held.complete) == (want, complete)


@given(data=st.binary(max_size=24), stops=few_stops)
def test_half_characters_hide_no_stop(data: bytes, stops: list[str]) -> None:
    """Bytes as tokens: each character counts at the token that completes it."""
    text = Detokenizer(lambda ids: bytes(ids).decode(errors="replace"), StopStrings(stops))
    output, used = "", 0
    for token in data:
        if text.stopped:
            break
        output, used = output + text.add(token), used + 1
    output += text.finish()
    assert (output, text.stopped) == cut(data.decode(errors="replace"), stops)
    if text.stopped and used < len(data):
        assert cut(data[: used - 1].decode(errors="replace"), stops)[1] is False


def test_the_first_complete_one_counts_and_of_those_the_longest() -> None:
    for stops, text, want in [
        (["b", "abc"], "xabc", "xa"),
        (["bc", "abc"], "xabc", "x"),
        (["c", "d"], "abdc", "ab"),
    ]:
        assert StopStrings(stops).add(text) == want


@settings(max_examples=40, deadline=None)
@given(
    text=st.text("abn \u00e9🦊日", min_size=1, max_size=20),
    stops=st.lists(st.text("abn \u00e9🦊日", min_size=1, max_size=3), min_size=1, max_size=3),
    draft_len=st.integers(1, 6),
    include=st.booleans(),
)
def test_streams_join_to_the_text(
    tokenizer: Any, text: str, stops: list[str], draft_len: int, include: bool
) -> None:
    answer = tokenizer(text)["input_ids"]
    model = scripted(tokenizer, [40], [*answer, END], flaw=3)
    options: dict[str, Any] = {
        "max_tokens": 90,
        "temperature": 0,
        "draft_len": draft_len,
        "stop": stops,
        "include_stop": include,
    }
    out, pieces = model.generate([40], **options), list(model.stream([40], **options))
    want, complete = cut(text, stops, include)
    assert "".join(p.text for p in pieces) == out.text == want
    last = pieces[-1].generation
    assert (last.text, last.token_ids, last.accepted, last.finish_reason) == (
        want,
        out.token_ids,
        out.accepted,
        "stop",
    )
    assert len(out.token_ids) == len(out.accepted) == out.stats.tokens
    assert out.stats.accepted == sum(out.accepted)
    if complete:  # the tokens end with the one that completed it
        assert cut(tokenizer.decode(out.token_ids), stops)[1]
        assert not cut(tokenizer.decode(out.token_ids[:-1]).rstrip("\ufffd"), stops)[1]
    else:
        assert out.token_ids == [*answer, END]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_stop_each_on_their_own_and_are_free_at_once(tokenizer: Any, rows: int) -> None:
    answer = tokenizer("the rain in spain falls mainly on the plain")["input_ids"]
    model = scripted(tokenizer, [40], [*answer, END])
    outs = model.generate(
        [[40], [40, *answer[:6]], [40, *answer[:2]]],
        max_tokens=60,
        temperature=0,
        draft_len=5,
        stop="mainly",
        rows=rows,
    )
    whole = [tokenizer.decode(answer[n:]) for n in (0, 6, 2)]
    assert [o.text for o in outs] == [text.split("mainly")[0] for text in whole]
    assert {o.finish_reason for o in outs} == {"stop"}
    alone = model.generate([40], max_tokens=60, temperature=0, draft_len=5, stop="mainly")
    assert (alone.token_ids, alone.stats.rounds) == (outs[0].token_ids, outs[0].stats.rounds)
    assert (
        alone.stats.rounds
        < model.generate([40], max_tokens=60, temperature=0, draft_len=5).stats.rounds
    )


def test_without_a_tokenizer_there_is_no_text_to_stop_at() -> None:
    target = tiny.target("gpt2", vocab=VOCAB)
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        SpeculativeLM(target, "none", None, 64).generate([1], stop="a")
