"""Turns: the cells of a stage take turns on the same prompts, to be tuned or to be compared."""

from collections.abc import Sequence
from typing import Any

from specdiff.bench import equality
from specdiff.bench.equality import Divergence
from specdiff.bench.experiment import Experiment
from specdiff.bench.journal import Tuning, TuningPoint, Turn
from specdiff.bench.settings import HF, Baseline, Cell
from specdiff.bench.suites import EncodedPrompt
from specdiff.bench.timing import Measurement, RunRecord

FINALISTS = 3


def tune(
    experiment: Experiment,
    baseline: Baseline,
    temperature: float,
    prompts: Sequence[EncodedPrompt],
    finals: Sequence[EncodedPrompt],
    max_tokens: int,
) -> Tuning:
    """Speeds of every setting of the baseline's grid, taking turns; the fastest is used from then
    on.

    The three fastest of a large grid run again on the prompts of `finals`: the luckiest of many on
    few prompts is rarely the best.
    """
    grid = experiment.grid(baseline)
    cells = [experiment.cell("tune", baseline, temperature, 1, setting) for setting in grid]
    running = list(range(len(grid)))
    tokens = [0] * len(grid)
    seconds = [0.0] * len(grid)
    failures: dict[int, str] = {}

    def rate(i: int) -> float:
        return 0.0 if i in failures else tokens[i] / max(seconds[i], 1e-9)

    for at, prompt in enumerate([*prompts, *finals] if len(grid) > FINALISTS else prompts):
        if at == len(prompts):
            running = sorted(running, key=rate, reverse=True)[:FINALISTS]
        work = experiment.workload([prompt], temperature, seed=at, most=max_tokens)
        for i in rotated(running, at):
            run = failures.get(i) or experiment.attempt(cells[i], work, remember=False)
            if isinstance(run, str):
                failures[i] = run
                continue
            tokens[i] += run.size
            seconds[i] += run.seconds
    points = [
        TuningPoint(n, t, rate(i) if seconds[i] and i not in failures else None, failures.get(i))
        for i, (n, t) in enumerate(grid)
    ]
    able = [points[i] for i in running if i not in failures]
    best = max(able, key=lambda point: point.tokens_per_second or 0.0, default=None)
    why = None if best else failures[min(failures)]
    return Tuning(baseline.name, temperature, points, best, why)


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """The items in order, starting at another one each turn: no baseline is always first."""
    k = by % len(items)
    return [*items[k:], *items[:k]]


def take_turn(
    experiment: Experiment,
    cells: Sequence[Cell],
    prompts: Sequence[EncodedPrompt],
    repetition: int,
    *,
    rotate: int,
    max_tokens: int | None = None,
) -> Turn:
    """Every cell once on the same prompts (one row each); greedy answers are compared.

    With `max_tokens`, stop ids are ignored: rows of one batch then end together.
    """
    first = prompts[0]
    stage = cells[0].stage
    temperature = cells[0].temperature
    work = experiment.workload(prompts, temperature, seed=rotate, exactly=max_tokens)
    answers: dict[Cell, Measurement | str] = {}
    for cell in rotated(cells, rotate):
        answers[cell] = experiment.attempt(cell, work, remember=stage != "sweep")
    divergences: list[Divergence] = []
    if temperature == 0:
        judge = experiment.decoders.get(HF)
        dtype = experiment.lm.target.info.dtype
        names = [p.id for p in prompts]
        divergences = list(equality.divergences(judge, dtype, work, names, answers))
    sample = next(p.id for p in experiment.prompts if p.task == first.task)
    with_text = stage == "main" and repetition == 0 and first.id == sample
    runs = [_record(experiment, cell, answers[cell], with_text) for cell in cells]
    return Turn(stage, first.id, first.task, repetition, runs, divergences)


def _record(
    experiment: Experiment, cell: Cell, answer: Measurement | str, with_text: bool
) -> RunRecord:
    if isinstance(answer, str):
        return RunRecord(cell, why=answer)
    return answer.record(cell, _pieces(experiment, answer) if with_text else None)


def _pieces(experiment: Experiment, run: Measurement) -> list[tuple[str, bool]] | None:
    """The first row's text, cut between tokens of the draft and of the target."""
    if run.from_draft is None:
        return None
    groups: list[tuple[list[int], bool]] = []
    for token, drafted in zip(run.tokens[0], run.from_draft[0], strict=True):
        if not groups or groups[-1][1] != drafted:
            groups.append(([], drafted))
        groups[-1][0].append(token)
    tokenizer = experiment.lm.tokenizer
    if tokenizer is None:
        return [(" ".join(map(str, ids)), drafted) for ids, drafted in groups]
    return [(str(tokenizer.decode(ids)), drafted) for ids, drafted in groups]
