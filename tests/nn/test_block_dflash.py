"""Drafters in z-lab's DFlash layout, in transformers' and in DeepSpec's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

import blocks
from specdiff.nn import block_formats
from specdiff.nn.block import BlockNetwork
from speculators_model import load_theirs, run_theirs

DFLASH = {"sample_from_anchor": False}


def features_of(model: Any, ids: Tensor, network: BlockNetwork) -> Tensor:
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
    return torch.cat([states[tap + 1][0] for tap in network.config.taps], dim=-1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_drafts_and_accepts_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """`generate` with its own DFlash: the candidates' logits are ours, round by round."""
    target: Any = blocks.target(family)
    tables = blocks.target_tables(target, "tiny")
    ours = blocks.network(**DFLASH).borrow(tables.embedding, tables.head)
    prompt = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(5))
    options = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": 0}
    text = target.generate(prompt, **options)[0]
    features = features_of(target, text, ours)
    blocks.fit(ours, features, text)
    block_formats.write(tmp_path, "transformers", blocks.checkpoint(ours), tables)
    assistant = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rounds: list[tuple[Tensor, Tensor]] = []
    original = DFlashTokenCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Tensor, **options: Any) -> Any:
        ids, logits = original(self, input_ids, **options)
        if logits is not None:
            rounds.append((ids[0], logits[0]))
        return ids, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recorded)
    speculated = target.generate(
        prompt, assistant_model=assistant, speculation_type="dflash", **options
    )[0]
    assert torch.equal(speculated, text)
    anchor = prompt.shape[1]  # the first token that the target has chosen
    lengths = []
    for ids, logits in rounds:
        assert len(ids) - ours.config.draft_len - 1 == anchor
        with torch.no_grad():
            own = ours.logits(blocks.block_states(ours, features, text, anchor)[1:])
        torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-4)
        draft = own.argmax(-1)
        assert torch.equal(draft, ids[anchor + 1 :])
        follows = text[anchor + 1 : anchor + 1 + len(draft)]
        lengths.append(int((draft[: len(follows)] == follows).cumprod(0).sum()))
        anchor += lengths[-1] + 1
    # the rounds of transformers began where our accepted lengths say, up to the last token
    assert anchor >= len(text) - 1
    assert sum(lengths) > len(lengths) and len(set(lengths)) > 1


def test_speculators_converts_the_z_lab_layout(tmp_path: Path) -> None:
    """Its converter reads our export, and its model computes our states and logits."""
    pytest.importorskip("speculators", reason="the package speculators is not installed")
    from speculators.convert.dflash import DFlashConverter

    target = blocks.target("qwen3")
    target.save_pretrained(tmp_path / "target")
    tables = blocks.target_tables(target, str(tmp_path / "target"))
    ours = blocks.network(**DFLASH)
    block_formats.write(tmp_path / "dflash", "dflash", blocks.checkpoint(ours), tables)
    ours.borrow(tables.embedding, tables.head)
    DFlashConverter().convert(
        tmp_path / "dflash", tmp_path / "theirs", str(tmp_path / "target"), validate=False
    )
    theirs = load_theirs(tmp_path / "theirs")
    ids = torch.randint(0, 40, (40,), generator=torch.Generator().manual_seed(2))
    features = features_of(target, ids, ours)
    with torch.no_grad():
        states = target(ids[None], output_hidden_states=True).hidden_states
    theirs_features = torch.cat([states[i][0] for i in theirs.target_layer_ids], dim=-1)
    for anchor, (hidden, logits, _, _) in run_theirs(theirs, theirs_features, ids, 8).items():
        if anchor:
            own = blocks.block_states(ours, features, ids, anchor)
            torch.testing.assert_close(own, hidden, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.logits(own), logits, rtol=1e-4, atol=1e-4)
