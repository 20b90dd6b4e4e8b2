"""The trainer: a loop that accelerate runs on one process, DDP or FSDP2, and that resumes exactly.

Every random draw is keyed by its step.
"""

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
from torch import Tensor

from specdiff import files
from specdiff.errors import StorageError, UsageError
from specdiff.training import checkpoint
from specdiff.training.batches import TrainingBatch
from specdiff.training.checkpoint import TrainingState
from specdiff.training.recipe import Recipe
from specdiff.training.task import Metrics, Task

HELD_OUT_ROWS = 64  # maximum rows of the held-out loss


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One logged step of a run; one that is measured comes again with `evaluated`."""

    step: int
    steps: int
    seconds: float
    record: dict[str, Any]
    evaluated: dict[str, Any] | None = None


@dataclass(slots=True)
class Trainer:
    """One run in the folder `out`: the drafter at its top, what resuming needs in `training/`.

    `sources` are the digests of what it learns from. `evaluate(folder)` measures the exported
    drafter, `describe()` writes its card, `track(values, step)` logs to a tracker.

    A new trainer locks the folder until its run ends, and resumes from the last complete
    checkpoint.

    Raises:
        UsageError: that checkpoint was begun with another recipe.
        CorpusError: it was begun with other sources.
        StorageError: another process trains in that folder.
    """

    task: Task[Any]
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
    state: TrainingState = field(init=False)
    lock: BaseFileLock | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        recipe = self.recipe
        parameters = [p for p in self.task.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        self.state = TrainingState(self.model, self.optimizer.optimizer, recipe.ema)
        self._acquire()
        try:
            self._resume()
        except BaseException:
            self._release()
            raise

    def run(self, max_seconds: float | None = None) -> Iterator[TrainingProgress]:
        """Train to the recipe's last step, or for `max_seconds` from now.

        Yields the logged steps; the last state is saved.
        """
        self._acquire()
        try:
            yield from self._run(max_seconds)
        except StorageError as error:
            checkpoints = checkpoint.complete(self._checkpoints)
            last = "there is no checkpoint yet"
            if checkpoints:
                last = f"the checkpoint of step {int(checkpoints[-1].name)} is intact"
            raise StorageError(
                f"{error}; {last}: make room, then repeat the command to resume"
            ) from error
        finally:
            self._release()

    def _run(self, max_seconds: float | None) -> Iterator[TrainingProgress]:
        start = time.monotonic()
        before = self.spent
        if self.due() and not self._measured():  # killed while it was measured
            yield self._progress({"step": self.step}, self._measure())
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._batches, self.step)
            while self.step < self.recipe.steps:
                batches = pending.result()
                if self.step + 1 < self.recipe.steps:
                    pending = ahead.submit(self._batches, self.step + 1)
                record = self._step(batches)
                self.spent = before + time.monotonic() - start
                stopping = max_seconds is not None and self._any(self.spent - before > max_seconds)
                yield from self._finish_step(record, stopping)
                if stopping:
                    return

    def one_step(self) -> dict[str, Any]:
        """A step on this step's own batches, without logs and checkpoints: for timing."""
        return self._step(self._batches(self.step))

    def save(self) -> None:
        """Write a checkpoint, and the folder's own files. Every process must call it."""
        tensors = self.state.dump()
        network = self.state.network()
        if self.accelerator.is_main_process:
            self._export(network)
            if self.describe is not None:
                self.describe()
            state = {
                "spent": self.spent,
                "tokens": self.tokens,
                "processes": self.accelerator.num_processes,
            }
            checkpoint.write(self._checkpoints, self.step, tensors, state)
        self.accelerator.wait_for_everyone()

    def _export(self, network: Mapping[str, Tensor]) -> None:
        """Replace the folder's own files one by one; a disk that fills up leaves the old ones."""
        staged = self._work / "export"
        with files.staged_folder(staged) as folder:
            self.task.export(folder, network)
        with files.storing(self.out):
            for path in sorted(staged.iterdir()):
                path.replace(self.out / path.name)
            staged.rmdir()

    # one step

    def _step(self, batches: list[TrainingBatch]) -> dict[str, Any]:
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: Metrics = {}
        self.model.train()
        for i, batch in enumerate(batches):
            torch.manual_seed(self._key(self.step, i))  # dropout draws the same after a resumption
            last = i + 1 == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, metrics = self._loss(batch, self.step / self.recipe.steps)
                self.accelerator.backward(loss / len(batches))
            tokens = batch.lengths.sum().to(loss.device, torch.float32)
            metrics = {"loss": loss.detach(), "tokens": tokens, **metrics}
            sums = {name: value + sums.get(name, 0) for name, value in metrics.items()}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.state.advance(self.step)
        totals = self._sum_over_processes(sums)
        self.tokens += round(totals.pop("tokens"))
        count = len(batches) * self.accelerator.num_processes
        means = {name: total / count for name, total in totals.items()}
        if not math.isfinite(means["loss"]):
            raise UsageError(
                f"the loss is {means['loss']} at step {self.step}; train in another --out with a "
                f"lower lr ({self.recipe.lr}) or clip ({self.recipe.clip})"
            )
        return {"step": self.step, **means, "lr": rate, "norm": float(norm), "tokens": self.tokens}

    def _loss(self, batch: TrainingBatch, progress: float) -> tuple[Tensor, Metrics]:
        loss, metrics = self.model(batch.to(self.accelerator.device), progress)
        return loss, metrics

    def _sum_over_processes(self, sums: Metrics) -> dict[str, float]:
        stacked = torch.stack(list(sums.values()))
        totals = self.accelerator.reduce(stacked, reduction="sum").tolist()
        return dict(zip(sums, totals, strict=True))

    def _any(self, here: bool) -> bool:
        """Whether it holds on any process: all must stop at the same step."""
        count = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum") > 0)

    def _key(self, step: int, micro: int) -> int:
        """One number per batch of a run: two processes draw what twice the accumulation draws."""
        ranks: int = self.accelerator.num_processes
        rank: int = self.accelerator.process_index
        return (self.recipe.seed << 40) + (step * self.recipe.accumulation + micro) * ranks + rank

    def _batches(self, step: int) -> list[TrainingBatch]:
        batches = []
        count = len(self.training_rows)
        for micro in range(self.recipe.accumulation):
            generator = torch.Generator().manual_seed(self._key(step, micro))
            indices = torch.randint(count, (self.recipe.rows,), generator=generator).tolist()
            rows = [self.training_rows[i] for i in indices]
            batches.append(self.task.prepare(rows, generator))
        return batches

    # what follows a step

    def _finish_step(self, record: dict[str, Any], stopping: bool) -> Iterator[TrainingProgress]:
        """Log, save, then measure.

        What a kill leaves in the logs beyond the last checkpoint is cut on resuming.
        """
        recipe = self.recipe
        due = self.due()
        ended = stopping or self.step == recipe.steps
        logged = self.step % recipe.log_every == 0 or ended or due
        if logged:
            self._log("log.jsonl", record)
        if self.step % recipe.save_every == 0 or ended or due:
            self.save()
        if logged:
            yield self._progress(record)
        if due:
            yield self._progress(record, self._measure())

    def _progress(
        self, record: dict[str, Any], evaluated: dict[str, Any] | None = None
    ) -> TrainingProgress:
        return TrainingProgress(self.step, self.recipe.steps, self.spent, record, evaluated)

    def due(self) -> bool:
        """Whether the run is to be measured at this step."""
        last = self.step == self.recipe.steps
        return self.step > 0 and (self.step % self.recipe.eval_every == 0 or last)

    def _measured(self) -> bool:
        curve = self._work / "curve.jsonl"
        if not curve.exists():
            return False
        lines = curve.read_text(encoding="utf-8").splitlines()
        return any(json.loads(line)["step"] == self.step for line in lines)

    def _measure(self) -> dict[str, Any]:
        point = {
            "step": self.step,
            "minutes": round(self.spent / 60, 2),
            "tokens": self.tokens,
            **self.held_out(),
        }
        if self.accelerator.is_main_process:
            if self.evaluate is not None:
                point |= self.evaluate(self.out)  # the exported files, as users run them
            self._log("curve.jsonl", point)
            if self.describe is not None:
                self.describe()
        self.accelerator.wait_for_everyone()
        return point

    @torch.no_grad()
    def held_out(self) -> dict[str, Any]:
        """Losses of fixed batches of held-out rows, at the current weights."""
        self.model.eval()
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        starts = range(0, min(len(self.held_out_rows), HELD_OUT_ROWS), self.recipe.rows)
        for start in starts:
            rows = list(self.held_out_rows[start : start + self.recipe.rows])
            batch = self.task.prepare(rows, torch.Generator().manual_seed(start))
            loss, metrics = self._loss(batch, 1.0)
            for name, value in ({"loss": loss} | metrics).items():
                sums[name] = sums.get(name, 0.0) + float(value)
                counts[name] = counts.get(name, 0) + 1  # not every batch has every metric
        return {f"held_out_{name}": round(value / counts[name], 4) for name, value in sums.items()}

    # the folder

    @property
    def _work(self) -> Path:
        return self.out / "training"

    @property
    def _checkpoints(self) -> Path:
        return self._work / "checkpoints"

    def _log(self, name: str, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        files.append_line(self._work / name, json.dumps(record))
        if self.track is not None:
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
            step = int(numbers.pop("step"))
            self.track(numbers, step)

    def _acquire(self) -> None:
        if self.lock is None and self.accelerator.is_main_process:
            self.lock = files.lock(self._work)

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _resume(self) -> None:
        checkpoints = checkpoint.complete(self._checkpoints)
        if checkpoints:
            checkpoint.check_origin(self.out, self.recipe, self.sources)
            tensors, state = checkpoint.read(checkpoints[-1])
            self.state.restore(tensors)
            self.step = int(state["step"])
            self.spent = float(state["spent"])
            self.tokens = int(state["tokens"])
        self.accelerator.wait_for_everyone()  # no process writes while another reads
        if self.accelerator.is_main_process:
            checkpoint.write_origin(self.out, self.recipe, self.sources)
            for path in self._work.glob("*.jsonl"):
                checkpoint.truncate_log(path, self.step)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to `final_lr` times the peak; step counts from 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)
