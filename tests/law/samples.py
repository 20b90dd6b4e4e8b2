"""The drafters and the target of the law tests; the statistics are the conformance suite's own."""

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from transformers import LlamaConfig

import reference
from doubles import PointMasses, ToyDenoiser, ToyScorer
from specdiff.check.texts import Law, compare, texts, written
from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear
from specdiff.drafters.anyorder import AnyOrderDrafter
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.nn.causal import SmallCausalLM
from specdiff.targets.base import Target
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Round, SamplingParams, TargetInfo
from specdiff.verify import VERIFIERS, Verifier

__all__ = ["DENOISER", "DRAFTERS", "PAIRS", "TARGET", "causal_drafter", "compare", "fit", "last", "law", "texts", "written"]


def causal_drafter(info: TargetInfo, seed: int) -> AutoregressiveDrafter:
    """A random one-layer causal LM in float64, sharp enough that its tokens hang on those before them."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    network = SmallCausalLM(LlamaConfig(vocab_size=info.vocab_size, bos_token_id=None, eos_token_id=None, **sizes))
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
    "any": AnyOrderDrafter(ToyScorer(Absorbing(V), Loglinear(), seed=7), steps=2),
    "any of the uniform process": AnyOrderDrafter(ToyScorer(Uniform(V), Geometric(1e-3, 5.0), seed=8), steps=2, sampler="euler"),
}
PAIRS = [(drafter, verifier) for drafter in DRAFTERS for verifier in VERIFIERS]


def last(rounds: Iterable[Round]) -> Batch:
    """The batch as the last of the rounds left it."""
    return deque(rounds, maxlen=1)[0].batch


@lru_cache(maxsize=64)
def law(params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> Law:
    """Every text that TARGET may write, up to its stop id or max_tokens, with its chance, by the slow reference."""
    open_, ended = {(): 1.0}, {}
    for _ in range(params.max_tokens):
        grown = {}
        for text, chance in open_.items():
            before, anchor = [0, *prompt, *text][-2:]
            for token, p in enumerate(reference.law(TARGET.table[before, anchor].tolist(), prompt, text, params)):
                if p > 0:
                    (ended if token in params.stop_token_ids else grown)[(*text, token)] = chance * p
        open_ = grown
    return ended | open_


@lru_cache(maxsize=256)
def fit(target: Target[Any], drafter: Drafter[Any], verifier: Verifier, params: SamplingParams, count: int = 100_000) -> float:
    """p of the G-test of `count` texts against the law they should have."""
    return compare(texts(target, drafter, verifier, params, count=count), law(params))
