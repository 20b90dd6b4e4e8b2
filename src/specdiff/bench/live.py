"""What a terminal shows while the benchmark runs: the table as it stands, and how far it is."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from specdiff.bench import results, table
from specdiff.bench.runner import Event

WIDTH = 30  # characters of the bar


class Screen:
    """Folds events into renderables. The time left is judged from what this process did itself."""

    def __init__(self) -> None:
        self.part, self.begin, self.left = "", 0.0, ""

    def of(self, event: Event, records: Sequence[dict[str, Any]], width: int) -> Group:
        """What to show now, in so many columns."""
        here = event.done - event.skipped
        if event.part != self.part or here <= 0:
            self.part, self.begin, self.left = event.part, time.monotonic(), ""
        elif event.record is not None:
            seconds = (time.monotonic() - self.begin) * (event.total - event.done) / here
            self.left = f", about {remaining(seconds)} left"
        told = results.fold(records, finished=False)
        shown = [
            table.main(p, width) for p in told["parts"] if p["name"] == event.part and p["cells"]
        ]
        share = min(1.0, event.done / max(event.total, 1e-9))
        full = round(WIDTH * share)
        bar = f"{'━' * full}{'·' * (WIDTH - full)} {100 * share:3.0f} %  {event.part}: {event.title}{self.left}"
        return Group(*shown, Text(bar, no_wrap=True, overflow="ellipsis"))


def remaining(seconds: float) -> str:
    """A duration as one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
