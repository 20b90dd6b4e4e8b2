"""The paper suite of `specdiff bench`: its settings, its parts, and finetuning before they run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdiff.cli import terminal
from specdiff.cli.data_progress import progress_bar
from specdiff.cli.train import training, watch
from specdiff.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from specdiff.bench.paper_embedded import Finetuning
    from specdiff.bench.settings import BenchSettings, Part

PAPER: dict[str, Any] = {
    "temperatures": (1.0,),
    "max_tokens": 1024,
    "prompts": 16,
    "gammas": (5, 10, 20, 30, 40, 50),
}
EMBEDDED: dict[str, Any] = {
    "temperatures": (1.0,),
    "max_tokens": 256,
    "prompts": 8,
    "gammas": (2, 4, 5, 8, 16, 40),
    "steps": (1, 2, 4, 8),
    "batch": (1,),
    "contexts": (256,),
    "widths": (1, 2, 4, 8, 16, 41),
}
ROW_TOKENS = 256  # of a packed row to finetune on
ROWS = 2  # in a step
TARGET_LR = 2e-5
DRAFTER_LR = 3e-4


def defaults(scale: str) -> dict[str, Any]:
    """The settings of the paper suite that options replace."""
    return dict(EMBEDDED if scale == "embedded" else PAPER)


def prepare(values: dict[str, Any], folder: Path) -> "tuple[BenchSettings, list[Part]]":
    """Settings and parts; mistakes in them show before anything is loaded or written."""
    from specdiff.bench import paper, paper_embedded
    from specdiff.bench.settings import BenchSettings

    embedded = values["scale"] == paper_embedded.SCALE
    if (values["texts"] or values["finetune"]) and not embedded:
        raise UsageError("--texts and --finetune are for --suite paper --scale embedded")
    if values["finetune"] and values["quantize"] == "auto":
        # what is finetuned is not packed, so the target as it is must not be either
        values = values | {"quantize": "none"}
    settings = BenchSettings(**values)
    if embedded:
        if settings.smoke:
            raise UsageError("--smoke has models of its own; leave --scale embedded out")
        from dataclasses import replace

        settings = replace(settings, suite_sha256=paper_embedded.digest(settings))
        return settings, paper_embedded.parts(settings, folder)
    targets = {Path(settings.model).name: settings.model} if settings.model else dict(paper.TARGETS)
    if not settings.smoke:
        return settings, paper.parts(settings, targets, paper.DRAFTERS)
    from specdiff.bench import paper_smoke

    targets, drafters = paper_smoke.tiny_models(folder / "models")
    return settings, paper.parts(settings, targets, drafters, paper_smoke.tiny_texts())


def finetune(settings: "BenchSettings", folder: Path, notes: "Console") -> None:
    """Finetune target and drafters on each data set that has a text for it.

    Finished ones are left as they are, and an interrupted one is resumed.
    """
    from specdiff.bench import paper_embedded
    from specdiff.catalog import DEFAULT_MODEL

    model = settings.model or DEFAULT_MODEL
    for plan in paper_embedded.finetunings(settings, folder).values():
        drafters = _pack(plan, model, settings, notes)
        _train(plan, "target", model, None, settings, notes)
        for name, start in drafters.items():
            _train(plan, name, str(plan.target), start, settings, notes)


def _pack(
    plan: "Finetuning", model: str, settings: "BenchSettings", notes: "Console"
) -> dict[str, str]:
    """Store the texts as a corpus. Returns the folder each drafter starts from."""
    import specdiff
    from specdiff import catalog
    from specdiff.bench.settings import drafter_specs
    from specdiff.data import sources
    from specdiff.data.write import write_packed

    with terminal.status(notes, f"loading {model}", log=True):
        lm = specdiff.load(model, "none", quantize="none", max_len=ROW_TOKENS)
    origin = sources.source(lm, "jsonl", plan.text, None, longest=ROW_TOKENS, text_tokens=64)
    assert isinstance(origin, sources.RecordSource)
    with progress_bar(notes, f"packing {plan.text.name}") as report:
        write_packed(lm, origin, plan.folder / "corpus", report=report)
    bundled = {name: str(path) for name, path in catalog.bundled(lm.target.info).items()}
    folders = bundled | drafter_specs(settings.drafters)
    for name in plan.drafters:
        if not Path(folders.get(name, "")).is_dir():
            raise UsageError(
                f"--finetune needs a drafter of {model} to start from; name its folder with "
                f"--drafter {name}=FOLDER"
            )
    return {name: folders[name] for name in plan.drafters}


def _recipe(name: str, start: str | None) -> str:
    """The authors' own recipe for a SEDD of their kind, whose context is not cached."""
    if name != "sedd" or start is None:
        return name
    from specdiff.nn.sedd_config import SEDDConfig
    from specdiff.weights import read_config

    config = SEDDConfig.from_json(read_config(Path(start)), start)
    return "sedd" if config.attention == "causal-context" else "sedd-finetune"


def _train(
    plan: "Finetuning",
    name: str,
    model: str,
    start: str | None,
    settings: "BenchSettings",
    notes: "Console",
) -> None:
    """Finetune the target, or a drafter of it from the folder `start`."""
    prepare_run, recipes = training()
    steps = settings.finetune_steps
    changes = [f"steps={steps}", f"rows={ROWS}", f"warmup={math.ceil(steps / 10)}"]
    changes += [f"eval_every={steps}", f"seed={settings.seed}", "accumulation=1"]
    changes += [f"lr={TARGET_LR}"] if start is None else [f"lr={DRAFTER_LR}", f"init={start}"]
    notes.print(f"finetuning {name} on {plan.text.name}", soft_wrap=True)
    run = prepare_run.prepare(
        recipes.load(_recipe(name, start), changes),
        model=model,
        data=plan.folder / "corpus",
        out=plan.folder / name,
        device=settings.device,
    )
    watch(run.trainer, None, notes)
