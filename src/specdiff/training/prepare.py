"""Preparing a training run: from a target, a corpus and a recipe to a trainer."""

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
from accelerate.state import AcceleratorState

from specdiff import catalog
from specdiff.data import generate
from specdiff.data.corpus import Corpus
from specdiff.devices import native_half
from specdiff.errors import CorpusError, MissingExtraError, UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.text.lm import SpeculativeLM
from specdiff.text.load import tokenizer_of
from specdiff.training import evaluation, initialize, initialize_block, model_card
from specdiff.training.block_task import BlockTask, widen_norms
from specdiff.training.canvas_task import CanvasTask
from specdiff.training.causal_task import AutoregressiveTask, TargetTask
from specdiff.training.checkpoint import check_folder
from specdiff.training.recipe import Recipe
from specdiff.training.score_entropy_task import ScoreEntropyTask
from specdiff.training.task import Task
from specdiff.training.teacher import OnlineTeacher, PrecomputedTeacher, Teacher
from specdiff.training.trainer import Trainer

TRACKERS = ("none", "tensorboard", "trackio")


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run before its next step: the trainer, and what it was built from."""

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
) -> TrainingRun:
    """Load everything, check that it fits together, and resume if `out` holds a checkpoint.

    Raises CorpusError, ConfigError, UsageError, ... each naming the value and the fix.
    """
    if log_to not in TRACKERS:
        raise UsageError(f"unknown --log-to {log_to!r}; known are {', '.join(TRACKERS)}")
    corpus = Corpus(data)
    corpus.verify()
    check_folder(out)
    accelerator = accelerator_for(recipe, device)
    torch.manual_seed(recipe.seed)
    frozen = recipe.kind != "target" and accelerator.device.type != "cpu"
    dtype = None if frozen else torch.float32
    target, folder = catalog.target(model, dtype, accelerator.device)
    assert isinstance(target, CausalTarget)
    _check_target(corpus, target, model, out)
    identity = generate.identity(model)
    _warn_of_another_target(corpus, identity)
    training, held_out = corpus.split(recipe.held_out)
    tokenizer = tokenizer_of(folder)
    weights = identity["target_weights"]
    task = _task(recipe, corpus, training, target, tokenizer, catalog.same_target(model), weights)
    trainer = Trainer(
        task,
        recipe,
        out,
        accelerator,
        training,
        held_out,
        sources={"corpus": corpus.digest, "target": weights},
        evaluate=_evaluation(recipe, corpus, held_out, target, tokenizer),
        describe=partial(
            model_card.write,
            out,
            recipe,
            corpus,
            model,
            command,
            task.sizes(),
            base_model=catalog.hub_id(model),
            license=license,
        ),
        track=_tracker(log_to, out, recipe) if accelerator.is_main_process else None,
    )
    return TrainingRun(trainer, target, corpus)


def _check_target(corpus: Corpus, target: CausalTarget, model: str, out: Path) -> None:
    size = corpus.manifest["vocab_size"]
    if size != target.info.vocab_size:
        raise CorpusError(
            f"{corpus.folder} holds tokens of a vocabulary of {size}, but {model} has "
            f"{target.info.vocab_size}; make its corpus with:  "
            f"specdiff data --model {model} --out DIR"
        )
    if out.exists() and out.resolve() == generate.model_files(model).resolve():
        raise UsageError(
            f"--out {out} is the target's own folder, whose weights would be replaced; "
            f"choose another --out"
        )


def _warn_of_another_target(corpus: Corpus, identity: Mapping[str, str]) -> None:
    """Warn of a corpus that another target generated; verbatim texts have no such target."""
    about = corpus.manifest["about"]
    name = "target_weights" if "target_weights" in about else "target_sha256"
    if "temperatures" in about and about.get(name) != identity[name]:
        warnings.warn(
            f"{corpus.folder} was written by {about.get('target')} ({name} {about.get(name)}), "
            f"not by {identity['target']} ({identity[name]}); a drafter learns most from its own "
            f"target's text",
            stacklevel=3,
        )


def accelerator_for(recipe: Recipe, device: str) -> Accelerator:
    """One process, DDP or FSDP2, as accelerate's own configuration and launcher say."""
    cuda = torch.cuda.is_available() and device != "cpu"
    bf16 = recipe.precision == "bf16"
    if recipe.precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported()
        if recipe.kind == "block" and not cuda and device in ("auto", "cpu"):
            bf16 = native_half(torch.device("cpu")) == torch.bfloat16
    # a process may prepare runs of different precision, one after another
    AcceleratorState._reset_state()
    cpu = not cuda and device in ("auto", "cpu")
    return Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no")


