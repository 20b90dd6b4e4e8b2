"""transformers' assistant is the very network our own drafter runs."""

from pathlib import Path

import pytest
import torch

import tiny
from specdiff.bench import baselines
from specdiff.errors import UnsupportedModelError
from specdiff.nn.small_lm import SmallLM


def small(folder: Path, draft_vocab_size: int | None = 20) -> SmallLM:
    """A random drafter that borrows its target's embedding and head, written to `folder`."""
    base = tiny.model("llama", seed=1)
    base.config.update({"borrow_embeddings": True, "draft_vocab_size": draft_vocab_size})
    network = SmallLM(base.config)
    network.load_state_dict(
        {f"net.{name}": tensor for name, tensor in base.state_dict().items()}, strict=False
    )
    if draft_vocab_size is not None:
        network.draft_vocab.copy_(torch.arange(3, 3 + draft_vocab_size))
    network.save_pretrained(folder)
    return network


def test_an_assistant_that_borrows_has_our_drafters_distribution(tmp_path: Path) -> None:
    info = tiny.target("llama").info
    assert info.embedding is not None and info.head is not None
    own = small(tmp_path / "drafter").borrow(info.embedding, info.head)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        theirs = baselines.assistant_model(str(tmp_path / "drafter"), info)(ids).logits.softmax(-1)
        ours = own.logits(own.hidden(ids)).softmax(-1)
    assert torch.allclose(theirs[..., own.draft_vocab], ours, atol=1e-6)
    assert theirs.sum(-1).allclose(torch.ones(1, 5)) and not theirs[..., :3].any()


def test_what_is_no_causal_lm_is_no_assistant(tmp_path: Path) -> None:
    info = tiny.target("llama").info
    tiny.sedd(tiny.sedd_config(tiny.VOCAB)).save_pretrained(tmp_path / "sedd")
    for spec in ("ngram", "autoregressive", str(tmp_path / "sedd"), "module:Class"):
        with pytest.raises(UnsupportedModelError, match="no causal LM that transformers could run"):
            baselines.assistant_model(spec, info)
    tiny.model("gpt2", vocab=40).save_pretrained(tmp_path / "foreign")
    with pytest.raises(UnsupportedModelError, match="40 tokens, but the target 48"):
        baselines.assistant_model(str(tmp_path / "foreign"), info)
