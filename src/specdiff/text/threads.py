"""The number of CPU threads, chosen by timing the target.

More threads are not always faster: on a machine that also does other work, every product waits for
the slowest of them.
"""

import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from specdiff.arguments import brief, whole
from specdiff.errors import UsageError
from specdiff.targets.base import Target

VARIABLE = "OMP_NUM_THREADS"  # the user's own choice
SECONDS = 0.3  # of timing, first passes included
LONGEST = 3.0  # seconds for the first passes
TURNS = 5  # passes per number of threads


def checked(threads: int | str | None) -> int | str | None:
    """The argument `threads` of `specdiff.load`. Raises UsageError."""
    if threads is None or threads == "auto":
        return threads
    if isinstance(threads, str):
        raise UsageError(f"threads must be 'auto' or a number, not {threads!r}", param="threads")
    count = whole("threads", threads)
    if count < 1:
        raise UsageError(f"threads must be at least 1, not {brief(threads)}", param="threads")
    return count


def set_threads(threads: int | str | None, target: Target[Any]) -> None:
    """Set torch's number of threads, which is the whole process's; None leaves it as it is.

    "auto" takes the fastest for a pass of the target over one token, if that runs on the CPU and
    OMP_NUM_THREADS is not set.
    """
    if isinstance(threads, int):
        torch.set_num_threads(threads)
    elif threads == "auto" and VARIABLE not in os.environ:
        model = getattr(target, "model", None)
        if model is not None and target.info.device.type == "cpu":
            torch.set_num_threads(fastest(model, choices(torch.get_num_threads())))


def choices(cores: int) -> list[int]:
    """All cores, then half of them, and so on down to 1."""
    counts = [cores]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return counts


@torch.inference_mode()
def fastest(model: Any, counts: list[int], clock: Callable[[], float] = time.perf_counter) -> int:
    """The number of threads with the fastest pass over one token.

    Passes alternate for SECONDS, and medians decide. Each number has one pass at least, also where
    that takes longer: waiting for busy cores is what makes passes slow. After LONGEST seconds the
    first of `counts` is taken.
    """
    ids = torch.zeros(1, 1, dtype=torch.long)
    first: dict[int, float] = {}  # it also starts the threads
    passes: dict[int, list[float]] = {count: [] for count in counts}
    before = torch.get_num_threads()
    begin = clock()
    try:
        for turn in range(TURNS + 1):
            for count in counts:
                torch.set_num_threads(count)
                start = clock()
                model(ids, use_cache=False)
                end = clock()
                if turn:
                    passes[count].append(end - start)
                else:
                    first[count] = end - start
                if end - begin > LONGEST and len(first) < len(counts):
                    return counts[0]
                if end - begin > SECONDS and len(first) == len(counts):
                    return _best(passes, first)
    finally:
        torch.set_num_threads(before)
    return _best(passes, first)


def _best(passes: Mapping[int, list[float]], first: Mapping[int, float]) -> int:
    """The count with the lowest median; of the first passes, unless each has a later one."""
    if not all(passes.values()):
        return min(first, key=first.__getitem__)
    return min(passes, key=lambda count: median(passes[count]))
