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

    from specdiff.training.prepare import Plan
    from specdiff.training.trainer import TrainingProgress


def train(
    data: Annotated[Path, typer.Option(help="Corpus folder, made by 'specdiff data'.")],
    out: Annotated[Path, typer.Option(help="The drafter's folder; an interrupted run is resumed.")],
    model: params.TrainedModel = "smollm2-135m",
    recipe: Annotated[
        str,
        typer.Option(
            help="sedd, autoregressive, target, sedd-pretrain, sedd-finetune or a FILE.yaml."
        ),
    ] = "sedd",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe; may be repeated.")
    ] = None,
    device: params.Device = "auto",
    config: params.Config = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after that long, resumably.")
    ] = None,
    license: Annotated[str, typer.Option(help="Named in the model card.")] = "apache-2.0",
    log_to: Annotated[
        str,
        typer.Option(
            help="none, tensorboard or trackio; log.jsonl and curve.jsonl are always written."
        ),
    ] = "none",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; fewer than cores where other work runs beside.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory and time; write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the closing measurement as one JSON object.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Train a drafter for a target. Stop it any time; the same command resumes it. Several GPUs: accelerate launch -m specdiff train ...

    Example:  specdiff train --target smollm2-135m --data corpus --out my-drafter --set steps=2000
    """
    if max_minutes is not None and not max_minutes > 0:
        raise UsageError(f"--max-minutes must be above 0, not {max_minutes}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    quiet_libraries()
    import torch

    from specdiff.data import memory

    prepare, recipes = _training()
    chosen = recipes.load(recipe, changes or ())
    memory.keep_freed()
    if threads is not None:
        torch.set_num_threads(threads)
    notes = terminal.notes(quiet=quiet)
    command = valid(shlex.join(["specdiff", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as nowhere:
        place = Path(nowhere) / "drafter" if dry_run else out
        with terminal.status(notes, f"loading {model}", log=True):
            plan = prepare.prepare(
                chosen,
                model=model,
                data=data,
                out=place,
                device=device,
                command=command,
                license=license,
                log_to=log_to,
            )
        if dry_run:
            told = prepare.forecast(plan)
            notes.print(_forecast(told), soft_wrap=True)
        else:
            told = _run(plan, out, max_minutes, notes)
    if as_json and plan.trainer.accelerator.is_main_process:
        terminal.print_json(told)


def _training() -> Any:
    try:
        from specdiff.training import prepare, recipe
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("specdiff"):
            raise
        raise MissingExtraError(
            f"training needs {error.name}:  pip install 'specdiff[train]'"
        ) from None
    return prepare, recipe


def _run(plan: "Plan", out: Path, max_minutes: float | None, notes: "Console") -> dict[str, Any]:
    """Train behind a progress bar. Returns the last evaluation, or where the run stands."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    trainer = plan.trainer
    if not trainer.accelerator.is_main_process:
        notes.quiet = True
    if trainer.step == trainer.recipe.steps:
        notes.print(f"{out} is finished: its {trainer.step} steps are done", soft_wrap=True)
    elif trainer.step:
        notes.print(f"going on from step {trainer.step} of {trainer.recipe.steps}", soft_wrap=True)
    last: dict[str, Any] = {}
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    try:
        with Bar(*columns, console=notes, disable=not notes.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=trainer.recipe.steps, completed=trainer.step, note="")
            for progress in trainer.run(None if max_minutes is None else 60 * max_minutes):
                due = trainer.due() and not progress.evaluated
                note = (
                    "measuring"
                    if due
                    else f"loss {progress.record['loss']:.3f}"
                    if "loss" in progress.record
                    else ""
                )
                bar.update(task, completed=progress.step, note=note)
                last = _tell(progress, notes) or last
    except KeyboardInterrupt:
        notes.print(
            f"stopped at step {trainer.step}; to go on from the last checkpoint, repeat the command",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    if trainer.step < trainer.recipe.steps:
        notes.print(
            f"time is up at step {trainer.step} of {trainer.recipe.steps}; to go on, repeat the command",
            soft_wrap=True,
        )
    return {
        "out": str(out),
        "step": trainer.step,
        "steps": trainer.recipe.steps,
        "minutes": round(trainer.spent / 60, 2),
    } | last


def _tell(p: "TrainingProgress", notes: "Console") -> dict[str, Any] | None:
    r, e = p.record, p.evaluated
    if e is None:
        if not notes.is_terminal:
            expected = f", expected tau {r['expected_tau']:.2f}" if "expected_tau" in r else ""
            notes.print(
                f"step {p.step}/{p.steps}  {p.seconds / 60:.1f} min  loss {r['loss']:.3f}{expected}",
                soft_wrap=True,
            )
        return None
    measured = (
        f", tau {e['tau_at_0']:.2f} at T=0 and {e['tau_at_1']:.2f} at T=1"
        if "tau_at_0" in e
        else ""
    )
    notes.print(f"step {p.step}: held-out loss {e['held_out_loss']:.3f}{measured}", soft_wrap=True)
    return e


def _forecast(f: dict[str, Any]) -> str:
    return (
        f"{f['trained']:,} parameters trained; {f['corpus_tokens']:,} corpus tokens; {f['tokens_per_step']:.0f} tokens a step\n"
        f"memory: {f['state_bytes'] / 1e6:.0f} MB of weights, gradients and moments, {f['peak_bytes'] / 1e6:.0f} MB at the peak of a step\n"
        f"time: {f['seconds_per_step']:.2f} s a step, {f['seconds_per_step'] * 1000 / 60:.0f} min per 1000 steps, "
        f"{f['seconds_per_step'] * f['steps'] / 60:.0f} min for all {f['steps']}"
    )
