"""Many texts from the real loop, the exact law of such texts, and the test that compares the two.

Shapes: N texts, L tokens at most. A text ends behind its first stop id; PADDING fills what follows.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor
from transformers import LlamaConfig

import reference
from doubles import PointMasses, ToyDenoiser, ToyScorer, tile
from specdiff import decode
from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear
from specdiff.drafters.anyorder import AnyOrderDrafter
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.nn.causal import SmallCausalLM
from specdiff.sampling import probabilities
from specdiff.targets.base import Target
from specdiff.targets.table import TableTarget
from specdiff.types import PADDING, Batch, Params, Round, SamplingParams, TargetInfo
from specdiff.verify import VERIFIERS, Verifier


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
Law = dict[tuple[int, ...], float]


def texts(
    target: Target[Any],
    drafter: Drafter[Any],
    verifier: Verifier,
    params: SamplingParams,
    *,
    count: int = 100_000,
    rows: int = 20_000,
    token: int = 1,
    draft_len: int = 3,
    seed: int = 0,
) -> Int[Tensor, "N L"]:
    """`count` continuations of a one-token prompt, by hand-written rounds of `decode.step`.

    A one-token prompt leaves nothing to admit, and admitting 1e5 rows one by one would take longer than decoding them;
    `test_reproducible` shows that `decode.decode` and the engine give the same tokens.
    """
    found = []
    one = Batch.of([[token]], [params], [0])
    for first in range(0, count, rows):
        batch = replace(tile(one, rows), seed=torch.arange(first, first + rows) + (seed << 32))
        run = decode.start(target, drafter, batch, verifier=verifier, slots=params.max_tokens + draft_len + 2)
        while not bool(run.batch.done.all()):
            decode.step(run, draft_len if drafter.draft_len else 0)
        found.append(written(run.batch))
    return torch.cat(found)


def written(batch: Batch) -> Int[Tensor, "N L"]:
    """What each row of a batch holds behind its prompt (one length for all)."""
    start = int(batch.prompt_length[0])
    assert bool((batch.prompt_length == start).all())
    index = torch.arange(batch.ids.shape[1])
    return torch.where(index < batch.length[:, None], batch.ids, PADDING)[:, start : int(batch.params.limit[0])]


def last(rounds: Iterable[Round]) -> Batch:
    """The batch as the last of the rounds left it."""
    return deque(rounds, maxlen=1)[0].batch


@lru_cache(maxsize=64)
def law(params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> Law:
    """Every text that TARGET may write, up to its stop id or max_tokens, with its chance; penalties by the slow reference."""
    open_, ended = {(): 1.0}, {}
    for _ in range(params.max_tokens):
        grown = {}
        for text, chance in open_.items():
            before, anchor = [0, *prompt, *text][-2:]
            logits = reference.adjusted(TARGET.table[before, anchor].tolist(), prompt, text, params)
            row = torch.tensor(logits, dtype=torch.float64).view(1, 1, V)
            for token, p in enumerate(probabilities(row, Params.stack([params], torch.tensor([0])))[0, 0].tolist()):
                if p > 0:
                    (ended if token in params.stop_token_ids else grown)[(*text, token)] = chance * p
        open_ = grown
    return ended | open_


def compare(found: Int[Tensor, "N L"] | Sequence[Sequence[int]], expected: Law) -> float:
    """p of the G-test; texts expected fewer than five times share a cell, and a text that cannot occur gives 0."""
    counts = _count(found) if isinstance(found, Tensor) else Counter(map(tuple, found))
    total = sum(counts.values())
    if not counts.keys() <= expected.keys():
        return 0.0
    cells = [(counts[text], total * chance) for text, chance in expected.items() if total * chance >= 5]
    rest = (total - sum(n for n, _ in cells), total - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    seen, wanted = zip(*cells, strict=True)
    scale = sum(seen) / sum(wanted)  # a rest too small for a cell is left out of both
    return float(stats.power_divergence(seen, [e * scale for e in wanted], lambda_="log-likelihood").pvalue)


def _count(found: Int[Tensor, "N L"]) -> Counter[tuple[int, ...]]:
    place = (V + 1) ** torch.arange(found.shape[1])
    codes, counts = ((found - PADDING) * place).sum(1).unique(return_counts=True)
    rows = (codes[:, None] // place % (V + 1) + PADDING).tolist()
    return Counter({tuple(t for t in row if t != PADDING): n for row, n in zip(rows, counts.tolist(), strict=True)})


@lru_cache(maxsize=256)
def fit(target: Target[Any], drafter: Drafter[Any], verifier: Verifier, params: SamplingParams, count: int = 100_000) -> float:
    """p of the G-test of `count` texts against the law they should have."""
    return compare(texts(target, drafter, verifier, params, count=count), law(params))