def _evaluation(
    recipe: Recipe,
    corpus: Corpus,
    held_out: Sequence[int],
    target: CausalTarget,
    tokenizer: Any,
) -> Callable[[Path], dict[str, Any]] | None:
    """Acceptance of an exported drafter; None when the target itself is trained."""
    if recipe.kind == "target":
        return None
    return partial(
        evaluation.of_folder,
        target=target,
        prompts=evaluation.held_out_prompts(corpus, held_out, recipe.eval_prompts),
        max_tokens=recipe.eval_tokens,
        stop_ids=SpeculativeLM(target, "none", tokenizer, 2).end_ids,
    )


def _task(
    recipe: Recipe,
    corpus: Corpus,
    rows: Sequence[int],
    target: CausalTarget,
    tokenizer: Any,
    targets: list[str],
    target_weights: str,
) -> Task[Any]:
    model = target.model
    if recipe.kind == "target":
        model.requires_grad_(True)
        return TargetTask(recipe, corpus, model, tokenizer)
    model.requires_grad_(False)
    head = target.info.head
    about = {"targets": targets}
    if recipe.kind == "block":
        block = initialize_block.block(recipe, corpus, rows, model)
        widen_norms(block)
        layers = block.config.taps
        states = _teacher(recipe, corpus, target, target_weights, layers)
        return BlockTask(recipe, corpus, block, head, states, about)
    network = initialize.sedd(recipe, corpus, rows, model) if recipe.kind == "sedd" else None
    layers = network.config.taps if network is not None else ()
    teacher = _teacher(recipe, corpus, target, target_weights, layers)
    if network is None:
        small = initialize.autoregressive(recipe, corpus, rows, model)
        return AutoregressiveTask(recipe, corpus, small, head, teacher, about)
    if network.config.attention == "causal-context":
        return CanvasTask(recipe, corpus, network, head, teacher, about)
    return ScoreEntropyTask(recipe, corpus, network, head, teacher, about)


def _teacher(
    recipe: Recipe,
    corpus: Corpus,
    target: CausalTarget,
    target_weights: str,
    layers: Sequence[int] = (),
) -> Teacher | None:
    if recipe.objective != "distill" and not layers:
        return None
    if corpus.has_features:
        corpus.check_features(target_weights)
    teacher: Teacher
    if corpus.has_features and corpus.has_layers(layers):
        teacher = PrecomputedTeacher(corpus, layers)
    else:
        teacher = OnlineTeacher(target.model, layers)
    if target.info.head is None:
        raise UsageError(
            f"{target.model.config.model_type} has no plain output matrix to learn from; "
            f"train with --set objective=denoise"
        )
    return teacher


def forecast(run: TrainingRun, steps: int = 3) -> dict[str, Any]:
    """Sizes, memory and time of a run, from a few real steps after a first one. Saves nothing."""
    trainer = run.trainer
    before = trainer.tokens
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        trainer.one_step()
        times.append(time.perf_counter() - start)
    sizes = trainer.task.sizes()
    # weights, gradients, two moments, and the moving average
    copies = 4 + (trainer.recipe.ema is not None)
    if trainer.accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sizes | {
        "corpus_tokens": run.corpus.tokens,
        "tokens_per_step": (trainer.tokens - before) / len(times),
        "state_bytes": sizes["trained"] * 4 * copies,
        "peak_bytes": peak,
        "seconds_per_step": sorted(times[1:])[steps // 2],
        "steps": trainer.recipe.steps,
    }


def _tracker(
    name: str, out: Path, recipe: Recipe
) -> Callable[[dict[str, float], int], None] | None:
    """A function that logs to tensorboard or trackio. Raises MissingExtraError if it is missing."""
    if name == "none":
        return None
    try:
        return _tensorboard(out) if name == "tensorboard" else _trackio(out, recipe)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--log-to {name} needs {error.name}:  pip install {name}"
        ) from None


def _tensorboard(out: Path) -> Callable[[dict[str, float], int], None]:
    tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(out / "training" / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log


def _trackio(out: Path, recipe: Recipe) -> Callable[[dict[str, float], int], None]:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project="specdiff", name=out.name, config=recipe.model_dump())

    def log(values: dict[str, float], step: int) -> None:
        trackio.log(values, step=step)

    return log
