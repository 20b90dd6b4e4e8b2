"""Tiny stand-ins for the paper's models and data sets: the whole path in a minute, offline."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from specdiff import files
from specdiff.bench.paper import DATASETS, DRAFTERS, TARGETS
from specdiff.bench.suites import PromptText
from specdiff.nn.ddit import SEDD
from specdiff.nn.sedd_config import SEDDConfig

VOCAB = 64
WIDTH = 32
POSITIONS = 256
DOCUMENTS = 4
LENGTH = 24


def tiny_models(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(targets, drafters), name -> folder; written if missing, the same in every run."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    gpt2: dict[str, Any] = {"n_embd": WIDTH, "n_head": 4, "n_positions": POSITIONS, **sizes}
    neo = GPTNeoConfig(
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=POSITIONS,
        window_size=16,
        attention_types=[[["global", "local"], 1]],
        **sizes,
    )
    diffusion = SEDDConfig(
        tokens=VOCAB, hidden_size=WIDTH, n_blocks=1, n_heads=4, cond_dim=16, length=128
    )
    networks: dict[str, tuple[Any, Any]] = {
        "gpt2-xl": (GPT2LMHeadModel, GPT2Config(n_layer=2, **gpt2)),
        "gpt-neo-2.7B": (GPTNeoForCausalLM, neo),
        "autoregressive": (GPT2LMHeadModel, GPT2Config(n_layer=1, **gpt2)),
        "sedd": (SEDD, diffusion),
    }
    for seed, (name, (network, config)) in enumerate(networks.items()):
        if not (folder / name / "model.safetensors").exists():
            torch.manual_seed(seed)
            with files.staged_folder(folder / name) as partial:
                network(config).save_pretrained(partial)
    targets = {name: str(folder / name) for name in TARGETS}
    return targets, {name: str(folder / name) for name in DRAFTERS}


def tiny_texts() -> dict[str, tuple[PromptText, ...]]:
    """Documents of random tokens for every data set."""
    texts = {}
    for seed, dataset in enumerate(DATASETS):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(VOCAB, (DOCUMENTS, LENGTH), generator=generator).tolist()
        texts[dataset] = tuple(
            PromptText(f"{dataset}-{i}", dataset, row, document=True) for i, row in enumerate(rows)
        )
    return texts
