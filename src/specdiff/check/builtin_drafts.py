"""The drafters of this library, tiny and random, as recipes: every draft they can produce, with its
chance.

Where each position takes one uniform, the edges at which its token changes are computed by
bisection, so chances are those of the code and not the ones it reports. Where it takes several (any
order, several passes), drafts are drawn instead, and the distance has an error.

Shapes: D drafts, R rows, K drafted positions, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig

from specdiff.check.constructions import Drafts, K, V
from specdiff.check.goodness_of_fit import tile
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.base import Drafter
from specdiff.drafters.block import BlockDrafter
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.nn.block import BlockConfig, BlockNetwork
from specdiff.nn.ddit import SEDD
from specdiff.nn.sedd_config import SEDDConfig
from specdiff.nn.small_lm import SmallLM
from specdiff.noise import Noise, Purpose
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetInfo

INFO = TargetInfo("law", V, V, 1, 1 << 30, torch.float64, torch.device("cpu"))
PROMPT = [0, 1, 2, 0, 1, 2]
HALVINGS = 52
NOTHING = 1e-14  # width that halving leaves to a token that is never drawn
ALARM = 1e-6  # the chance that a stated error is exceeded
Build = Callable[[int], Drafter[Any]]
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class FixedNoise:
    """Noise whose uniforms are given: one a position."""

    values: Float[Tensor, "R K"]

    def uniform(self, purpose: Purpose, n: int, index: int = 0) -> Float[Tensor, "R K"]:
        assert purpose is Purpose.DRAFT and index == 0 and n == self.values.shape[1]
        return self.values


def _random(network: Net, seed: int) -> Net:
    """Every parameter random, so that tokens depend on those around them, and none is certain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * _spread(name, parameter)
            parameter.copy_(values + ("norm" in name))
    return network.double().eval()


def _spread(name: str, parameter: Tensor) -> float:
    if "embed" in name:
        return 1.0
    return 0.5 if parameter.dim() == 1 else 1.2 / float(parameter.shape[-1]) ** 0.5


def _sedd(seed: int, **changes: Any) -> SEDDDenoiser:
    config = SEDDConfig(tokens=V, hidden_size=8, n_blocks=1, n_heads=2, cond_dim=4, length=16)
    network = _random(SEDD(replace(config, **changes)), seed)
    return SEDDDenoiser(network, INFO, window=4, draft_len=K)


def _causal(seed: int) -> AutoregressiveDrafter:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(vocab_size=V, bos_token_id=None, eos_token_id=None, **sizes)
    return AutoregressiveDrafter(_random(SmallLM(config), seed), INFO, draft_len=K)


