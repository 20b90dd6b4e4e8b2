"""A tiny target, and a corpus of its own text."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from specdiff.data.corpus import Corpus, CorpusWriter, Row


def write_corpus(
    folder: Path,
    rows: list[list[int]],
    vocab: int = tiny.VOCAB,
    prompt_length: int = 4,
    shard_tokens: int = 400,
) -> Corpus:
    with CorpusWriter(
        folder, {"target": "tiny", "source": "test"}, vocab_size=vocab, shard_tokens=shard_tokens
    ) as writer:
        for i, row in enumerate(rows):
            writer.add(Row(torch.tensor(row), min(prompt_length, len(row)), 0.0, i))
    return Corpus(folder)


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama target as its users have it: a folder."""
    folder = tmp_path_factory.mktemp("target")
    tiny.model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(target_folder: Path) -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Corpus:
    """64 rows of 12 to 40 tokens, written greedily by the target."""
    rows = [
        tiny.plain(model, prompt, 8 + (7 * i) % 30) for i, prompt in enumerate(tiny.prompts(64))
    ]
    return write_corpus(tmp_path_factory.mktemp("corpus"), [r for r in rows if len(r) > 8])
