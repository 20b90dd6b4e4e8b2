"""`specdiff train`: a corpus becomes a drafter folder that `--drafter FOLDER` runs."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdiff.cli import params, terminal
from specdiff.cli.terminal import quiet_libraries
from specdiff.errors import MissingExtraError, UsageError
from specdiff.unicode import valid

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.training.prepare import TrainingRun
    from specdiff.training.trainer import Trainer, TrainingProgress

TRAINING = "Training"  # a panel of --help


def train(
    data: Annotated[
        Path, params.option("Corpus folder, written by 'specdiff data'.", panel=TRAINING)
    ],
    out: Annotated[
        Path,
        params.option("Folder of the drafter; an interrupted run is resumed.", panel=params.OUTPUT),
    ],
    model: params.TrainedModel = "smollm2-135m",
    recipe: Annotated[
        str,
        params.option(
            "A packaged recipe (default: sedd), or FILE.yaml.", panel=TRAINING, show_default=False
        ),
    ] = "sedd",
    changes: Annotated[
        list[str] | None,
        params.option("key=value of the recipe; repeatable.", "--set", panel=TRAINING),
    ] = None,
    device: params.Device = "auto",
    config: params.Config = None,
    max_minutes: Annotated[
        float | None,
        params.option("Stop after this time; the same command resumes.", panel=TRAINING),
    ] = None,
    threads: params.Threads = "auto",
    license: Annotated[
        str, params.option("License in the model card.", panel=params.OUTPUT)
    ] = "apache-2.0",
    log_to: Annotated[
        str, params.option("none, tensorboard or trackio.", panel=params.OUTPUT)
    ] = "none",
    dry_run: Annotated[
        bool,
        params.flag(
            "Print sizes, memory and time; write nothing.", "--dry-run", panel=params.OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        params.flag(
            "Print the closing measurement as one JSON object.", "--json", panel=params.OUTPUT
        ),
    ] = False,
    quiet: Annotated[
        bool, params.flag("No progress.", "-q", "--quiet", panel=params.OUTPUT)
    ] = False,
) -> None:
    """Train a drafter for a target. Stop any time; the same command resumes it.

    Recipes: sedd, block, autoregressive, target, sedd-pretrain, sedd-finetune.

    Several GPUs:  accelerate launch -m specdiff train ...

    Example:  specdiff train --target smollm2-135m --data corpus --out my-drafter --set steps=2000
    """
    if max_minutes is not None and not max_minutes > 0:
        raise UsageError(f"--max-minutes must be above 0, not {max_minutes}")
    count = params.thread_count(threads)
    if isinstance(count, int) and count < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    quiet_libraries()
    import torch

    from specdiff.devices import keep_freed_memory

    prepare, recipes = training()
    config = recipes.load(recipe, changes or ())
    keep_freed_memory()
    if isinstance(count, int):  # torch's own number is the fastest for large batches
        torch.set_num_threads(count)
    notes = terminal.notes(quiet=quiet)
    command = valid(shlex.join(["specdiff", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as scratch:
        with terminal.status(notes, f"loading {model}", log=True):
            plan = prepare.prepare(
                config,
                model=model,
                data=data,
                out=Path(scratch) / "drafter" if dry_run else out,
                device=device,
                command=command,
                license=license,
                log_to=log_to,
            )
        if dry_run:
            result = prepare.forecast(plan)
            notes.print(_forecast(result), soft_wrap=True)
        else:
            result = _run(plan, out, max_minutes, notes)
    if as_json and plan.trainer.accelerator.is_main_process:
        terminal.print_json(result)


def training() -> Any:
    """The modules that prepare a run and that read recipes. Raises MissingExtraError."""
    try:
        from specdiff.training import prepare, recipe
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("specdiff"):
            raise
        raise MissingExtraError(
            f"training needs {error.name}:  pip install 'specdiff[train]'"
        ) from None
    return prepare, recipe


def _run(
    plan: "TrainingRun", out: Path, max_minutes: float | None, notes: "Console"
) -> dict[str, Any]:
    """Train with a progress bar. Returns the run's position and its last evaluation."""
    trainer = plan.trainer
    steps = trainer.recipe.steps
    if not trainer.accelerator.is_main_process:
        notes.quiet = True
    if trainer.step == steps:
        notes.print(f"{out} is finished: its {steps} steps are done", soft_wrap=True)
    elif trainer.step:
        notes.print(f"resuming from step {trainer.step} of {steps}", soft_wrap=True)
    try:
        evaluation = watch(trainer, max_minutes, notes)
    except KeyboardInterrupt:
        notes.print(
            f"stopped at step {trainer.step}; "
            f"to resume from the last checkpoint, repeat the command",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    if trainer.step < steps:
        notes.print(
            f"time is up at step {trainer.step} of {steps}; to resume, repeat the command",
            soft_wrap=True,
        )
    minutes = round(trainer.spent / 60, 2)
    return {"out": str(out), "step": trainer.step, "steps": steps, "minutes": minutes} | evaluation


def watch(trainer: "Trainer", max_minutes: float | None, notes: "Console") -> dict[str, Any]:
    """Run the trainer to its end or the time limit. Returns the last evaluation, if any."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    evaluation: dict[str, Any] = {}
    seconds = None if max_minutes is None else 60 * max_minutes
    with Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=trainer.recipe.steps, completed=trainer.step, note="")
        for progress in trainer.run(seconds):
            note = ""
            if trainer.due() and not progress.evaluated:
                note = "measuring"
            elif "loss" in progress.record:
                note = f"loss {progress.record['loss']:.3f}"
            bar.update(task, completed=progress.step, note=note)
            _print(progress, notes)
            evaluation = progress.evaluated or evaluation
    return evaluation


def _print(progress: "TrainingProgress", notes: "Console") -> None:
    """A line for each evaluation; where stderr is no terminal, for each record too."""
    step = progress.step
    record = progress.record
    evaluation = progress.evaluated
    if evaluation is not None:
        line = f"step {step}: held-out loss {evaluation['held_out_loss']:.3f}"
        if "tau_at_0" in evaluation:
            cold = evaluation["tau_at_0"]
            warm = evaluation["tau_at_1"]
            line += f", tau {cold:.2f} at T=0 and {warm:.2f} at T=1"
        notes.print(line, soft_wrap=True)
    elif not notes.is_terminal:
        minutes = progress.seconds / 60
        line = f"step {step}/{progress.steps}  {minutes:.1f} min  loss {record['loss']:.3f}"
        if "expected_tau" in record:
            line += f", expected tau {record['expected_tau']:.2f}"
        notes.print(line, soft_wrap=True)


def _forecast(forecast: dict[str, Any]) -> str:
    """A forecast in words."""
    seconds = forecast["seconds_per_step"]
    return (
        f"{forecast['trained']:,} parameters trained; "
        f"{forecast['corpus_tokens']:,} corpus tokens; "
        f"{forecast['tokens_per_step']:.0f} tokens a step\n"
        f"memory: {forecast['state_bytes'] / 1e6:.0f} MB of weights, gradients and moments, "
        f"{forecast['peak_bytes'] / 1e6:.0f} MB at the peak of a step\n"
        f"time: {seconds:.2f} s a step, {seconds * 1000 / 60:.0f} min per 1000 steps, "
        f"{seconds * forecast['steps'] / 60:.0f} min for all {forecast['steps']}"
    )
