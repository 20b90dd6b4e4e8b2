"""Small random networks for the model tests: targets of three families, and SEDD drafters.

Every parameter of a drafter is random.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specdiff import decode
from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.nn.block import BlockConfig, BlockNetwork
from specdiff.nn.ddit import SEDD, SEDDConfig
from specdiff.noise import Noise
from specdiff.targets.causal import CausalTarget
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetInfo

torch.set_num_threads(1)  # networks this small lose by a second thread, above all on a busy machine

VOCAB = 48
WIDTH = 32
FAMILIES = ("gpt2", "llama", "qwen3")


def model(family: str, vocab: int = VOCAB, positions: int = 256, seed: int = 0) -> PreTrainedModel:
    """A two-layer causal LM; its matrices are scaled up, or greedy text is one repeated token."""
    torch.manual_seed(seed)
    grouped: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": WIDTH, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family == "gpt2":
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        network: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=positions, **ends
            )
        )
    elif family == "llama":
        network = LlamaForCausalLM(LlamaConfig(**grouped))
    else:
        network = Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=8))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        if family == "gpt2":
            network.get_submodule("transformer.wpe").weight.mul_(
                4
            )  # its tied head would else repeat the last token
    return network.eval()


def target(family: str, **sizes: Any) -> CausalTarget:
    return CausalTarget(model(family, **sizes), name=f"tiny-{family}")


def sedd_config(tokens: int = VOCAB, **changes: Any) -> SEDDConfig:
    base = SEDDConfig(
        tokens=tokens, hidden_size=WIDTH, n_blocks=2, n_heads=4, cond_dim=16, length=96, dropout=0.1
    )
    return replace(base, **changes)


def sedd(config: SEDDConfig, seed: int = 0) -> SEDD:
    """Nothing is left at its initial value: adaLN, norms, biases and read-out are random too."""
    generator = torch.Generator().manual_seed(seed)
    network = SEDD(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            spread = 0.5 if parameter.dim() == 1 else 1.2 / parameter.shape[-1] ** 0.5
            if "embed" in name:
                spread = 1.0
            parameter.copy_(drawn * spread + ("norm" in name))
    if config.draft_vocab_size is not None:
        network.draft_vocab.copy_(
            torch.randperm(config.tokens, generator=generator)[: config.draft_vocab_size]
            .sort()
            .values
        )
    return network


def drafter(
    info: TargetInfo,
    *,
    steps: int = 1,
    draft_temperature: float = 1.0,
    window: int | None = None,
    **changes: Any,
) -> Drafter[Any]:
    """A random SEDD drafter for a target.

    It is windowed, with its own embeddings, unless `changes` to its config say otherwise.
    """
    denoiser = SEDDDenoiser(sedd(sedd_config(info.vocab_size, **changes)), info, window=window)
    return DenoisingDrafter(denoiser, steps=steps, draft_temperature=draft_temperature)


CACHED: dict[str, Any] = {
    "attention": "causal-context",
    "borrow_embeddings": True,
    "time_conditioning": False,
    "draft_vocab_size": 20,
}


class Hinted(Drafter[None]):
    """Knows each row's continuation, and errs at every `flaw`-th position.

    Prefixes accepted are long, and rejections occur too.
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocab: int, flaw: int = 5) -> None:
        self.texts = texts
        self.vocab = vocab
        self.flaw = flaw

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        tokens = []
        for row, start in enumerate(context.batch.length.tolist()):
            continuation = [*self.texts[row][start : start + draft_len], *[0] * draft_len][
                :draft_len
            ]
            tokens.append(
                [
                    (t + ((start + k) % self.flaw == 0)) % self.vocab
                    for k, t in enumerate(continuation)
                ]
            )
        return Draft(torch.tensor(tokens, device=context.batch.ids.device))


def plain(net: PreTrainedModel, prompt: Sequence[int], new: int, **options: Any) -> list[int]:
    """transformers' own greedy decoding, in its own attention: prompt and continuation."""
    ids = torch.tensor([prompt])
    out = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
        **options,
    )
    return out[0].tolist()


def copy_of(net: PreTrainedModel) -> PreTrainedModel:
    """A model no target has touched, to compare with."""
    return copy.deepcopy(net)


def prompts(count: int, vocab: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(vocab, (1 + (5 * i + 3) % 11,), generator=generator).tolist()
        for i in range(count)
    ]


def batch_of(
    rows: Sequence[Sequence[int]],
    max_tokens: int = 24,
    seeds: Sequence[int] | None = None,
    **sampling: Any,
) -> Batch:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Batch.of(rows, [params] * len(rows), seeds or range(len(rows)))


def rows_of(batch: Batch) -> list[list[int]]:
    """The committed tokens of each row."""
    return [ids[:n].tolist() for ids, n in zip(batch.ids, batch.length.tolist(), strict=True)]


def decoded(*arguments: Any, **options: Any) -> list[list[int]]:
    """Decode to the end; the committed tokens of each row."""
    rounds = list(decode.decode(*arguments, **options))
    return rows_of(rounds[-1].batch)


def block(vocab: int = VOCAB, columns: int | None = 30, seed: int = 0) -> BlockNetwork:
    """Every parameter random; it reads the first layer of a target of this file."""
    config = BlockConfig(
        tokens=vocab,
        hidden_size=WIDTH,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        block_size=4,
        mask_token_id=3,
        taps=(0,),
        window=9,
        draft_vocab_size=columns,
        markov_rank=8,
    )
    generator = torch.Generator().manual_seed(seed)
    network = BlockNetwork(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 1.2 / parameter.shape[-1] ** 0.5 + ("norm" in name))
    if columns is not None:
        ids = torch.randperm(vocab, generator=generator)[:columns]
        network.draft_vocab.copy_(ids.sort().values)
    return network
