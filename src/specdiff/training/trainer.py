"""The training loop: accelerate runs it on one process, DDP or FSDP2; every draw is keyed by its step, so resuming is exact."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import BaseFileLock

from specdiff import files
from specdiff.data.records import read_text
from specdiff.errors import CorpusError, StorageError, UsageError
from specdiff.training import checkpoint
from specdiff.training.recipe import Recipe, as_yaml, load
from specdiff.training.state import State
from specdiff.training.task import Task, TensorDict

HELD_OUT_ROWS = 64  # most rows the held-out loss is averaged over
RECIPE = "recipe.yaml"
SOURCES = "sources.json"


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """What a run tells while it goes: `record` of a logged step; once more with `evaluated` where it was measured."""

    step: int
    steps: int
    seconds: float
    record: dict[str, Any]
    evaluated: dict[str, Any] | None = None


@dataclass(slots=True)
class Trainer:
    """One run in `out`: the finished folder at its top, all that resuming needs under `training/`.

    `sources` are the digests of what it learns from. `evaluate(folder)` measures the exported drafter, `describe()` writes its
    card, `track(values, step)` logs to a tracker. Building it locks the folder until the run ends, and resumes from the last
    complete checkpoint. Raises UsageError if that was begun with another recipe,
    CorpusError if it was begun with other sources, StorageError if another process trains there.
    """

    task: Task
    recipe: Recipe
    out: Path
    accelerator: Accelerator
    training_rows: Sequence[int]
    held_out_rows: Sequence[int]
    sources: Mapping[str, str]
    evaluate: Callable[[Path], dict[str, Any]] | None = None
    describe: Callable[[], None] | None = None
    track: Callable[[dict[str, float], int], None] | None = None
    step: int = 0
    spent: float = 0.0
    tokens: int = 0
    model: Any = field(init=False)
    optimizer: Any = field(init=False)
    state: State = field(init=False)
    lock: BaseFileLock | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        recipe, trained = self.recipe, [p for p in self.task.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        self.state = State(self.model, self.optimizer.optimizer, recipe.ema)
        self._acquire()
        try:
            self._resume()
        except BaseException:
            self._release()
            raise

    def run(self, max_seconds: float | None = None) -> Iterator[TrainingProgress]:
        """Train to the recipe's last step, or for `max_seconds` from now; yields what is logged. The last state is saved."""
        self._acquire()
        try:
            yield from self._run(max_seconds)
        except StorageError as error:
            complete = checkpoint.complete(self._work / "checkpoints")
            last = (
                f"the checkpoint of step {int(complete[-1].name)} is intact"
                if complete
                else "there is no checkpoint yet"
            )
            raise StorageError(
                f"{error}; {last}: make room, then repeat the command to resume"
            ) from error
        finally:
            self._release()

    def _run(self, max_seconds: float | None) -> Iterator[TrainingProgress]:
        began, before = time.monotonic(), self.spent
        if self.due() and not self._measured():  # killed while it was measured
            yield TrainingProgress(
                self.step, self.recipe.steps, self.spent, {"step": self.step}, self._measure()
            )
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._batches, self.step)
            while self.step < self.recipe.steps:
                batches = pending.result()
                if self.step + 1 < self.recipe.steps:
                    pending = ahead.submit(self._batches, self.step + 1)
                record = self._step(batches)
                self.spent = before + time.monotonic() - began
                stopping = max_seconds is not None and self._any(self.spent - before > max_seconds)
                yield from self._keep_books(record, stopping)
                if stopping:
                    return

    def one_step(self) -> dict[str, Any]:
        """A step on this step's own batches, and nothing around it: for timing."""
        return self._step(self._batches(self.step))

    def save(self) -> None:
        """A checkpoint, and the folder as it stands. Every process must call it."""
        tensors, network = self.state.dump(), self.state.network()
        if self.accelerator.is_main_process:
            self._export(network)
            if self.describe is not None:
                self.describe()
            told = {
                "spent": self.spent,
                "tokens": self.tokens,
                "processes": self.accelerator.num_processes,
            }
            checkpoint.write(self._work / "checkpoints", self.step, tensors, told)
        self.accelerator.wait_for_everyone()

    def _export(self, network: TensorDict) -> None:
        """The folder's own files: written aside, then each moved into its place. A disk that fills up leaves the old ones."""
        staged = self._work / "export"
        with files.staged_folder(staged) as folder:
            self.task.export(folder, network)
        with files.storing(self.out):
            for path in sorted(staged.iterdir()):
                path.replace(self.out / path.name)
            staged.rmdir()

    # one step

    def _step(self, batches: list[TensorDict]) -> dict[str, Any]:
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: TensorDict = {}
        self.model.train()
        for i, batch in enumerate(batches):
            torch.manual_seed(self._key(self.step, i))  # dropout draws the same after a resumption
            last = i + 1 == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, told = self._loss(batch, self.step / self.recipe.steps)
                self.accelerator.backward(loss / len(batches))
            told = {
                "loss": loss.detach(),
                "tokens": batch["lengths"].sum().to(loss.device, torch.float32),
                **told,
            }
            sums = {name: value + sums.get(name, 0) for name, value in told.items()}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.state.advance(self.step)
        total = dict(
            zip(
                sums,
                self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist(),
                strict=True,
            )
        )
        self.tokens += round(total.pop("tokens"))
        mean = {
            name: value / (len(batches) * self.accelerator.num_processes)
            for name, value in total.items()
        }
        if not math.isfinite(mean["loss"]):
            raise UsageError(
                f"the loss is {mean['loss']} at step {self.step}; go on from the last checkpoint in another --out with a lower lr "
                f"({self.recipe.lr}) or clip ({self.recipe.clip})"
            )
        return {"step": self.step, **mean, "lr": rate, "norm": float(norm), "tokens": self.tokens}

    def _loss(self, batch: TensorDict, progress: float) -> tuple[torch.Tensor, TensorDict]:
        loss, told = self.model(
            {k: v.to(self.accelerator.device) for k, v in batch.items()}, progress
        )
        return loss, told

    def _key(self, step: int, micro: int) -> int:
        """One number per batch of the whole run: two processes draw what one with twice the accumulation draws."""
        ranks: int = self.accelerator.num_processes
        rank: int = self.accelerator.process_index
        return (self.recipe.seed << 40) + (step * self.recipe.accumulation + micro) * ranks + rank

    def _batches(self, step: int) -> list[TensorDict]:
        made = []
        for micro in range(self.recipe.accumulation):
            g = torch.Generator().manual_seed(self._key(step, micro))
            chosen = torch.randint(
                len(self.training_rows), (self.recipe.rows,), generator=g
            ).tolist()
            made.append(self.task.prepare([self.training_rows[i] for i in chosen], g))
        return made

    def _any(self, here: bool) -> bool:
        """Whether it is so on any process: all must stop at the same step."""
        return bool(
            self.accelerator.reduce(
                torch.tensor(float(here), device=self.accelerator.device), reduction="sum"
            )
            > 0
        )

    # what is logged, measured and saved around it

    def _keep_books(self, record: dict[str, Any], stopping: bool) -> Iterator[TrainingProgress]:
        """Logs before the checkpoint: what a kill leaves logged beyond it is cut on resuming. Then the long work of measuring."""
        recipe = self.recipe
        ended, due = stopping or self.step == recipe.steps, self.due()
        logged = self.step % recipe.log_every == 0 or ended or due
        if logged:
            self._log("log.jsonl", record)
        if self.step % recipe.save_every == 0 or ended or due:
            self.save()
        if logged:
            yield TrainingProgress(self.step, recipe.steps, self.spent, record)
        if due:
            yield TrainingProgress(self.step, recipe.steps, self.spent, record, self._measure())

    def due(self) -> bool:
        """Whether the run is to be measured at this step."""
        return self.step > 0 and (
            self.step % self.recipe.eval_every == 0 or self.step == self.recipe.steps
        )

    def _measured(self) -> bool:
        curve = self._work / "curve.jsonl"
        return curve.exists() and any(
            json.loads(line)["step"] == self.step
            for line in curve.read_text(encoding="utf-8").splitlines()
        )

    def _measure(self) -> dict[str, Any]:
        evaluated = {
            "step": self.step,
            "minutes": round(self.spent / 60, 2),
            "tokens": self.tokens,
            **self.held_out(),
        }
        if self.accelerator.is_main_process:
            if self.evaluate is not None:
                evaluated |= self.evaluate(
                    self.out
                )  # what was just exported: the very files a user runs
            self._log("curve.jsonl", evaluated)
            if self.describe is not None:
                self.describe()
        self.accelerator.wait_for_everyone()
        return evaluated

    @torch.no_grad()
    def held_out(self) -> dict[str, Any]:
        """Losses of fixed batches of held-out rows, at the weights being trained."""
        self.model.eval()
        sums: dict[str, float] = {}
        starts = range(0, min(len(self.held_out_rows), HELD_OUT_ROWS), self.recipe.rows)
        for start in starts:
            chosen = list(self.held_out_rows[start : start + self.recipe.rows])
            loss, told = self._loss(
                self.task.prepare(chosen, torch.Generator().manual_seed(start)), 1.0
            )
            for name, value in ({"loss": loss} | told).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {f"held_out_{name}": round(value / len(starts), 4) for name, value in sums.items()}

    @property
    def _work(self) -> Path:
        return self.out / "training"

    def _log(self, name: str, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        files.append_line(self._work / name, json.dumps(record))
        if self.track is not None:
            self.track(
                {
                    k: float(v)
                    for k, v in record.items()
                    if isinstance(v, int | float) and k != "step"
                },
                record["step"],
            )

    def _acquire(self) -> None:
        if self.lock is None and self.accelerator.is_main_process:
            self.lock = files.lock(self._work)

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _resume(self) -> None:
        checkpoints = checkpoint.complete(self._work / "checkpoints")
        if checkpoints:
            self._same()
            tensors, state = checkpoint.read(checkpoints[-1])
            self.state.restore(tensors)
            self.step = int(state["step"])
            self.spent = float(state["spent"])
            self.tokens = int(state["tokens"])
        self.accelerator.wait_for_everyone()  # nobody writes while another still reads
        if self.accelerator.is_main_process:
            files.write_text(self._work / RECIPE, as_yaml(self.recipe))
            files.write_json(self._work / SOURCES, dict(self.sources))
            for path in self._work.glob("*.jsonl"):
                lines = path.read_text(encoding="utf-8").splitlines()
                known = [
                    line
                    for line in lines
                    if line.endswith("}") and json.loads(line)["step"] <= self.step
                ]
                files.write_text(path, "".join(f"{line}\n" for line in known))

    def _same(self) -> None:
        """The checkpoint was begun with this recipe and these sources (which runs of earlier versions did not record)."""
        recipe, sources = self._work / RECIPE, self._work / SOURCES
        old = load(str(recipe)) if recipe.exists() else self.recipe
        if old != self.recipe:
            name = next(
                n for n in Recipe.model_fields if getattr(old, n) != getattr(self.recipe, n)
            )
            raise UsageError(
                f"{self.out} was begun with {name} = {getattr(old, name)!r}, not {getattr(self.recipe, name)!r}; repeat that recipe to "
                f"resume, or choose another --out"
            )
        begun = json.loads(read_text(sources)) if sources.exists() else {}
        for name, digest in self.sources.items():
            if begun.get(name, digest) != digest:
                raise CorpusError(
                    f"{self.out} was begun with another {name}: SHA-256 {begun[name]}, not {digest}; give the same {name} to "
                    f"resume, or choose another --out"
                )


def check_folder(out: Path) -> None:
    """Raises UsageError if `out` holds files that no training run put there."""
    if (out / "training" / RECIPE).exists() or not out.is_dir():
        return
    others = sorted(
        p.name for p in out.iterdir() if not p.name.startswith(".") and p.name != "training"
    )
    if others:
        raise UsageError(
            f"{out} holds {others[0]}, but no training/{RECIPE}: no run of specdiff began it; choose another --out"
        )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to `final_lr` times the peak; step counts from 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (
        recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
    )
