"""Draft lengths of single requests: limits, the rule's share in them, and reported drafts."""

import pytest

import tiny
from specdiff import catalog, engine
from specdiff.engine import Request
from specdiff.errors import UsageError
from specdiff.types import Round, SamplingParams
from specdiff.verify import token

TARGET = tiny.target("llama")
DRAFTER = tiny.drafter(TARGET.info, steps=1)
PARAMS = SamplingParams(max_tokens=12)


class Rule:
    """Always 3; remembers which rounds it was shown."""

    def __init__(self) -> None:
        self.rounds: list[Round | None] = []

    def __call__(self, last: Round | None) -> int:
        self.rounds.append(last)
        return 3


def lengths(requests: list[Request], rule: Rule, rows: int = 8) -> list[dict[int, int]]:
    """The drafted tokens of each request, by round."""
    steps = engine.serve(TARGET, DRAFTER, requests, verifier=token, draft_len=rule, rows=rows)
    return [{output.request: output.drafted for output in step.outputs()} for step in steps]


def request(seed: int, draft_len: int | None, **options: bool) -> Request:
    return Request([1, 2, seed], PARAMS, seed, draft_len=draft_len, **options)


def test_requests_that_all_have_a_length_need_no_rule() -> None:
    rule = Rule()
    rounds = lengths([request(0, 2), request(1, 0), request(2, 1)], rule)
    assert rule.rounds == []
    assert rounds[0] == {0: 2, 1: 0, 2: 1}
    assert len(rounds) == 12  # the plain one takes a round for each token


def test_a_plain_request_alone_runs_plain_rounds() -> None:
    steps = engine.serve(TARGET, DRAFTER, [request(0, 0)], verifier=token, draft_len=Rule(), rows=1)
    assert [step.round.draft.tokens.shape[1] for step in steps] == [0] * 12


def test_next_to_a_request_without_a_length_the_rule_decides() -> None:
    rule = Rule()
    rounds = lengths([request(0, None), request(1, 1), request(2, 8)], rule)
    assert rounds[0] == {0: 3, 1: 1, 2: 3}


def test_a_rule_is_not_shown_rounds_of_other_lengths() -> None:
    rule = Rule()
    lengths([request(0, None), request(1, 2), request(2, None)], rule, rows=1)
    starts = [index for index, last in enumerate(rule.rounds) if last is None]
    assert starts[0] == 0 and len(starts) == 2  # at first, and after request 1


@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_outside_the_drafters_is_refused(length: int) -> None:
    assert DRAFTER.draft_len == 8
    with pytest.raises(UsageError, match=r"draft_len must be in \[0, 8\], not") as error:
        lengths([request(0, length)], Rule())
    assert error.value.param == "draft_len"


def test_drafts_are_reported_where_requested() -> None:
    requests = [
        request(0, None, with_drafts=True),
        request(1, None),
        request(2, 1, with_drafts=True),
    ]
    steps = engine.serve(TARGET, DRAFTER, requests, verifier=token, draft_len=3)
    for step in steps:
        for output in step.outputs():
            if output.request == 1:
                assert output.draft == []
                continue
            assert len(output.draft) == output.drafted
            assert output.draft[: output.accepted] == output.tokens[: output.accepted]
            if output.accepted < min(output.drafted, len(output.tokens)):
                assert output.draft[output.accepted] != output.tokens[output.accepted]


def test_a_target_without_drafter_takes_0_only() -> None:
    none = catalog.drafter("none", TARGET.info, {})
    run = engine.run(TARGET, none, [request(0, 0)], verifier=token, draft_len=0)
    assert sum(len(output.tokens) for output in run) == 12
    with pytest.raises(UsageError, match="draft_len"):
        list(engine.run(TARGET, none, [request(0, 1)], verifier=token, draft_len=0))
