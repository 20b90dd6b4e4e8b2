"""From a target, a corpus and a recipe to a run that is ready to go on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from specdiff import catalog
from specdiff.errors import CorpusError, UsageError
from specdiff.lm import SpeculativeLM, tokenizer_of
from specdiff.targets.causal import CausalTarget
from specdiff.training import card, evaluation, networks
from specdiff.training.autoregressive import AutoregressiveTask
from specdiff.training.corpus import Corpus
from specdiff.training.recipe import Recipe
from specdiff.training.sedd import SEDDTask
from specdiff.training.target import TargetTask
from specdiff.training.task import Task
from specdiff.training.teacher import OnlineTeacher, PrecomputedTeacher, Teacher
from specdiff.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before its first step: the trainer, and what it was made of."""

    trainer: Trainer
    target: CausalTarget
    corpus: Corpus


def prepare(
    recipe: Recipe,
    *,
    model: str,
    data: Path,
    out: Path,
    device: str = "auto",
    command: str = "specdiff train",
    licence: str = "apache-2.0",
    track: Callable[[dict[str, float], int], None] | None = None,
) -> Plan:
    """Load everything, resume if `out` holds a checkpoint, and check that all of it fits together.

    Raises CorpusError, ConfigError, UsageError, ... each naming the value and the fix.
    """
    corpus = Corpus(data)
    training, held_out = corpus.split(recipe.held_out)
    accelerator = accelerator_for(recipe, device)
    torch.manual_seed(recipe.seed)
    trained = recipe.kind == "target"
    target, folder = catalog.target(model, torch.float32 if trained or accelerator.device.type == "cpu" else None, accelerator.device)
    assert isinstance(target, CausalTarget)
    if corpus.manifest["vocab_size"] != target.info.vocab_size:
        raise CorpusError(
            f"{data} holds tokens of a vocabulary of {corpus.manifest['vocab_size']}, but {model} has {target.info.vocab_size}; "
            f"make its corpus with:  specdiff data --model {model} --out DIR"
        )
    tokenizer = tokenizer_of(folder)
    task = _task(recipe, corpus, training, target, tokenizer, catalog.same_target(model))
    evaluate = None
    if not trained and recipe.process == "absorb":  # nothing drafts with the uniform process; its held-out loss is logged
        prompts = evaluation.held_out_prompts(corpus, held_out, recipe.eval_prompts)
        ends = SpeculativeLM(target, "none", tokenizer, 2).end_ids
        evaluate = partial(evaluation.of_folder, target=target, prompts=prompts, max_tokens=recipe.eval_tokens, stop_ids=ends)

    def describe() -> None:
        card.write(out, recipe, corpus, model, command, task.sizes(), base_model=catalog.hub_id(model), licence=licence)

    trainer = Trainer(
        task, recipe, out, accelerator, training, held_out, evaluate=lambda folder: evaluate(str(folder)) if evaluate else {}, track=track,
        describe=describe,
    )  # fmt: skip
    return Plan(trainer, target, corpus)


def accelerator_for(recipe: Recipe, device: str) -> Accelerator:
    """One process, DDP or FSDP2, as accelerate's own configuration and launcher say."""
    cuda = torch.cuda.is_available() and device != "cpu"
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    return Accelerator(cpu=not cuda and device in ("auto", "cpu"), mixed_precision="bf16" if bf16 else "no")


def _task(recipe: Recipe, corpus: Corpus, training: range, target: CausalTarget, tokenizer: Any, targets: list[str]) -> Task:
    model = target.model
    if recipe.kind == "target":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return TargetTask(recipe, corpus, model, tokenizer)
    model.requires_grad_(False)
    teacher: Teacher | None = None
    if recipe.objective == "distill":
        teacher = PrecomputedTeacher(corpus) if corpus.has_features else OnlineTeacher(model)
        if target.info.head is None:
            raise UsageError(f"{model.config.model_type} has no plain output matrix to learn from; train with --set objective=denoise")
    about = {"targets": targets}
    if recipe.kind == "sedd":
        return SEDDTask(recipe, corpus, networks.sedd(recipe, corpus, training, model), target.info.head, teacher, about)
    return AutoregressiveTask(recipe, corpus, networks.autoregressive(recipe, corpus, training, model), target.info.head, teacher, about)


def seconds_per_step(trainer: Trainer, steps: int = 3) -> float:
    """Median time of a few real steps, the first left out. Nothing is saved."""
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        trainer.one_step()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[steps // 2]
