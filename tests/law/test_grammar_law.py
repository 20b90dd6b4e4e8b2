"""Texts under a grammar have the law of plain constrained decoding, whatever drafts or verifies.

The target has four tokens, a, b, c and the end. The reference masks its table by the words of a
finite language and renormalizes, one token at a time. Planted bugs are found.
"""

import itertools
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="the structured extra is not installed")
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper  # type: ignore[attr-defined]

import reference
from doubles import PointMasses, ToyDenoiser
from specdiff import decode, grammar_rows, verify
from specdiff.check.goodness_of_fit import compare, written
from specdiff.drafters.base import NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.tree import TreeDrafter
from specdiff.engine import Request, run
from specdiff.errors import TargetError
from specdiff.grammar import Grammar
from specdiff.grammar_rows import GrammarRows
from specdiff.noise import Noise, Purpose
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Draft, SamplingParams, Verification
from specdiff.verify import VERIFIERS

LETTERS = "abc"
END = 3
V = 4
REGEX = "a(b|cc|ca)*b?|ba"
MOST = 5
TARGET = TableTarget.random(V, seed=11)
DENOISER = ToyDenoiser(V, seed=12)
DRAFTERS: dict[str, Any] = {
    "none": NoDrafter(),
    "one-shot": DenoisingDrafter(DENOISER),
    "left-to-right": DenoisingDrafter(DENOISER, steps=2),
    "point": PointMasses(V),
}
PAIRS = [(d, v) for d, v in itertools.product(DRAFTERS, VERIFIERS) if d != "none" or v == "token"]
TREE = TreeDrafter(DENOISER, 8)
PASSES = 1e-3 / (2 * len(PAIRS))
CAUGHT = 1e-6
PARAMS = {
    "T=1": SamplingParams(max_tokens=MOST, stop_token_ids=(END,)),
    "T=0.7, penalized": SamplingParams(
        max_tokens=MOST, stop_token_ids=(END,), temperature=0.7, repetition_penalty=1.5, top_p=0.9
    ),
}


class Letters:
    """A tokenizer of three letters, as llguidance wants it."""

    eos_token_id = END
    bos_token_id = None
    tokens = (b"a", b"b", b"c", b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        characters = text.decode() if isinstance(text, bytes) else text
        return [LETTERS.index(c) for c in characters if c in LETTERS]


TOKENIZER = LLTokenizer(TokenizerWrapper(Letters()), eos_token=[END])


def grammar(regex: str = REGEX, tokenizer: Any = TOKENIZER) -> Grammar:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_regex(regex))
    assert not matcher.is_error(), matcher.get_error()
    return Grammar(matcher, 1)


WORDS = {
    "".join(word)
    for length in range(1, MOST + 4)
    for word in itertools.product(LETTERS, repeat=length)
    if re.fullmatch(REGEX, "".join(word))
}


def allowed(text: Sequence[int]) -> list[bool]:
    """Which tokens may follow, by the words of the language."""
    spelled = "".join(LETTERS[i] for i in text)
    following = [any(word.startswith(spelled + letter) for word in WORDS) for letter in LETTERS]
    return [*following, spelled in WORDS]


