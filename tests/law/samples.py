"""The drafters and the target of the law tests; the statistics are the conformance suite's own."""

import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from transformers import LlamaConfig

import reference
from doubles import PointMasses, ToyDenoiser, ToyScorer
from specdiff import engine
from specdiff.check.goodness_of_fit import Law, compare, texts, written
from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.nn.small_lm import SmallLM
from specdiff.targets.base import Target
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Round, SamplingParams, TargetInfo
from specdiff.verify import VERIFIERS, Verifier

__all__ = [
    "DENOISER", "DRAFTERS", "PAIRS", "TARGET", "causal_drafter", "compare", "conversations",
    "conversations_law", "fit", "last", "law", "texts", "written",
]  # fmt: skip


def causal_drafter(info: TargetInfo, seed: int) -> AutoregressiveDrafter:
    """A random one-layer causal LM in float64, sharp enough to depend on its context."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    network = SmallLM(
        LlamaConfig(vocab_size=info.vocab_size, bos_token_id=None, eos_token_id=None, **sizes)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=1.0)
    return AutoregressiveDrafter(network.double(), info, draft_len=3)


V = 3
TARGET = TableTarget.random(V, seed=4)
DENOISER = ToyDenoiser(V, seed=5)
DRAFTERS: dict[str, Drafter[Any]] = {
    "none": NoDrafter(),
    "one-shot": DenoisingDrafter(DENOISER),
    "left-to-right": DenoisingDrafter(DENOISER, steps=2),
    "point": PointMasses(V),
    "autoregressive": causal_drafter(TARGET.info, seed=6),
    "ngram": NGramDrafter(TARGET.info, longest=2),
    "hot": DenoisingDrafter(DENOISER, steps=2, hot_start=0.5),
    "hot canvas": DenoisingDrafter(DENOISER, steps=2, hot_start="canvas"),
    "any": AnyOrderDrafter(ToyScorer(Absorbing(V), Loglinear(), seed=7), steps=2),
    "any of the uniform process": AnyOrderDrafter(
        ToyScorer(Uniform(V), Geometric(1e-3, 5.0), seed=8), steps=2, sampler="euler"
    ),
}
PAIRS = list(itertools.product(DRAFTERS, VERIFIERS))


def last(rounds: Iterable[Round]) -> Batch:
    """The batch as the last of the rounds left it."""
    return deque(rounds, maxlen=1)[0].batch


@lru_cache(maxsize=64)
def law(params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> Law:
    """Every text of TARGET, to its stop id or max_tokens, with its chance, by the reference."""
    open_ = {(): 1.0}
    ended = {}
    for _ in range(params.max_tokens):
        grown = {}
        for text, chance in open_.items():
            before, anchor = [0, *prompt, *text][-2:]
            for token, p in enumerate(
                reference.law(TARGET.table[before, anchor].tolist(), prompt, text, params)
            ):
                if p > 0:
                    (ended if token in params.stop_token_ids else grown)[(*text, token)] = (
                        chance * p
                    )
        open_ = grown
    return ended | open_


@lru_cache(maxsize=256)
def fit(
    target: Target[Any],
    drafter: Drafter[Any],
    verifier: Verifier,
    params: SamplingParams,
    count: int = 100_000,
) -> float:
    """p of the G-test of `count` texts against the law they should have."""
    return compare(texts(target, drafter, verifier, params, count=count), law(params))


FIRST = SamplingParams(max_tokens=3, stop_token_ids=(2,))
SECOND = SamplingParams(max_tokens=2)


def conversations(
    target: Target[Any], drafter: Drafter[Any], verifier: Verifier, count: int
) -> tuple[list[tuple[int, ...]], int]:
    """Two answers each: to [1], and to all of that followed by a 0.

    The second request may reuse a prefix that its row holds; also returns the number of reused
    prompt tokens.
    """
    second: deque[engine.Request] = deque()
    opened = 0
    reused = 0
    texts = defaultdict(list)

    def stream() -> Iterator[engine.Request | None]:
        nonlocal opened
        while opened < count or second or len(texts) < count:
            if second:
                yield second.popleft()
            elif opened < count:
                opened += 1
                yield engine.Request([1], FIRST, opened)
            else:
                yield None

    for turn in engine.serve(
        target, drafter, stream(), verifier=verifier, draft_len=drafter.draft_len, rows=200, slots=8
    ):
        slots = [slot for row in turn.ended if (slot := turn.slots[row]) is not None]
        reused += sum(slot.reused for slot in slots)
        seeds = [slot.request.seed for slot in slots]
        for seed, (_, ids, prompt) in zip(seeds, turn.finished(), strict=True):
            if prompt == 1:
                second.append(engine.Request([*ids.tolist(), 0], SECOND, seed + count))
            else:
                texts[seed - count] = ids.tolist()[1:]
    return [tuple(text) for text in texts.values()], reused


def conversations_law() -> Law:
    """Both answers and the 0 between them, for a target of the sum of all tokens and the last."""
    chance = TARGET.table.softmax(-1)

    def mass(text: tuple[int, ...], tail: tuple[int, ...]) -> float:
        result = 1.0
        for token in tail:
            result *= float(chance[sum(text[:-1]) % V, text[-1], token])
            text += (token,)
        return result

    firsts = []
    for n in (1, 2, 3):
        for text in itertools.product(range(V), repeat=n):
            if 2 not in text[:-1] and (n == 3 or text[-1] == 2):
                firsts.append(text)
    pairs = itertools.product(firsts, itertools.product(range(V), repeat=2))
    return {(*one, 0, *two): mass((1,), one) * mass((1, *one, 0), two) for one, two in pairs}
