"""From a target, a corpus and a recipe to a run that is ready to go on."""

import importlib
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from specdiff import catalog
from specdiff.data import generate
from specdiff.data.corpus import Corpus
from specdiff.errors import CorpusError, MissingExtraError, UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.text.lm import SpeculativeLM
from specdiff.text.load import tokenizer_of
from specdiff.training import evaluation, initialize, model_card
from specdiff.training.causal_task import AutoregressiveTask
from specdiff.training.recipe import Recipe
from specdiff.training.score_entropy_task import SEDDTask
from specdiff.training.target_task import TargetTask
from specdiff.training.task import Task
from specdiff.training.teacher import OnlineTeacher, PrecomputedTeacher, Teacher
from specdiff.training.trainer import Trainer, check_folder

TRACKERS = ("none", "tensorboard", "trackio")


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
    license: str = "apache-2.0",
    log_to: str = "none",
) -> Plan:
    """Load everything, resume if `out` holds a checkpoint, and check that all of it fits together.

    Raises CorpusError, ConfigError, UsageError, ... each naming the value and the fix.
    """
    if log_to not in TRACKERS:
        raise UsageError(f"unknown --log-to {log_to!r}; known are {', '.join(TRACKERS)}")
    corpus = Corpus(data)
    corpus.verify()
    training, held_out = corpus.split(recipe.held_out)
    check_folder(out)
    accelerator = accelerator_for(recipe, device)
    torch.manual_seed(recipe.seed)
    trained = recipe.kind == "target"
    target, folder = catalog.target(
        model,
        torch.float32 if trained or accelerator.device.type == "cpu" else None,
        accelerator.device,
    )
    assert isinstance(target, CausalTarget)
    if corpus.manifest["vocab_size"] != target.info.vocab_size:
        raise CorpusError(
            f"{data} holds tokens of a vocabulary of {corpus.manifest['vocab_size']}, but {model} has {target.info.vocab_size}; "
            f"make its corpus with:  specdiff data --model {model} --out DIR"
        )
    model_folder = generate.model_files(model)
    if out.exists() and out.resolve() == model_folder.resolve():
        raise UsageError(
            f"--out {out} is the target's own folder, whose weights would be replaced; choose another --out"
        )
    identity = generate.identity(model)
    _compare(corpus, identity)
    sources = {"corpus": corpus.digest, "target": identity["target_weights"]}
    tokenizer = tokenizer_of(folder)
    task = _task(
        recipe, corpus, training, target, tokenizer, catalog.same_target(model), sources["target"]
    )
    evaluate = None
    if not trained:
        prompts = evaluation.held_out_prompts(corpus, held_out, recipe.eval_prompts)
        ends = SpeculativeLM(target, "none", tokenizer, 2).end_ids
        evaluate = partial(
            evaluation.of_folder,
            target=target,
            prompts=prompts,
            max_tokens=recipe.eval_tokens,
            stop_ids=ends,
        )

    def describe() -> None:
        model_card.write(
            out,
            recipe,
            corpus,
            model,
            command,
            task.sizes(),
            base_model=catalog.hub_id(model),
            license=license,
        )

    trainer = Trainer(
        task,
        recipe,
        out,
        accelerator,
        training,
        held_out,
        sources,
        evaluate=lambda folder: evaluate(str(folder)) if evaluate else {},
        describe=describe,
        track=_tracker(log_to, out, recipe) if accelerator.is_main_process else None,
    )
    return Plan(trainer, target, corpus)


def _compare(corpus: Corpus, identity: Mapping[str, str]) -> None:
    """Warn of a corpus that another target wrote: possible, but rarely meant. Texts stored verbatim are nobody's."""
    about = corpus.manifest["about"]
    name = "target_weights" if "target_weights" in about else "target_sha256"
    if "temperatures" in about and about.get(name) != identity[name]:
        warnings.warn(
            f"{corpus.folder} was written by {about.get('target')} ({name} {about.get(name)}), not by {identity['target']} "
            f"({identity[name]}); a drafter learns most from its own target's text",
            stacklevel=3,
        )


def accelerator_for(recipe: Recipe, device: str) -> Accelerator:
    """One process, DDP or FSDP2, as accelerate's own configuration and launcher say."""
    cuda = torch.cuda.is_available() and device != "cpu"
    bf16 = recipe.precision == "bf16" or (
        recipe.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return Accelerator(
        cpu=not cuda and device in ("auto", "cpu"), mixed_precision="bf16" if bf16 else "no"
    )


def _task(
    recipe: Recipe,
    corpus: Corpus,
    training: Sequence[int],
    target: CausalTarget,
    tokenizer: Any,
    targets: list[str],
    target_weights: str,
) -> Task:
    model = target.model
    if recipe.kind == "target":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return TargetTask(recipe, corpus, model, tokenizer)
    model.requires_grad_(False)
    teacher: Teacher | None = None
    if recipe.objective == "distill":
        if corpus.has_features:
            corpus.check_features(target_weights)
        teacher = PrecomputedTeacher(corpus) if corpus.has_features else OnlineTeacher(model)
        if target.info.head is None:
            raise UsageError(
                f"{model.config.model_type} has no plain output matrix to learn from; train with --set objective=denoise"
            )
    about = {"targets": targets}
    if recipe.kind == "sedd":
        return SEDDTask(
            recipe,
            corpus,
            initialize.sedd(recipe, corpus, training, model),
            target.info.head,
            teacher,
            about,
        )
    return AutoregressiveTask(
        recipe,
        corpus,
        initialize.autoregressive(recipe, corpus, training, model),
        target.info.head,
        teacher,
        about,
    )


def forecast(plan: Plan, steps: int = 3) -> dict[str, Any]:
    """Sizes, memory and time of a run, from a few real steps, the first left out. Nothing is saved."""
    trainer, times = plan.trainer, []
    before = trainer.tokens
    for _ in range(steps + 1):
        begin = time.perf_counter()
        trainer.one_step()
        times.append(time.perf_counter() - begin)
    sizes = trainer.task.sizes()
    copies = 4 + (
        trainer.recipe.ema is not None
    )  # weights, gradients, two moments, and the moving average
    cuda = trainer.accelerator.device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return sizes | {
        "corpus_tokens": plan.corpus.tokens,
        "tokens_per_step": (trainer.tokens - before) / len(times),
        "state_bytes": sizes["trained"] * 4 * copies,
        "peak_bytes": peak,
        "seconds_per_step": sorted(times[1:])[steps // 2],
        "steps": trainer.recipe.steps,
    }


def _tracker(
    name: str, out: Path, recipe: Recipe
) -> Callable[[dict[str, float], int], None] | None:
    """A function that logs to tensorboard or trackio. Raises MissingExtraError if that is not installed."""
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            board: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
                str(out / "training" / "tensorboard")
            )

            def to_tensorboard(values: dict[str, float], step: int) -> None:
                for key, value in values.items():
                    board.add_scalar(key, value, step)
                board.flush()

            return to_tensorboard
        trackio: Any = importlib.import_module("trackio")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--log-to {name} needs {error.name}:  pip install {name}"
        ) from None
    trackio.init(project="specdiff", name=out.name, config=recipe.model_dump())

    def to_trackio(values: dict[str, float], step: int) -> None:
        trackio.log(values, step=step)

    return to_trackio
