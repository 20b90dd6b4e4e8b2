"""The paper's preparation at a tiny size: packed texts, and a SEDD checkpoint finetuned on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import tiny
from specdiff import catalog, cli
from specdiff.data.corpus import GROUP_BITS, Corpus
from specdiff.data.packing import packed
from specdiff.nn.ddit import SEDD
from specdiff.targets.causal import CausalTarget

GPT2_WORDS = 50257


def invoke(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli.app, [*arguments, "--json", "-q"])
    assert done.exit_code == 0, (done.output, done.exception)
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's vocabulary and end of text, nothing else of its size."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    ends = {"bos_token_id": GPT2_WORDS - 1, "eos_token_id": GPT2_WORDS - 1}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=GPT2_WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=128, **ends)
    ).save_pretrained(folder)
    return folder


def test_packing_joins_and_cuts() -> None:
    rows = list(packed([[1, 2, 3], [], [4, 5], [6, 7, 8, 9]], end=0, length=5))
    assert [r.tokens.tolist() for r in rows] == [
        [1, 2, 3, 0, 4],
        [5, 0],
        [6, 7, 8, 9, 0],
    ]  # a group ends with its document
    assert [(r.key >> GROUP_BITS, r.key % (1 << GROUP_BITS), r.prompt_length) for r in rows] == [
        (1, 0, 0),
        (1, 1, 0),
        (2, 0, 0),
    ]


def test_finetuning_a_checkpoint_in_the_authors_layout(gpt2: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    texts = [torch.randint(200, (5 + i % 40,), generator=g).tolist() for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    corpus = tmp_path / "corpus"
    out = tmp_path / "tuned"
    checkpoint = tmp_path / "sedd-tiny"
    command = (
        "data",
        "--model",
        str(gpt2),
        "--source",
        "jsonl",
        "--input",
        str(tmp_path / "texts.jsonl"),
        "--out",
        str(corpus),
        "--device",
        "cpu",
    )
    summary = invoke(*command, "--verbatim", "--max-model-len", "32")
    assert summary["tokens"] == sum(map(len, texts)) + len(texts)
    joined = torch.cat(
        [r.tokens for r in (Corpus(corpus)[i] for i in range(len(Corpus(corpus))))]
    ).tolist()
    assert joined == [token for t in texts for token in (*t, GPT2_WORDS - 1)]
    assert (
        invoke(*command, "--verbatim", "--max-model-len", "32")["tokens"] == summary["tokens"]
    )  # again: nothing is written twice

    network = tiny.sedd(
        tiny.sedd_config(GPT2_WORDS, hidden_size=16, n_heads=2, n_blocks=1, length=32)
    )
    network.save_pretrained(checkpoint)
    sizes = [
        "rows=2",
        "accumulation=1",
        "steps=6",
        "warmup=2",
        "save_every=3",
        "eval_every=6",
        "eval_prompts=2",
        "eval_tokens=4",
        "draft_len=4",
    ]
    settings = [part for s in (*sizes, f"init={checkpoint}") for part in ("--set", s)]
    result = invoke(
        "train",
        "--target",
        str(gpt2),
        "--data",
        str(corpus),
        "--out",
        str(out),
        "--recipe",
        "sedd-finetune",
        "--device",
        "cpu",
        *settings,
    )
    assert result["step"] == 6 and result["held_out_loss"] > 0 and result["tau_at_1"] >= 1
    tuned = SEDD.from_pretrained(out)
    assert tuned.state_dict().keys() == network.state_dict().keys()
    assert not torch.equal(tuned.blocks[0].attn_qkv.weight, network.blocks[0].attn_qkv.weight)
    target = CausalTarget(GPT2LMHeadModel.from_pretrained(gpt2), str(gpt2))
    assert catalog.drafter(str(out), target.info).draft_len == 4


def test_finetuning_the_target_itself(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"prompt": [7, 8, 9, 10] * 8}) + "\n" for _ in range(20))
    )
    corpus = tmp_path / "corpus"
    out = tmp_path / "tuned"
    invoke(
        "data",
        "--model",
        str(gpt2),
        "--source",
        "jsonl",
        "--input",
        str(tmp_path / "texts.jsonl"),
        "--out",
        str(corpus),
        "--device",
        "cpu",
        "--verbatim",
        "--max-model-len",
        "24",
    )
    settings = [
        part
        for s in (
            "rows=4",
            "steps=30",
            "warmup=2",
            "lr=1e-2",
            "eval_every=15",
            "save_dtype=float32",
        )
        for part in ("--set", s)
    ]
    invoke(
        "train",
        "--target",
        str(gpt2),
        "--data",
        str(corpus),
        "--out",
        str(out),
        "--recipe",
        "target",
        "--device",
        "cpu",
        *settings,
    )
    curve = [
        json.loads(line) for line in (out / "training" / "curve.jsonl").read_text().splitlines()
    ]
    assert curve[1]["held_out_loss"] < curve[0]["held_out_loss"] < 10.9  # ln of the vocabulary
    again = catalog.target(str(out), torch.float32, torch.device("cpu"))[0]
    assert again.info.vocab_size == GPT2_WORDS