def law(params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> dict[tuple[int, ...], float]:
    """Every text to its end or max_tokens, with its chance under plain constrained decoding."""
    texts: dict[tuple[int, ...], float] = {}
    open_ = {(): 1.0}
    while open_:
        text, chance = open_.popitem()
        if len(text) == params.max_tokens or (text and text[-1] == END):
            texts[text] = texts.get(text, 0) + chance
            continue
        before, last = [0, *prompt, *text][-2:]
        mask = torch.tensor(allowed(text))
        logits = TARGET.table[before, last].masked_fill(~mask, -torch.inf).tolist()
        for token, p in enumerate(reference.law(logits, prompt, text, params)):
            if p:
                open_[(*text, token)] = chance * p
    return texts


def sample(
    drafter: Any, verifier: str, params: SamplingParams, count: int = 40_000
) -> torch.Tensor:
    parts = []
    for first in range(0, count, 1000):
        batch = Batch.of(
            [[1]] * 1000,
            [params] * 1000,
            range(first, first + 1000),
            grammars=[grammar()] * 1000,
        )
        rounds = decode.decode(TARGET, drafter, batch, verifier=VERIFIERS[verifier])
        parts.append(written(deque(rounds, maxlen=1)[0].batch))
    return torch.cat(parts)


def test_the_reference_is_a_law_and_the_grammar_bites() -> None:
    for params in PARAMS.values():
        assert sum(law(params).values()) == pytest.approx(1, abs=1e-12)
    assert len(law(PARAMS["T=1"])) > 8
    assert (0, END) in law(PARAMS["T=1"])
    assert all(text[0] in (0, 1) for text in law(PARAMS["T=1"]))


@pytest.mark.parametrize("setting", PARAMS)
@pytest.mark.parametrize(("drafter", "verifier"), PAIRS)
def test_texts_have_the_law_of_plain_constrained_decoding(
    drafter: str, verifier: str, setting: str
) -> None:
    params = PARAMS[setting]
    texts = sample(DRAFTERS[drafter], verifier, params, 8000)
    assert compare(texts, law(params)) > PASSES


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_texts_are_the_most_likely_path(drafter: str) -> None:
    params = SamplingParams(max_tokens=MOST, temperature=0, stop_token_ids=(END,))
    (path,) = law(params)
    texts = sample(DRAFTERS[drafter], "token", params, 1000)
    assert {tuple(t for t in row if t >= 0) for row in texts.tolist()} == {path}


def test_rows_with_other_grammars_and_none_do_not_feel_each_other() -> None:
    params = PARAMS["T=1"]
    grammars = [grammar(), None, grammar("c*a"), None, grammar("b(a|b)c")]
    drafter = DRAFTERS["left-to-right"]
    together = Batch.of([[1]] * 5, [params] * 5, range(5), grammars=grammars)
    texts = written(deque(decode.decode(TARGET, drafter, together), maxlen=1)[0].batch)
    for row, one in enumerate(grammars):
        alone = Batch.of([[1]], [params], [row], grammars=[one])
        text = written(deque(decode.decode(TARGET, drafter, alone), maxlen=1)[0].batch)
        assert texts[row].tolist() == text[0].tolist()
        if row == 4:
            assert text[0].tolist()[0] == 1
            assert text[0].tolist()[2:4] == [2, END]


@pytest.mark.parametrize("verifier", ["token", "match-gumbel"])
@pytest.mark.parametrize("setting", PARAMS)
def test_texts_of_trees_have_the_law_of_plain_constrained_decoding(
    setting: str, verifier: str
) -> None:
    params = PARAMS[setting]
    assert compare(sample(TREE, verifier, params, 8000), law(params)) > PASSES


def test_rows_of_trees_with_other_grammars_do_not_feel_each_other() -> None:
    """Their trees have other numbers of lines."""
    params = PARAMS["T=1"]
    grammars = [grammar(), None, grammar("c*a"), grammar("b(a|b)c")]
    together = Batch.of([[1]] * 4, [params] * 4, range(4), grammars=grammars)
    texts = written(deque(decode.decode(TARGET, TREE, together), maxlen=1)[0].batch)
    for row, one in enumerate(grammars):
        alone = Batch.of([[1]], [params], [row], grammars=[one])
        text = written(deque(decode.decode(TARGET, TREE, alone), maxlen=1)[0].batch)
        assert texts[row].tolist() == text[0].tolist()


def test_a_tree_whose_nodes_have_the_masks_of_a_chain_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafted = GrammarRows.drafted
    monkeypatch.setattr(
        GrammarRows,
        "drafted",
        lambda self, draft: drafted(self, replace(draft, parents=None)),
    )
    with pytest.raises(TargetError, match="the grammar allows no token here"):
        sample(TREE, "match", PARAMS["T=1"], 4000)


# ---- planted bugs ----


class Late(GrammarRows):
    """BUG: position k has the mask of position k - 1."""

    def masked(self, logits: Any, drafts: Any) -> Any:
        full = self._fill(drafts)
        full[:, 1:] = full[:, :-1].copy()
        mask = grammar_rows.unpacked(full, logits.shape[2], logits.device)
        rows = torch.tensor(self.running, dtype=torch.long)
        return logits.index_copy(0, rows, logits[rows].masked_fill(~mask, -torch.inf))


class Forward(GrammarRows):
    """BUG: the matcher is not rolled back: it stays after the draft, accepted or not."""

    def masked(self, logits: Any, drafts: Any) -> Any:
        result = super().masked(logits, drafts)
        for row, draft in zip(self.running, drafts.lines[0], strict=True):
            self.matchers[row].inner.try_consume_tokens(draft)
        return result


class EarlyEnd(GrammarRows):
    """BUG: the text may end anywhere."""

    def _fill(self, drafts: Any) -> Any:
        return super()._fill(drafts) | (1 << END)


class FirstOnly(GrammarRows):
    """BUG: the mask of the committed text is used for the whole draft."""

    def _fill(self, drafts: Any) -> Any:
        full = super()._fill(drafts)
        full[:] = full[:, :1]
        return full


def plant(monkeypatch: pytest.MonkeyPatch, bug: type[GrammarRows]) -> None:
    start = decode.start

    def planted(*args: Any, **kwargs: Any) -> decode.DecodeState:
        run = start(*args, **kwargs)
        run.grammars = bug()
        return run

    monkeypatch.setattr(decode, "start", planted)


def caught() -> bool:
    params = PARAMS["T=1"]
    try:
        texts = sample(DRAFTERS["one-shot"], "token", params, 8000)
    except TargetError:  # a row was left without any token
        return True
    return compare(texts, law(params)) < CAUGHT


@pytest.mark.parametrize("bug", [Late, Forward, EarlyEnd, FirstOnly])
def test_planted_bugs_are_found(bug: type[GrammarRows], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, bug)
    assert caught()


@pytest.mark.parametrize("part", ["ratio", "residual"])
def test_a_mask_on_half_of_the_verification_is_found(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BUG: the ratio test, or the residual, has the target's distribution before the mask."""
    raw: list[torch.Tensor] = []

    class Remembers(GrammarRows):
        def masked(self, logits: Any, drafts: Any) -> Any:
            raw[:] = [logits]
            return super().masked(logits, drafts)

    def half_masked(draft: Draft, p: torch.Tensor, noise: Noise) -> Verification:
        unmasked = torch.softmax(raw[0], -1)
        ratio, rest = (unmasked, p) if part == "ratio" else (p, unmasked)
        thresholds = verify.token_plan(draft, ratio).thresholds
        plan = replace(verify.token_plan(draft, rest), thresholds=thresholds)
        passed = noise.uniform(Purpose.RATIO, draft.tokens.shape[1]) < plan.thresholds
        accepted = passed.long().cumprod(1).sum(1)
        return verify._emit(draft, accepted, verify._residual_token(plan, accepted, noise))

    plant(monkeypatch, Remembers)
    monkeypatch.setitem(VERIFIERS, "token", half_masked)
    assert caught()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_without_a_grammar_goes_on_when_the_last_grammar_has_left(rows: int) -> None:
    """Side by side, and one after the other in the same row, with plain rounds in between."""
    ends = SamplingParams(max_tokens=MOST, stop_token_ids=(END,))
    plain = Request([1], SamplingParams(max_tokens=20), 2)
    requests = [Request([1], ends, 1, grammar=grammar()), plain]

    def texts(requests: list[Request], draft_len: Any) -> dict[int, list[int]]:
        answers: dict[int, list[int]] = {}
        outputs = run(
            TARGET,
            PointMasses(V),
            requests,
            verifier=verify.match,
            draft_len=draft_len,
            rows=rows,
        )
        for output in outputs:
            answers.setdefault(output.request, []).extend(output.tokens)
        return answers

    lengths = itertools.cycle([3, 0])
    both = texts(requests, lambda last: next(lengths))
    assert both[1] == texts([plain], 3)[0]
    assert both[0] == texts(requests[:1], 3)[0]
