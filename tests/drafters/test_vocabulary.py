"""Drafters whose vocabulary is the target's with other padding run on common ids, else fail."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tiny
from specdiff import catalog, decode
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.drafters.vocabulary import known_ids
from specdiff.errors import DrafterError
from specdiff.nn.small_lm import SmallLM
from specdiff.targets.causal import CausalTarget
from specdiff.types import SamplingParams
from specdiff.verify import VERIFIERS

SIZES = (tiny.VOCAB + 64, tiny.VOCAB - 8)


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)


def words(count: int = tiny.VOCAB) -> list[str]:
    return [f"w{i}" for i in range(count)]


@pytest.fixture
def target(tmp_path: Path) -> CausalTarget:
    """A target in a folder with its tokenizer."""
    folder = tmp_path / "target"
    net = tiny.model("llama")
    net.save_pretrained(folder)
    write_tokenizer(folder, words())
    return CausalTarget(net, name=str(folder))


def drafter_folder(kind: str, size: int, folder: Path, own: Sequence[str] | None) -> str:
    if kind == "sedd":
        tiny.sedd(tiny.sedd_config(size)).save_pretrained(folder)
    else:
        tiny.model("llama", vocab=size, seed=1).save_pretrained(folder)
    if own is not None:
        write_tokenizer(folder, own)
    return str(folder)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["autoregressive", "sedd"])
def test_the_texts_are_plain_ones_and_drafts_are_proposed(
    kind: str, size: int, target: CausalTarget, tmp_path: Path
) -> None:
    """Prompts hold every id of the target, also those that the smaller drafter lacks."""
    instance = catalog.drafter(
        drafter_folder(kind, size, tmp_path / "drafter", words()), target.info
    )
    prompts = [[47, 3, 40, 41], [5], [i % tiny.VOCAB for i in range(39, 60)]]
    params = SamplingParams(max_tokens=20, temperature=0)
    for verifier in VERIFIERS.values():
        batch = tiny.batch_of(prompts, 20, temperature=0)
        rounds = list(decode.decode(target, instance, batch, verifier=verifier, draft_len=3))
        for text, prompt in zip(tiny.rows_of(rounds[-1].batch), prompts, strict=True):
            assert text == tiny.plain(tiny.copy_of(target.model), prompt, params.max_tokens)
        assert not any(bool(r.disabled.any()) for r in rounds)
        assert all(r.draft.tokens.shape[1] == 3 for r in rounds)
    for last in decode.decode(target, instance, tiny.batch_of(prompts, 20), draft_len=3):
        assert last.draft.probs is not None and last.draft.probs.shape[-1] == tiny.VOCAB


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["autoregressive", "sedd"])
@pytest.mark.parametrize(
    "own",
    [None, [*words(10), "other", *words()[11:]], words()[:12], words()[1:]],
    ids=["no tokenizer", "another token", "a stub", "shifted"],
)
def test_other_tokenizers_are_refused_with_both_sizes(
    own: Sequence[str] | None, kind: str, size: int, target: CausalTarget, tmp_path: Path
) -> None:
    folder = drafter_folder(kind, size, tmp_path / "drafter", own)
    with pytest.raises(
        DrafterError,
        match=f"{size} tokens.*has {tiny.VOCAB}; use a drafter trained for this target",
    ):
        catalog.drafter(folder, target.info)


def test_a_target_without_a_tokenizer_is_no_evidence(tmp_path: Path) -> None:
    folder = drafter_folder("autoregressive", SIZES[0], tmp_path / "drafter", words())
    for name in ("", "tiny", str(tmp_path / "nothing")):
        with pytest.raises(DrafterError, match="use a drafter trained for this target"):
            catalog.drafter(folder, CausalTarget(tiny.model("llama"), name=name).info)


@pytest.mark.parametrize("size", SIZES)
def test_the_reverse_process_needs_the_same_size(
    size: int, target: CausalTarget, tmp_path: Path
) -> None:
    folder = drafter_folder("sedd", size, tmp_path / "drafter", words())
    with pytest.raises(DrafterError, match=f"{size} tokens.*has {tiny.VOCAB}"):
        catalog.drafter(folder, target.info, {"order": "any"})


def test_what_borrows_from_the_target_is_of_its_size() -> None:
    base: Any = tiny.model("llama", vocab=SIZES[0])
    base.config.update({"borrow_embeddings": True})
    with pytest.raises(DrafterError, match=f"{SIZES[0]} tokens.*has {tiny.VOCAB}"):
        AutoregressiveDrafter(SmallLM(base.config), tiny.target("llama").info, padded=True)


def test_a_network_of_the_targets_size_reads_the_ids_themselves() -> None:
    ids = torch.tensor([[1, 2]])
    assert known_ids(ids, 5, 5) is ids and known_ids(ids, 9, 5) is ids
    assert known_ids(ids, 2, 5).tolist() == [[1, 0]]
