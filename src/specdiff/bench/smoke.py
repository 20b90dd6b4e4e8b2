"""The paper suite on tiny random models and random tokens: its whole path in a minute, without a network. The figures mean nothing."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from specdiff import files
from specdiff.bench import paper
from specdiff.bench.suites import Text
from specdiff.nn.ddit import SEDD
from specdiff.nn.sedd_config import SEDDConfig

VOCAB, WIDTH, POSITIONS = 64, 32, 256
DOCUMENTS, LENGTH = 4, 24


def models(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(targets, drafters), name -> folder; written where they are not there yet, the same in every run."""
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    sizes: dict[str, Any] = {"vocab_size": VOCAB, **ends}
    gpt2 = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=POSITIONS, **sizes)
    small = GPT2Config(n_embd=WIDTH, n_layer=1, n_head=4, n_positions=POSITIONS, **sizes)
    kinds = [[["global", "local"], 1]]
    neo = GPTNeoConfig(
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=POSITIONS,
        window_size=16,
        attention_types=kinds,
        **sizes,
    )
    diffusion = SEDDConfig(
        tokens=VOCAB, hidden_size=WIDTH, n_blocks=1, n_heads=4, cond_dim=16, length=128
    )
    nets = {
        "gpt2-xl": (GPT2LMHeadModel, gpt2),
        "gpt-neo-2.7B": (GPTNeoForCausalLM, neo),
        "autoregressive": (GPT2LMHeadModel, small),
    }
    for seed, (name, (kind, config)) in enumerate([*nets.items(), ("sedd", (SEDD, diffusion))]):
        if not (folder / name / "model.safetensors").exists():
            torch.manual_seed(seed)
            made: Any = kind
            with files.staged_folder(folder / name) as partial:
                made(config).save_pretrained(partial)
    return {name: str(folder / name) for name in paper.TARGETS}, {
        name: str(folder / name) for name in paper.DRAFTERS
    }


def texts() -> dict[str, tuple[Text, ...]]:
    """Documents of random tokens for every data set."""
    found = {}
    for seed, dataset in enumerate(paper.DATASETS):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(VOCAB, (DOCUMENTS, LENGTH), generator=generator).tolist()
        found[dataset] = tuple(
            Text(f"{dataset}-{i}", dataset, row, document=True) for i, row in enumerate(rows)
        )
    return found