def _block(seed: int) -> BlockDrafter:
    """Tables of its own, since the target has none; its context is drawn in `propose`."""
    config = BlockConfig(
        tokens=V,
        hidden_size=8,
        layers=1,
        heads=2,
        key_value_heads=1,
        head_dim=4,
        intermediate_size=8,
        block_size=K,
        mask_token_id=0,
        taps=(0,),
        markov_rank=4,
        own_embedding=True,
        own_head=True,
    )
    network = _random(BlockNetwork(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for table in (network.embedding, network.head):
        table.copy_(torch.randn(table.shape, generator=generator))
    info = replace(INFO, hidden_size=8)
    return BlockDrafter(network, info)


def _cascade(seed: int, shortest: int) -> CascadeDrafter:
    """The last 3 tokens of the prompt repeat, so that it is looked up unless `shortest` is more."""
    inner = DenoisingDrafter(_sedd(seed), steps=2)
    return CascadeDrafter(INFO, inner, longest=shortest, shortest=shortest)


# name -> the drafter by seed, and whether one uniform a position is all its chance
DRAFTERS: dict[str, tuple[Build, bool]] = {
    "sedd, one pass": (lambda seed: DenoisingDrafter(_sedd(seed)), True),
    "sedd, 2 passes left to right": (lambda seed: DenoisingDrafter(_sedd(seed), steps=2), True),
    "sedd, 3 passes left to right": (lambda seed: DenoisingDrafter(_sedd(seed), steps=3), True),
    "sedd, 2 passes in any order (point masses)": (
        lambda seed: AnyOrderDrafter(_sedd(seed), steps=2),
        False,
    ),
    "sedd of the uniform process, 2 passes (point masses)": (
        lambda seed: AnyOrderDrafter(_sedd(seed, process="uniform", schedule="geometric"), steps=2),
        False,
    ),
    "autoregressive": (_causal, True),
    "block with a Markov head": (_block, True),
    "ngram": (lambda seed: NGramDrafter(INFO, longest=2), True),
    "cascade, where the text repeats": (lambda seed: _cascade(seed, shortest=3), True),
    "cascade, elsewhere: sedd, 2 passes": (lambda seed: _cascade(seed, shortest=4), True),
}


def propose(drafter: Drafter[Any], rows: int, noise: Noise | None = None) -> Draft:
    """First drafts after the same prompt, one for each row of the noise.

    None: each row has noise of its own.
    """
    one = Batch.of([PROMPT], [SamplingParams()], [0], slots=32)
    batch = replace(tile(one, rows), seed=torch.arange(rows))
    features = None
    if drafter.taps:  # the same hidden states in every row
        shape = (1, len(PROMPT) - 1, 8 * len(drafter.taps))
        draws = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        features = draws.expand(rows, -1, -1)
    context = Context(batch, features, batch.length - 1, None)
    state = drafter.open(rows, 32)
    drafter.admit(state, context, torch.arange(rows))
    with torch.inference_mode():
        return drafter.propose(context, state, noise or Noise.of(batch), K)


def enumerated(drafter: Drafter[Any]) -> Drafts:
    """Every draft with its chance, from the edges of its draws.

    The drafter must take its tokens in the order of their ids.
    """
    drafts = partial(_with_uniforms, drafter)
    middles = torch.full((1, K), 0.5, dtype=torch.float64)
    widths = torch.ones(1, dtype=torch.float64)
    for k in range(K):
        edges = _edges(drafts, middles, k)
        chance = edges.diff(dim=1)
        grown = middles[:, None].repeat(1, V, 1)
        grown[..., k] = (edges[:, 1:] + edges[:, :-1]) / 2
        possible = (chance > NOTHING).flatten()
        middles = grown.flatten(0, 1)[possible]
        widths = (widths[:, None] * chance).flatten()[possible]
    return Drafts(drafts(middles), widths)


def _with_uniforms(drafter: Drafter[Any], uniforms: Float[Tensor, "R K"]) -> Draft:
    return propose(drafter, len(uniforms), cast(Noise, FixedNoise(uniforms)))


def _edges(
    drafts: Callable[[Tensor], Draft], uniforms: Float[Tensor, "R K"], k: int
) -> Float[Tensor, "R V+1"]:
    """Where position k's token ceases to be at most 0, 1, ...; 0 and 1 at the ends."""
    rows = uniforms.repeat_interleave(V - 1, dim=0)
    below = torch.arange(V - 1).repeat(len(uniforms))
    low = torch.zeros(len(rows), dtype=torch.float64)
    high = torch.ones(len(rows), dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rows[:, k] = middle
        over = drafts(rows).tokens[:, k] > below
        low = torch.where(over, low, middle)
        high = torch.where(over, middle, high)
    inner = high.view(len(uniforms), V - 1)
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0)


def drawn(drafter: Drafter[Any], count: int) -> Drafts:
    """`count` random drafts, of equal weight."""
    return Drafts(propose(drafter, count), torch.full((count,), 1 / count, dtype=torch.float64))


def error(count: int, cells: int) -> float:
    """The most by which the distance of `count` random drafts exceeds the true one, except with
    chance ALARM (McDiarmid)."""
    return math.sqrt((cells - 1) / count) / 2 + math.sqrt(math.log(1 / ALARM) / (2 * count))
