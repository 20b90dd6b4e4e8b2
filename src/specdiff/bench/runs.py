"""One answer, or one batch of them, timed: what every baseline reports, and the fold of our own rounds into it.

Shapes: B rows.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.bench.gauges import Memory
from specdiff.repetition import fresh
from specdiff.stats import Stats
from specdiff.types import Round


@dataclass(frozen=True, slots=True)
class Ask:
    """Prompts to be answered together; limits and seeds are one a row."""

    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    temperature: float
    stop_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """`tokens[row]` were generated in `seconds`, `first_tokens` of them by `first_seconds` (the first emission, over all rows).

    `from_draft[row]` says of each whether it was accepted from a draft; `counts` are Stats as numbers; `fresh_tokens` and
    `fresh_rounds` count up to the first repeated 8-gram; `medians` are seconds of a drafting round, a plain one, and of the scoring
    pass in each (on a GPU the host's clock cannot tell that). All None where a baseline tells nothing of it.
    """

    tokens: list[list[int]]
    seconds: float
    first_seconds: float
    first_tokens: int
    from_draft: list[list[bool]] | None = None
    counts: dict[str, Any] | None = None
    fresh_tokens: int = 0
    fresh_rounds: int = 0
    medians: dict[str, float | None] | None = None
    memory: Memory | None = None
    joules: float | None = None

    def as_record(self) -> dict[str, Any]:
        """Plain numbers, for the journal; the tokens themselves only as their count."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("tokens", "from_draft")
        } | {"size": self.size}

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.tokens)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is kept of a round: nothing as wide as the vocabulary, and nothing the host would wait for."""

    emitted: Int[Tensor, "B"]
    accepted: Int[Tensor, "B"]
    tokens: Int[Tensor, "B N"]
    size: Int[Tensor, "B"]
    drafted: int
    seconds: dict[str, float]
    took: float


class Watch:
    """Takes a decode's rounds as they come; `run` folds them once the clock has stopped."""

    def __init__(self, device: torch.device) -> None:
        self.rounds, self.on_gpu = list[_Seen](), device.type == "cuda"
        self.begin = time.perf_counter()
        self.first = self.last = self.begin

    def add(self, r: Round) -> None:
        """A round is over."""
        if self.on_gpu:
            torch.cuda.synchronize()  # here the loop waits anyway, to learn which rows are done
        v, now = r.verification, time.perf_counter()
        drafted = r.draft.tokens.shape[1]
        self.rounds.append(
            _Seen(
                r.emitted,
                v.accepted,
                v.tokens,
                r.draft.sizes,
                drafted,
                dict(r.seconds),
                now - self.last,
            )
        )
        self.last = now
        if len(self.rounds) == 1:
            self.first = self.last

    def run(self, rows: int) -> Run:
        """All rounds as one Run of `rows` rows."""
        seconds = time.perf_counter() - self.begin
        total, tokens, drafted = (
            Stats(),
            [list[int]() for _ in range(rows)],
            [list[bool]() for _ in range(rows)],
        )
        lengths: list[list[int]] = [[] for _ in range(rows)]
        for seen in self.rounds:
            sizes = seen.size.tolist()
            told = zip(
                seen.emitted.tolist(),
                seen.accepted.tolist(),
                seen.tokens.tolist(),
                sizes,
                strict=True,
            )
            for row, (n, accepted, new, size) in enumerate(told):
                if n:
                    total.add(size, accepted, n, {})
                    lengths[row].append(n)
                    tokens[row] += new[:n]
                    drafted[row] += [k < accepted for k in range(n)]
            for stage, value in seen.seconds.items():
                total.seconds[stage] = total.seconds.get(stage, 0.0) + value
        first = self.rounds[0].seconds if self.rounds else {}
        total.seconds["prefill"] = max(0.0, self.first - self.begin - sum(first.values()))
        total.seconds["host"] = max(0.0, seconds - sum(total.seconds.values()))
        counted = [_fresh(n, t) for n, t in zip(lengths, tokens, strict=True)]
        return Run(
            tokens,
            seconds,
            self.first - self.begin,
            sum(n[0] for n in lengths if n),
            drafted,
            total.as_dict() | {"reached": total.reached, "kept": total.passed},
            sum(n for n, _ in counted),
            sum(n for _, n in counted),
            self._medians(),
        )

    def _medians(self) -> dict[str, float | None]:
        later = self.rounds[
            1:
        ]  # the first one allocates, and a drafter reads the whole prompt in it
        kinds = {
            "draft": [s for s in later if s.drafted],
            "plain": [s for s in later if not s.drafted],
        }
        found: dict[str, float | None] = {}
        for kind, rounds in kinds.items():
            found[f"{kind}_round"] = statistics.median(s.took for s in rounds) if rounds else None
            told = rounds and not self.on_gpu
            found[f"{kind}_score"] = (
                statistics.median(s.seconds["score"] for s in rounds) if told else None
            )
        return found


def _fresh(lengths: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """(tokens, rounds) of the rounds that end before the first repeated 8-gram does."""
    room, taken, rounds = fresh(tokens), 0, 0
    for n in lengths:
        if taken + n > room:
            break
        taken, rounds = taken + n, rounds + 1
    return taken, rounds
