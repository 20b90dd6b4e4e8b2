"""The works of the units: tune, take a turn, time a round, count acceptance. Each returns its journal record."""

from collections.abc import Sequence
from typing import Any

from specdiff.bench import costs, equality
from specdiff.bench.baselines import Ours, unbroken
from specdiff.bench.plan import Cell, Entry
from specdiff.bench.runs import Ask, Run
from specdiff.bench.session import Session, explained
from specdiff.bench.suites import Prompt
from specdiff.types import Batch, SamplingParams
from specdiff.verify import verifier

FINALISTS = 3


def tune(
    loaded: Session,
    entry: Entry,
    temperature: float,
    prompts: Sequence[Prompt],
    finals: Sequence[Prompt],
    max_tokens: int,
) -> dict[str, Any]:
    """Tokens per second of every setting of the baseline's grid, which take turns too; the fastest is its setting from then on.

    Of a large grid the fastest three meet again on the prompts of `finals`: the luckiest of many on few prompts is rarely the best.
    """
    grid: list[dict[str, Any]] = [
        {"draft_len": n, "steps": t, "tokens_per_second": None, "why": None}
        for n, t in loaded.grid(entry)
    ]
    running, spent = list(range(len(grid))), [(0, 0.0)] * len(grid)
    for at, prompt in enumerate([*prompts, *finals] if len(grid) > FINALISTS else prompts):
        if at == len(prompts):
            running = sorted(running, key=lambda i: -(grid[i]["tokens_per_second"] or 0))[
                :FINALISTS
            ]
        ask = loaded.ask([prompt], temperature, seed=at, most=max_tokens)
        for i in rotated(running, at):
            point = grid[i]
            cell = loaded.cell("tune", entry, temperature, 1, (point["draft_len"], point["steps"]))
            run = point["why"] or loaded.attempt(cell, ask, remember=False)
            if isinstance(run, str):
                grid[i] |= {"tokens_per_second": None, "why": run}
                continue
            spent[i] = (spent[i][0] + run.size, spent[i][1] + run.seconds)
            point["tokens_per_second"] = spent[i][0] / max(spent[i][1], 1e-9)
    able = [grid[i] for i in running if grid[i]["why"] is None]
    best = max(able, key=lambda point: float(point["tokens_per_second"]), default=None)
    why = None if best else next(point["why"] for point in grid if point["why"])
    return {
        "kind": "tune",
        "baseline": entry.name,
        "temperature": temperature,
        "grid": grid,
        "best": best,
        "why": why,
    }


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """The items in their order, begun at another one: nobody is always first."""
    k = by % len(items)
    return [*items[k:], *items[:k]]


def turn(
    loaded: Session,
    cells: Sequence[Cell],
    prompts: Sequence[Prompt],
    repetition: int,
    *,
    rotate: int,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Every cell once on the same prompts (one row each). At temperature 0 the answers are compared, too.

    With `max_tokens`, ends of text are ignored: rows of one batch then end together.
    """
    heat, stage = cells[0].temperature, cells[0].stage
    ask = loaded.ask(prompts, heat, seed=rotate, exactly=max_tokens)
    answers: dict[Cell, Run | str] = {}
    for cell in rotated(cells, rotate):
        answers[cell] = loaded.attempt(cell, ask, remember=stage != "sweep")
    found = equality.divergences(loaded, ask, [p.id for p in prompts], answers) if heat == 0 else []
    shown = (
        stage == "main"
        and repetition == 0
        and prompts[0].id == next(p.id for p in loaded.prompts if p.task == prompts[0].task)
    )
    return {
        "kind": "turn",
        "stage": stage,
        "prompt": prompts[0].id,
        "task": prompts[0].task,
        "repetition": repetition,
        "runs": [{"cell": cell.as_dict(), **_told(loaded, answers[cell], shown)} for cell in cells],
        "divergences": found,
    }


def _told(loaded: Session, answer: Run | str, shown: bool) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"why": answer}
    return answer.as_record() | (
        {"pieces": _pieces(loaded, answer)} if shown and answer.from_draft else {}
    )


def _pieces(loaded: Session, run: Run) -> list[tuple[str, bool]]:
    """The first row's text, cut wherever tokens of the draft and of the target meet."""
    assert run.from_draft is not None
    groups: list[tuple[list[int], bool]] = []
    for token, drafted in zip(run.tokens[0], run.from_draft[0], strict=True):
        if not groups or groups[-1][1] != drafted:
            groups.append(([], drafted))
        groups[-1][0].append(token)
    tokenizer = loaded.lm.tokenizer
    return [
        (" ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids)), drafted)
        for ids, drafted in groups
    ]


def conditional(
    loaded: Session, entry: Entry, temperature: float, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Acceptance given reached beside 1 - TV(p, q), at the baseline's best setting, under `token`. Untimed."""
    cell = loaded.cell("conditional", entry, temperature, 1)
    told = {
        "kind": "conditional",
        "baseline": entry.name,
        "draft_len": cell.draft_len,
        "steps": cell.steps,
        "temperature": temperature,
    }
    decoder = loaded.decoders[entry.name]
    assert isinstance(decoder, Ours)
    try:
        batches = [
            _batch(loaded, loaded.ask([p], temperature, seed=i)) for i, p in enumerate(prompts)
        ]
        length = cell.draft_len if isinstance(cell.draft_len, int) else None
        with unbroken():
            positions = costs.conditional(
                decoder.target, decoder.drafter(cell.steps), batches, verifier("token"), length
            )
    except Exception as error:  # the other baselines go on
        return told | {"why": explained(error, 1)}
    return told | {"verifier": "token", "positions": positions}


def _batch(loaded: Session, ask: Ask) -> Batch:
    params = [
        SamplingParams(max_tokens=n, temperature=ask.temperature, stop_token_ids=ask.stop_ids)
        for n in ask.limits
    ]
    return Batch.of(ask.prompts, params, ask.seeds, device=loaded.lm.target.info.device)


def target_cost(loaded: Session, context: int, times: int) -> dict[str, Any]:
    """One context's T_target(n)."""
    try:
        points = list(
            costs.target_curve(
                loaded.lm.target, context, loaded.settings.widths, times, loaded.settings.seed
            )
        )
    except Exception as error:
        return {"kind": "cost", "of": "target", "context": context, "why": explained(error, 1)}
    return {"kind": "cost", "of": "target", "points": points}


def draft_cost(
    loaded: Session, entry: Entry, context: int, steps: int | None, times: int
) -> dict[str, Any]:
    """One context's T_draft(gamma) of a baseline, at so many passes a draft."""
    told = {"kind": "cost", "of": "draft", "baseline": entry.name, "steps": steps}
    decoder, lengths = loaded.decoders[entry.name], [n for n in loaded.settings.widths if n > 1]
    assert isinstance(decoder, Ours)
    try:
        with unbroken():
            points = list(
                costs.draft_curve(
                    loaded.lm.target,
                    decoder.drafter(steps),
                    context,
                    lengths,
                    times,
                    loaded.settings.seed,
                )
            )
    except Exception as error:
        return told | {"context": context, "why": explained(error, 1)}
    return told | {"points": points}
