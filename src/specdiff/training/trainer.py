"""The training loop: accelerate runs it on one process, DDP or FSDP2; every draw is keyed by its step, so resuming is exact."""

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from specdiff.errors import UsageError
from specdiff.training import checkpoint
from specdiff.training.recipe import Recipe, as_yaml, load
from specdiff.training.task import Task, TensorDict

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
SCATTER = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False, flatten_optimizer_state_dict=True)
Evaluate = Callable[[Path], dict[str, Any]]


@dataclass(slots=True)
class Progress:
    """What a run tells while it goes: after each logged step, and after each evaluation."""

    step: int
    steps: int
    seconds: float
    record: dict[str, Any]
    evaluated: dict[str, Any] | None = None


@dataclass(slots=True)
class Trainer:
    """One run in `out`: the finished folder at its top, all that resuming needs under `training/`."""

    task: Task
    recipe: Recipe
    out: Path
    accelerator: Accelerator
    training_rows: range
    held_out_rows: range
    evaluate: Evaluate | None = None
    track: Callable[[dict[str, float], int], None] | None = None
    describe: Callable[[], None] | None = None
    step: int = 0
    spent: float = 0.0
    tokens: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)
    model: Any = None
    optimizer: Any = None

    def __post_init__(self) -> None:
        decayed = [p for p in self.task.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in self.task.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, betas=self.recipe.betas)
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        self.work = self.out / "training"
        if self.recipe.ema is not None:
            self.average = {n: p.detach().clone() for n, p in self._parameters()}
        self._resume()

    work: Path = field(init=False)

    def run(self, max_seconds: float | None = None) -> Iterator[Progress]:
        """Train to the recipe's last step, or for `max_seconds` of this call; yields what is logged. The last state is saved."""
        began, start = time.monotonic(), self.spent
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._batches, self.step)
            while self.step < self.recipe.steps:
                batches = pending.result()
                if self.step + 1 < self.recipe.steps:
                    pending = ahead.submit(self._batches, self.step + 1)
                record = self._step(batches)
                self.spent = start + time.monotonic() - began
                ended = self.step == self.recipe.steps or (max_seconds is not None and self._late(self.spent - start > max_seconds))
                told = self.step % self.recipe.log_every == 0 or ended
                if told:
                    self._log("log.jsonl", record)
                evaluated = self._measure() if self.step % self.recipe.eval_every == 0 or self.step == self.recipe.steps else None
                if self.step % self.recipe.save_every == 0 or ended:
                    self.save()  # behind the logs: what a kill leaves logged beyond the checkpoint is cut on resuming
                if told or evaluated:
                    yield Progress(self.step, self.recipe.steps, self.spent, record, evaluated)
                if ended:
                    return

    def _late(self, late: bool) -> bool:
        """Whether any process is out of time: they must stop at the same step."""
        told = self.accelerator.reduce(torch.tensor(float(late), device=self.accelerator.device), reduction="sum")
        return bool(told > 0)

    def _step(self, batches: list[TensorDict]) -> dict[str, Any]:
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, told = [], {}
        self.model.train()
        for i, batch in enumerate(batches):
            torch.manual_seed(self._key(self.step, i))  # dropout draws the same after a resumption
            last = i + 1 == len(batches)
            with self.accelerator.no_sync(self.model) if not last else _nothing():
                loss, told = self.model({k: v.to(self.accelerator.device) for k, v in batch.items()}, self.step / self.recipe.steps)
                self.accelerator.backward(loss / len(batches))
            losses.append(loss.detach())
            self.tokens += int(batch["lengths"].sum()) * self.accelerator.num_processes
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._average()
        loss = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} at step {self.step}; lower lr ({self.recipe.lr}) or clip ({self.recipe.clip}), and resume")
        record = {"step": self.step, "loss": loss, "lr": rate, "norm": float(norm), "tokens": self.tokens}
        return record | {k: round(float(v), 5) for k, v in told.items()}

    def _key(self, step: int, micro: int) -> int:
        """One number per batch of the whole run: two processes draw what one with twice the accumulation draws."""
        ranks = self.accelerator.num_processes
        return (self.recipe.seed << 40) + (step * self.recipe.accumulation + micro) * ranks + self.accelerator.process_index

    def _batches(self, step: int) -> list[TensorDict]:
        made = []
        for micro in range(self.recipe.accumulation):
            g = torch.Generator().manual_seed(self._key(step, micro))
            chosen = torch.randint(len(self.training_rows), (self.recipe.rows,), generator=g).tolist()
            made.append(self.task.prepare([self.training_rows[i] for i in chosen], g))
        return made

    # the moving average

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((n.removeprefix("module."), p) for n, p in self.model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def _average(self) -> None:
        if self.recipe.ema is None:
            return
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))  # as the SEDD code: early weights are forgotten soon
        for name, parameter in self._parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    # saving and resuming

    def network_state(self) -> dict[str, Tensor]:
        """The network's tensors, averaged where the recipe says so; whole, on the host."""
        state = {k.removeprefix("network."): v for k, v in get_model_state_dict(self.model, options=WHOLE).items()}
        return state | {k.removeprefix("network."): _whole(v) for k, v in self.average.items()}

    def save(self) -> None:
        """A checkpoint, and the drafter's folder as it stands."""
        model = get_model_state_dict(self.model, options=WHOLE)
        moments = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=FLAT)
        tensors = {f"m.{k}": v for k, v in model.items()}
        tensors |= {f"e.{k}": _whole(v) for k, v in self.average.items()}
        tensors |= {f"o.{k}": v for k, v in moments.items() if isinstance(v, Tensor) and k.startswith("state.")}
        network = self.network_state()
        if self.accelerator.is_main_process:
            state = {"spent": self.spent, "tokens": self.tokens, "processes": self.accelerator.num_processes}
            self._export(network)
            checkpoint.write(self.work / "checkpoints", self.step, tensors, state)
        self.accelerator.wait_for_everyone()

    def _export(self, network: dict[str, Tensor]) -> None:
        self.task.export(self.out, network)
        if self.describe is not None:
            self.describe()

    def one_step(self) -> dict[str, Any]:
        """A step on this step's own batches: what `run` does between its bookkeeping."""
        return self._step(self._batches(self.step))

    def _resume(self) -> None:
        kept = self.work / "recipe.yaml"
        found = checkpoint.complete(self.work / "checkpoints")
        if kept.exists() and found and load(str(kept)) != self.recipe:
            old, new = load(str(kept)).model_dump(), self.recipe.model_dump()
            name = next(k for k in new if old[k] != new[k])
            raise UsageError(
                f"{self.out} was begun with {name} = {old[name]!r}, not {new[name]!r}; repeat that recipe to go on, or choose another --out"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.work.mkdir(parents=True, exist_ok=True)
            kept.write_text(as_yaml(self.recipe), encoding="utf-8")
        if not found:
            self._cut_logs(0)
            return
        tensors, state = checkpoint.read(found[-1])
        part = {p: {k[2:]: v for k, v in tensors.items() if k.startswith(p)} for p in ("m.", "e.", "o.")}
        set_model_state_dict(self.model, part["m."], options=StateDictOptions(full_state_dict=True, strict=True))
        moments = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=FLAT) | part["o."]
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, moments, options=SCATTER)
        for name, tensor in self.average.items():
            _assign(tensor, part["e."][name])
        self.step, self.spent, self.tokens = int(state["step"]), float(state["spent"]), int(state["tokens"])
        self._cut_logs(self.step)

    def _measure(self) -> dict[str, Any]:
        held_out = self._held_out_loss()
        evaluated: dict[str, Any] = {"step": self.step, "minutes": round(self.spent / 60, 2), "tokens": self.tokens, **held_out}
        network = self.network_state()
        if self.accelerator.is_main_process:
            if self.evaluate is not None:
                self._export(network)
                evaluated |= self.evaluate(self.out)
            self._log("curve.jsonl", evaluated)
        self.accelerator.wait_for_everyone()
        return evaluated

    @torch.no_grad()
    def _held_out_loss(self) -> dict[str, Any]:
        """Mean over fixed batches of held-out rows, at the weights being trained."""
        self.model.eval()
        losses, told = [], []
        for start in range(0, min(len(self.held_out_rows), 64), self.recipe.rows):
            chosen = list(self.held_out_rows[start : start + self.recipe.rows])
            batch = self.task.prepare(chosen, torch.Generator().manual_seed(start))
            loss, metrics = self.model({k: v.to(self.accelerator.device) for k, v in batch.items()}, 1.0)
            losses.append(loss.item())
            told.append({k: float(v) for k, v in metrics.items()})
        mean = {f"held_out_{k}": round(sum(t[k] for t in told) / len(told), 4) for k in told[0]}
        return {"held_out_loss": round(sum(losses) / len(losses), 4), **mean}

    def _log(self, name: str, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        with (self.work / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.track is not None:
            self.track({k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}, record["step"])

    def _cut_logs(self, step: int) -> None:
        """Forget what was logged behind the checkpoint: those steps will run again."""
        if not self.accelerator.is_main_process:
            return
        for name in ("log.jsonl", "curve.jsonl"):
            path = self.work / name
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
                path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to `final_lr` times the peak; step counts from 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class _nothing:  # noqa: N801
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def _whole(tensor: Tensor) -> Tensor:
    """A plain host copy of a parameter, gathered where FSDP sharded it."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().cpu()


def _assign(tensor: Tensor, value: Tensor) -> None:
    if getattr(tensor, "full_tensor", None) is None:
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    placed: Any = tensor
    tensor.copy_(distribute_tensor(value.to(placed.device), placed.device_mesh, placed.placements))
