"""Details of the main comparison: acceptance by position and time by stage, and the Markdown table
of a page of documentation."""

from collections.abc import Callable, Iterator, Sequence

from specdiff.bench.metrics import CellResult, Speedup
from specdiff.bench.results import BenchResults, PartResult
from specdiff.bench.settings import VANILLA

STAGES = ("prefill", "draft", "score", "verify", "commit", "host")
POSITIONS = 8  # of a draft, at most
FEW = 5  # times a position must be reached for its share to be reported
SLOW = 0.97  # a ratio below it is called a slow-down


def positions(cell: CellResult) -> str:
    """The share of tokens accepted at each position, of those reached; "" if none was drafted."""
    shares = zip(cell.per_position or (), cell.reached or (), strict=True)
    return " ".join(f"{share:.2f}" for share, count in shares if count >= FEW)


def stages(cell: CellResult) -> dict[str, str]:
    """Milliseconds per token of each stage; "" for runs that are not split."""
    if not cell.tokens or not any(stage in cell.seconds for stage in STAGES):
        return dict.fromkeys(STAGES, "")
    return {s: f"{1000 * cell.seconds.get(s, 0.0) / cell.tokens:.2f}" for s in STAGES}


def row(cell: CellResult) -> dict[str, str]:
    """One line of the table of details, for a drafter or for plain decoding."""
    by_position = positions(cell).split()
    more = " ..." if len(by_position) > POSITIONS else ""
    return {
        "baseline": cell.baseline,
        "T": f"{cell.temperature:g}",
        "K": "" if cell.draft_len is None else str(cell.draft_len),
        "accepted by position": " ".join(by_position[:POSITIONS]) + more,
        **stages(cell),
    }


def rows(part: PartResult) -> list[dict[str, str]]:
    """The lines of all cells of the main comparison that this engine ran."""
    cells = [c for c in part.stage("main") if any(stage in c.seconds for stage in STAGES)]
    return [row(cell) for cell in sorted(cells, key=lambda c: c.temperature)]


COLUMNS: dict[str, Callable[[CellResult], str]] = {
    "T": lambda c: f"{c.temperature:g}",
    "": lambda c: _name(c),
    "against plain decoding, same engine": lambda c: _own(c),
    "against transformers' `generate`": lambda c: _ratio(c.speedup_vs_hf),
    "tau": lambda c: _number(c.tau),
    "before a loop": lambda c: _number(c.tau_before_loop),
    "break-even tau": lambda c: _number(c.break_even_tau if c.draft_len is not None else None),
    "accepted by position": lambda c: row(c)["accepted by position"],
}


def markdown(run: BenchResults) -> Iterator[str]:
    """The main comparison of every part as lines of Markdown, below its command and machine."""
    machine = run.environment or {"device_name": "a machine that was not recorded"}
    for part in run.parts:
        cells = sorted(
            (c for c in part.stage("main") if c.status == "ok"), key=lambda c: c.temperature
        )
        if not cells:
            continue
        count = f"{len(part.prompts)} prompts, up to {part.max_tokens} tokens, {part.dtype}"
        yield f"`{run.command}`: {part.name}, {part.model}, {count}."
        yield f"{machine['device_name']}, {machine.get('threads', 'unknown')} threads."
        yield ""
        yield from _table(cells)
        yield ""


def _table(cells: Sequence[CellResult]) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for cell in cells:
        yield f"| {' | '.join(show(cell) for show in COLUMNS.values())} |"


def _name(cell: CellResult) -> str:
    setting = "" if cell.draft_len is None else f", K={cell.draft_len}"
    passes = f", {cell.steps} passes" if (cell.steps or 1) > 1 else ""
    return f"`{cell.baseline}`{setting}{passes}"


def _own(cell: CellResult) -> str:
    ratio = cell.speedup_vs_vanilla
    if cell.baseline == VANILLA:
        return "1"
    return _ratio(ratio) + (", a slow-down" if ratio and ratio.ratio < SLOW else "")


def _ratio(ratio: Speedup | None) -> str:
    return "" if ratio is None else f"{ratio.ratio:.2f}x ({ratio.min:.2f}-{ratio.max:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
