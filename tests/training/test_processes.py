"""Training in processes of its own, through the command line: killed, distributed, sharded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from specdiff.data.corpus import Corpus

SIZES = [
    "heads=4",
    "draft_vocab=40",
    "context_window=16",
    "rows=4",
    "canvas_tokens=16",
    "warmup=5",
    "ema=0.9",
    "dropout=0.2",
]
BOOKS = ["log_every=1", "save_every=2", "eval_every=1000", "eval_prompts=2", "eval_tokens=8"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LOG = "training/log.jsonl"
LAST = "training/checkpoints/{:08d}/training.safetensors"


def command(target: Path, corpus: Corpus, out: Path, *changes: str) -> list[str]:
    settings = [part for change in (*SIZES, *BOOKS, *changes) for part in ("--set", change)]
    return [
        "specdiff",
        "train",
        "--target",
        str(target),
        "--data",
        str(corpus.folder),
        "--out",
        str(out),
        "--device",
        "cpu",
        *settings,
    ]


def run(arguments: list[str], processes: int = 1) -> None:
    launch = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *launch, "-m", *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def equal_files(a: Path, b: Path) -> bool:
    x = load_file(a)
    y = load_file(b)
    return x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x)


KILLED = """
import os, random, signal, sys
from specdiff import cli, files
from specdiff.training import prepare, recipe  # imported once: every run is forked from here

def begin(lines, delay):
    # the command in a process that ends itself after this many log lines, maybe with a delay
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    append_line = files.append_line

    def counted(path, line):
        nonlocal lines
        append_line(path, line)
        lines -= path.name == "log.jsonl"
        if lines == 0 and delay:
            signal.setitimer(signal.ITIMER_REAL, delay)  # ends the process as SIGKILL does
        elif lines == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    files.append_line = counted
    try:
        cli.main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(70)

steps, kills = int(sys.argv[1]), int(sys.argv[2])
sys.argv = sys.argv[3:]
chance = random.Random(kills)
done = code = 0
while code in (0, -signal.SIGKILL, -signal.SIGALRM):
    lines = chance.randrange(1, max(2, steps // (kills + 1))) if done < kills else -1
    code = begin(lines, chance.choice([0.0, chance.uniform(1e-4, 0.02)]))
    if code == 0:
        break
    done += 1
print(done)
sys.exit(code)
"""


def kill_until_done(arguments: list[str], steps: int, kills: int) -> int:
    """Start the run until it ends, each time killed at a random moment; returns the kills."""
    script = [sys.executable, "-c", KILLED, str(steps), str(kills), *arguments]
    process = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return int(process.stdout)


def survives(target: Path, corpus: Corpus, tmp_path: Path, steps: int, kills: int) -> None:
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    run(command(target, corpus, whole, f"steps={steps}"))
    done = kill_until_done(command(target, corpus, parts, f"steps={steps}"), steps, kills)
    assert (whole / LOG).read_text() == (parts / LOG).read_text()  # every loss, to the last digit
    for name in ("model.safetensors", LAST.format(steps)):
        assert equal_files(whole / name, parts / name)
    assert done == kills


def test_three_kills_change_nothing(target_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    survives(target_folder, corpus, tmp_path, steps=40, kills=3)


@pytest.mark.slow
def test_fifty_kills_change_nothing(target_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    survives(target_folder, corpus, tmp_path, steps=400, kills=50)


def test_two_processes_are_twice_the_accumulation(
    target_folder: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """DDP over gloo: the same batches, the same losses, the same drafter."""
    no_dropout = ("steps=6", "dropout=0")  # dropout's draws belong to a process
    run(command(target_folder, corpus, tmp_path / "two", *no_dropout), processes=2)
    run(command(target_folder, corpus, tmp_path / "one", *no_dropout, "accumulation=2"))
    assert (tmp_path / "two" / LOG).read_text() == (tmp_path / "one" / LOG).read_text()
    assert equal_files(
        tmp_path / "two" / "model.safetensors", tmp_path / "one" / "model.safetensors"
    )


SHARDED = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from specdiff.training.checkpoint import TrainingState

def new_model(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return torch.nn.ModuleDict({"network": model})

def stepped(state, steps):
    for step in range(steps):
        torch.manual_seed(100 + step)
        x = torch.randn(4, 6)
        state.optimizer.zero_grad()
        state.model["network"](x).square().mean().backward()
        state.optimizer.step()
        state.advance(step)

def state_of(seed, sharded):
    model = new_model(seed)
    if sharded:
        for layer in (model["network"][0], model["network"][2], model["network"]):
            fully_shard(layer)
    return TrainingState(model, torch.optim.AdamW(model.parameters(), lr=0.01), 0.9)

dist.init_process_group("gloo")
plain, sharded = state_of(0, False), state_of(0, True)
stepped(plain, 3)
stepped(sharded, 3)
expected = plain.dump()
actual = sharded.dump()
again = state_of(1, True)
if dist.get_rank() == 0:
    assert expected.keys() == actual.keys(), (sorted(expected), sorted(actual))
    assert len(expected) == 4 + 4 + 12
    assert all(torch.allclose(expected[k].float(), actual[k].float(), atol=1e-6) for k in expected)
shared = [expected]
dist.broadcast_object_list(shared, 0)
again.restore(shared[0])
stepped(again, 2)
stepped(plain, 2)
expected = plain.dump()
actual = again.dump()
network = again.network()
if dist.get_rank() == 0:
    assert all(torch.allclose(expected[k].float(), actual[k].float(), atol=1e-6) for k in expected)
    assert torch.equal(network["0.weight"], actual["e.network.0.weight"])
dist.barrier()
dist.destroy_process_group()
print("SAME", flush=True)
os._exit(0)  # gloo's threads abort now and then when the interpreter tears down
"""


def test_sharded_state_is_the_plain_one(tmp_path: Path) -> None:
    """FSDP2 over two gloo processes: the saved state is whole, and restores into other shards.

    accelerate itself shards on accelerators only, so its own FSDP2 path is run by scripts/gpu.
    """
    (tmp_path / "sharded.py").write_text(SHARDED)
    arguments = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(tmp_path / "sharded.py"),
    ]
    done = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SAME") == 2
