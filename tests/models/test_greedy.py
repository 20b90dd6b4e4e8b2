"""L3: greedy speculative text is the target's own greedy text, token for token, in fp32."""

import itertools

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

import tiny
from specdiff.drafters.base import NoDrafter
from specdiff.verify import VERIFIERS

NEW = 24
LENGTHS = (1, 4, 8, 16, 40)
GAP = 1e-4  # two logits closer than this may change places by rounding


def flips(net: PreTrainedModel, got: list[list[int]], want: list[list[int]]) -> int:
    """How many rows part from `want`, all at near-ties; a row that parts elsewhere fails."""
    count = 0
    for ours, theirs in zip(got, want, strict=True):
        if ours == theirs:
            continue
        first = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
        with torch.no_grad():
            best = net(torch.tensor([theirs[:first]])).logits[0, -1].topk(2).values
        assert best[0] - best[1] < GAP, (
            f"parted at {first} of {len(theirs)}, gap {best[0] - best[1]:.2e}"
        )
        count += 1
    return count


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(
    request: pytest.FixtureRequest,
) -> tuple[PreTrainedModel, object, list[list[int]], list[list[int]]]:
    """An untouched model, a target of the same weights, eight prompts, their greedy texts."""
    net = tiny.model(request.param)
    prompts = tiny.prompts(8)
    texts = [tiny.plain(net, p, NEW) for p in prompts]
    assert sum(len(set(text[-NEW:])) for text in texts) > 3 * len(texts)  # not one token for ever
    return net, tiny.target(request.param), prompts, texts


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_random_drafter(pair: tuple, steps: int, rows: int) -> None:
    net, target, prompts, texts = pair
    drafters = [
        tiny.drafter(target.info, steps=steps),
        tiny.drafter(target.info, steps=steps, **tiny.CACHED),
    ]
    parted = 0
    for i, draft_len in enumerate(LENGTHS):
        part = slice(i, i + rows) if rows == 1 else slice(0, rows)
        got = tiny.decoded(
            target,
            drafters[i % 2],
            tiny.batch_of(prompts[part], NEW, temperature=0.0),
            draft_len=draft_len,
        )
        parted += flips(net, got, texts[part])
    assert parted <= 1


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_drafter_that_is_mostly_right(pair: tuple, verifier: str) -> None:
    """Long accepted prefixes, drafts cut by the limit, rejections in between; every verifier."""
    net, target, prompts, texts = pair
    parted = 0
    for draft_len in LENGTHS:
        for flaw in (3, 1000):
            batch = tiny.batch_of(prompts, NEW, temperature=0.0)
            got = tiny.decoded(
                target,
                tiny.Hinted(texts, tiny.VOCAB, flaw),
                batch,
                draft_len=draft_len,
                verifier=VERIFIERS[verifier],
            )
            parted += flips(net, got, texts)
    assert parted <= 1


def test_no_drafter(pair: tuple) -> None:
    net, target, prompts, texts = pair
    got = tiny.decoded(target, NoDrafter(), tiny.batch_of(prompts, NEW, temperature=0.0))
    assert flips(net, got, texts) <= 1


def test_up_to_the_last_position(pair: tuple) -> None:
    """Drafts past the model's last position are clamped: the text runs exactly up to it."""
    net, target, _, _ = pair
    limit = target.info.max_positions
    prompt = torch.randint(
        tiny.VOCAB, (limit - 12,), generator=torch.Generator().manual_seed(7)
    ).tolist()
    text = tiny.plain(net, prompt, 12)
    for draft_len in (3, 16):
        for flaw in (4, 1000):
            batch = tiny.batch_of([prompt, prompt[:-5]], 12, temperature=0.0)
            got = tiny.decoded(
                target,
                tiny.Hinted([text, tiny.plain(net, prompt[:-5], 12)], tiny.VOCAB, flaw),
                batch,
                draft_len=draft_len,
            )
            assert flips(net, got[:1], [text]) == 0
            assert len(got[0]) == limit


class Counts(LogitsProcessor):
    """OpenAI's penalties, which transformers lacks: on the answer alone."""

    def __init__(self, start: int, presence: float, frequency: float) -> None:
        self.start, self.presence, self.frequency = start, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.nn.functional.one_hot(input_ids[:, self.start :], scores.shape[-1]).sum(1)
        return scores - self.frequency * counts - self.presence * (counts > 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_penalties_and_bias_are_those_of_transformers(family: str) -> None:
    """`generate`'s greedy text with its own processors, by right, wrong and untrained drafters."""
    net, target, prompts = tiny.model(family), tiny.target(family), tiny.prompts(4)
    bias = {3: -4.0, 7: 6.0, 20: 3.0}
    options = {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.9,
        "frequency_penalty": 0.5,
        "logit_bias": tuple(bias.items()),
    }
    theirs = {"repetition_penalty": 1.4, "sequence_bias": {(i,): v for i, v in bias.items()}}
    texts = [
        tiny.plain(net, p, NEW, logits_processor=[Counts(len(p), 0.9, 0.5)], **theirs)
        for p in prompts
    ]
    assert texts != [tiny.plain(net, p, NEW) for p in prompts]
    drafters = [
        NoDrafter(),
        tiny.drafter(target.info, steps=2, **tiny.CACHED),
        tiny.Hinted(texts, tiny.VOCAB, 3),
        tiny.Hinted(texts, tiny.VOCAB, 99),
    ]
    for drafter in drafters:
        for draft_len in (1, 4, 9) if drafter.draft_len else (None,):
            for verifier in ("block", "match"):
                batch = tiny.batch_of(prompts, NEW, temperature=0.0, **options)
                assert (
                    tiny.decoded(
                        target, drafter, batch, draft_len=draft_len, verifier=VERIFIERS[verifier]
                    )
                    == texts
                )
