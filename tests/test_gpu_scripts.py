"""The GPU scripts at a size for one CPU core: they parse, pieces join whole, the chain resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from specdiff.data.corpus import Corpus

ROOT = Path(__file__).parents[1]
GPU = ROOT / "scripts" / "gpu"
SIZES = (0, 1, 999, 1000, 1001, 4321)


@pytest.mark.parametrize("script", sorted(GPU.glob("*.sh")), ids=lambda p: p.name)
def test_bash_reads_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "common.sh" or (
        os.access(script, os.X_OK) and "\nset -euo pipefail\n" in script.read_text()
    )


def pieces(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GPU / "pieces.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for size in SIZES:
        file = tmp_path / "folder" / f"{size % 3}" / f"{size}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(size))
    return tmp_path / "folder"


def test_a_folder_comes_back_whole(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "big").touch()
    (folder / ".lock").touch()
    assert (
        pieces(
            "split", folder, tmp_path / "pieces", "--bytes", "1KiB", "--without", "checkpoints"
        ).returncode
        == 0
    )
    (folder / ".lock").unlink()
    (folder / "checkpoints" / "big").unlink()
    paths = sorted((tmp_path / "pieces").glob("*.piece"))
    assert len(paths) == -(-sum(SIZES) // 1024) and all(p.stat().st_size < 1100 for p in paths)
    (tmp_path / "pieces" / "second").mkdir()
    paths[3].rename(tmp_path / "pieces" / "second" / paths[3].name)  # as carried in two calls
    for _ in range(2):
        assert pieces("join", tmp_path / "pieces", tmp_path / "back").returncode == 0
        assert content(tmp_path / "back") == content(folder)


def test_an_interrupted_split_is_resumed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pieces"
    pieces("split", folder, out, "--bytes", "1KiB")
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.piece")}
    for lost in ("00002.piece", "00005.piece", "manifest.json"):
        (out / lost).unlink()
    result = pieces("join", out, tmp_path / "back")
    assert result.returncode == 1 and "lacks manifest.json" in result.stderr
    pieces("split", folder, out, "--bytes", "1KiB")
    intact = {p.name for p in out.glob("*.piece") if p.stat().st_mtime_ns == times[p.name]}
    assert times.keys() - intact == {"00002.piece", "00005.piece"}
    assert pieces("join", out, tmp_path / "back").returncode == 0 and content(
        tmp_path / "back"
    ) == content(folder)


def test_missing_and_damaged_pieces_are_named_and_nothing_is_written(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pieces"
    pieces("split", folder, out, "--bytes", "1KiB")
    (out / "00001.piece").unlink()
    damaged = bytearray((out / "00004.piece").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / "00004.piece").write_bytes(damaged)
    result = pieces("join", out, tmp_path / "back")
    assert result.returncode == 1 and "missing 00001.piece; damaged: 00004.piece" in result.stderr
    assert not (tmp_path / "back").exists()
    pieces("split", folder, out, "--bytes", "1KiB")
    assert pieces("join", out, tmp_path / "back").returncode == 0 and content(
        tmp_path / "back"
    ) == content(folder)


def test_a_smaller_folder_leaves_no_old_piece(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pieces"
    pieces("split", folder, out, "--bytes", "1KiB")
    (folder / "1" / "4321.bin").unlink()
    pieces("split", folder, out, "--bytes", "1KiB")
    assert len(list(out.glob("*.piece"))) == -(-(sum(SIZES) - 4321) // 1024)
    assert pieces("join", out, tmp_path / "back").returncode == 0 and content(
        tmp_path / "back"
    ) == content(folder)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A random Llama and a tokenizer of bytes, as a folder."""
    vocab = {
        token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tiny.model("llama", vocab=len(vocab)).save_pretrained(tmp_path / "target")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(
        tmp_path / "target"
    )
    return tmp_path / "target"


def test_the_chain_runs_and_resumes(target: Path, tmp_path: Path) -> None:
    gpu, out = tmp_path / "gpu", tmp_path / "out"
    settings = {"TINY": "1", "MINUTES": "0.03", "MODEL": str(target), "ROOT": str(gpu)}
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OUT": str(out),
    }
    environment |= {f"SPECDIFF_GPU_{name}": value for name, value in settings.items()}

    def call(script: str, **changes: str) -> str:
        process = subprocess.run(
            [str(GPU / script)], cwd=ROOT, env=environment | changes, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout + process.stderr

    call("1-data.sh", SPECDIFF_GPU_MINUTES="5")
    assert Corpus(gpu / "corpus").tokens >= 1500
    call("2-train-sedd.sh")
    output = call("2-train-sedd.sh", SPECDIFF_GPU_MINUTES="5")
    assert "resuming from step" in output or "steps are done" in output
    last = json.loads((gpu / "sedd" / "training" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == int((gpu / "sedd.steps").read_text())
    (gpu / "autoregressive.steps").write_text("3\n")
    call("3-train-autoregressive.sh", SPECDIFF_GPU_MINUTES="5")
    call("5-eval.sh", SPECDIFF_GPU_MINUTES="5")

    for name in ("corpus", "sedd", "autoregressive"):
        assert pieces("join", out / name, tmp_path / "home" / name).returncode == 0
    assert Corpus(tmp_path / "home" / "corpus").tokens == Corpus(gpu / "corpus").tokens
    for name in ("sedd", "autoregressive"):
        weights = "model.safetensors"
        assert (tmp_path / "home" / name / weights).read_bytes() == (
            gpu / name / weights
        ).read_bytes()
        assert not list((tmp_path / "home" / name).rglob("checkpoints"))
    results = json.loads((out / "results.json").read_text())["drafters"]
    assert results.keys() == {"sedd", "autoregressive"}
    for record in results.values():
        for temperature in ("0", "1"):
            assert (
                record[temperature]["tau"] >= 1
                and len(record[temperature]["per_position"]) == record["draft_len"]
            )
            assert (
                record[temperature]["plain_tokens_per_second"] > 0
                and record[temperature]["tokens_per_second"] > 0
            )
