"""The tutorial runs as it stands there, on a target that a CPU trains for in seconds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import specdiff
import tiny
from documents import GUIDE, Block, blocks, perform, understood
from specdiff.training.recipe import Recipe

pytest.importorskip("yaml", reason="training needs the extra specdiff[train]")
pytest.importorskip("accelerate", reason="training needs the extra specdiff[train]")

DOCUMENT = GUIDE / "train-a-drafter.md"
SMALL = (
    "--set warmup=1 --set canvas_tokens=16 --set eval_prompts=2 --set eval_tokens=4 "
    "--set draft_len=4"
)
TINY = "--set rows=2 --set accumulation=1"
# All that the test changes in the commands: the model, and sizes. Each must occur in the document.
REPLACEMENTS = {
    "smollm2-135m": "tiny-target",
    "--tokens 1000000": "--tokens 1500 --max-tokens 24 --rows 8",
    "--tokens 100000": "--tokens 1500 --max-tokens 24 --rows 8",
    "--verbatim": "--verbatim --max-model-len 64",
    "--max-minutes 60": "--max-minutes 0.00001",
    "steps=3000": f"steps=4 {SMALL}",
    "steps=1000": f"steps=4 {SMALL}",
    "steps=400000": f"steps=2 {SMALL} {TINY} --set blocks=1 --set hidden_size=16 --set heads=2 "
    "--set length=64",
    "steps=20000": f"steps=2 {SMALL} --set rows=2 --set accumulation=1",
}
SKIPPED = 3  # blocks marked `skip`: installing, several GPUs, publishing
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, VOCAB = 0, 264


BLOCKS = blocks(DOCUMENT)
EXECUTED = [b for b in BLOCKS if b.note != "skip"]


def shrunk(text: str) -> str:
    for pattern, small in REPLACEMENTS.items():
        text = re.sub(rf"{re.escape(pattern)}(?!\w)", small, text)
    return text


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder at the start: texts, and a model whose chat template ends its turns."""
    model: Any = tiny.model("llama", vocab=VOCAB, positions=1024)
    with torch.no_grad():  # one feature is the same at every token, and asks for the end
        model.model.norm.weight.fill_(0.15)
        model.model.norm.weight[0] = 1.0
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[END, 0] = 2.0
    model.save_pretrained(tmp_path / "tiny-target")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["rain"],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path / "tiny-target")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(
        "\n\n".join(f"Paragraph {i} tells of rain. " * 4 for i in range(20))
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_runs_in_order(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "".join(b.text for b in EXECUTED)
    missing = [
        pattern for pattern in REPLACEMENTS if not re.search(rf"{re.escape(pattern)}(?!\w)", text)
    ]
    assert not missing, f"no longer in the tutorial: {missing}"
    assert not (large := re.findall(r"[= ]\d{4,}\b", shrunk(text).replace("--tokens 1500", ""))), (
        f"sizes that nothing shrinks: {large}"
    )
    output = ""
    for block in EXECUTED:
        perform(Block(block.language, block.note, shrunk(block.text)), monkeypatch)
        captured = capfd.readouterr()
        output += captured.out + captured.err
    for message in (
        "would write 1500 tokens", "% of answer tokens in repeated 8-grams", "final states of",
        "the source was exhausted", "parameters trained", "time is up at step 1 of 4",
        "resuming from step 1 of 4", '"tau_at_1"', "speculative / plain", "by position [",
    ):  # fmt: skip
        assert message in output, f"{message!r} is not in:\n{output}"
    for name in (
        "config.json",
        "model.safetensors",
        "README.md",
        "training/log.jsonl",
        "training/curve.jsonl",
    ):
        assert (workplace / "my-drafter" / name).is_file()
    with safe_open(workplace / "drafter-mine" / "model.safetensors", "pt") as file:
        assert {m.group(1) for k in file.keys() if (m := re.search(r"blocks\.(\d+)\.", k))} == {  # noqa: SIM118
            "0",
            "1",
            "2",
        }
    lm = specdiff.load("tiny-target", drafter="my-tuned")
    assert lm.generate("rain", max_tokens=4, seed=1).stats.tau >= 1


def test_only_these_blocks_are_skipped() -> None:
    assert sum(b.note == "skip" for b in BLOCKS) == SKIPPED
    assert understood(BLOCKS) == 1


def test_the_table_of_choices_names_keys_and_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \((.*?)\) \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert len(rows) >= 9
    for key, default in rows:
        value = Recipe.model_fields[key].default
        if isinstance(value, tuple):
            value = list(value)
        assert default == ("null" if value is None else str(value)), key


def test_lines_are_short() -> None:
    lines = DOCUMENT.read_text().splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) <= 140
