"""Timed decoding: the workload of a turn, and the measurement that every baseline returns.

Shapes: B rows, N tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from specdiff.bench.settings import Cell
from specdiff.repetition import fresh
from specdiff.stats import Stats
from specdiff.types import Round

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts that are answered together, with one limit and one seed per row."""

    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    temperature: float
    stop_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """High-water mark in bytes.

    The mark is the whole process's: the weights of every baseline are in it. `growth` is what the
    run itself added. kind: "rss" (resident memory) or "cuda" (memory that torch allocated there).
    """

    kind: str
    peak: int
    growth: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over the rounds of a run; see `stats.Stats`. `passed[k]` of `reached[k]` drafted
    tokens at position k were accepted."""

    rounds: int
    plain_rounds: int
    tokens: int
    drafted: int
    accepted: int
    reached: list[int]
    passed: list[int]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Medians:
    """Median seconds of a drafting round, of a plain one, and of the scoring pass in each.

    None without such rounds, and for scoring passes on a GPU, where the host's clock cannot see
    them.
    """

    draft_round: float | None
    draft_score: float | None
    plain_round: float | None
    plain_score: float | None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run of a cell as the journal holds it: its measurement, or `why` there is none."""

    cell: Cell
    why: str | None = None
    size: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    first_tokens: int = 0
    counts: Counts | None = None
    fresh_tokens: int = 0
    fresh_rounds: int = 0
    medians: Medians | None = None
    memory: Memory | None = None
    joules: float | None = None
    pieces: list[tuple[str, bool]] | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed run: `tokens[row]` were generated in `seconds`.

    first_seconds, first_tokens: time of the first emission, and its size over all rows.
    from_draft: for each token, whether it was accepted from a draft.
    fresh_tokens, fresh_rounds: counts up to the first repeated 8-gram.

    Optional fields are None if a baseline does not report them.
    """

    tokens: list[list[int]]
    seconds: float
    first_seconds: float
    first_tokens: int
    from_draft: list[list[bool]] | None = None
    counts: Counts | None = None
    fresh_tokens: int = 0
    fresh_rounds: int = 0
    medians: Medians | None = None
    memory: Memory | None = None
    joules: float | None = None

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.tokens)

    def record(self, cell: Cell, pieces: list[tuple[str, bool]] | None = None) -> RunRecord:
        """Plain numbers for the journal; of the tokens only their count."""
        return RunRecord(
            cell=cell,
            size=self.size,
            seconds=self.seconds,
            first_seconds=self.first_seconds,
            first_tokens=self.first_tokens,
            counts=self.counts,
            fresh_tokens=self.fresh_tokens,
            fresh_rounds=self.fresh_rounds,
            medians=self.medians,
            memory=self.memory,
            joules=self.joules,
            pieces=pieces,
        )


@dataclass(frozen=True, slots=True)
class _RoundLog:
    """What the stopwatch stores of a round: nothing as wide as the vocabulary, and nothing that
    makes the host wait for the device."""

    emitted: Int[Tensor, "B"]
    accepted: Int[Tensor, "B"]
    tokens: Int[Tensor, "B N"]
    size: Int[Tensor, "B"] | None
    draft_len: int
    stages: dict[str, float]
    seconds: float

    def sizes(self, rows: int) -> list[int]:
        if self.size is None:
            return [self.draft_len] * rows
        sizes: list[int] = self.size.tolist()
        return sizes


class RoundTimer:
    """Logs the rounds of a decode; `measurement` folds them once the clock has stopped."""

    def __init__(self, device: torch.device) -> None:
        self.rounds: list[_RoundLog] = []
        self.on_gpu = device.type == "cuda"
        self.begin = time.perf_counter()
        self.first = self.begin
        self.last = self.begin

    def add(self, r: Round) -> None:
        """Log a finished round."""
        if self.on_gpu:
            torch.cuda.synchronize()  # the loop waits here anyway, to learn which rows are done
        now = time.perf_counter()
        self.rounds.append(
            _RoundLog(
                emitted=r.emitted,
                accepted=r.verification.accepted,
                tokens=r.verification.tokens,
                size=r.draft.size,
                draft_len=r.draft.tokens.shape[1],
                stages=dict(r.seconds),
                seconds=now - self.last,
            )
        )
        self.last = now
        if len(self.rounds) == 1:
            self.first = now

    def measurement(self, rows: int) -> Measurement:
        """All rounds of `rows` rows as one measurement."""
        seconds = time.perf_counter() - self.begin
        total = Stats()
        tokens: list[list[int]] = [[] for _ in range(rows)]
        from_draft: list[list[bool]] = [[] for _ in range(rows)]
        lengths: list[list[int]] = [[] for _ in range(rows)]
        for log in self.rounds:
            columns = (log.emitted.tolist(), log.accepted.tolist(), log.tokens.tolist())
            for row, (n, accepted, new, size) in enumerate(
                zip(*columns, log.sizes(rows), strict=True)
            ):
                if n:
                    total.add(size, accepted, n, {})
                    lengths[row].append(n)
                    tokens[row] += new[:n]
                    from_draft[row] += [k < accepted for k in range(n)]
        before_loops = [_fresh(n, t) for n, t in zip(lengths, tokens, strict=True)]
        return Measurement(
            tokens=tokens,
            seconds=seconds,
            first_seconds=self.first - self.begin,
            first_tokens=sum(n[0] for n in lengths if n),
            from_draft=from_draft,
            counts=Counts(
                rounds=total.rounds,
                plain_rounds=total.plain_rounds,
                tokens=total.tokens,
                drafted=total.drafted,
                accepted=total.accepted,
                reached=total.reached,
                passed=total.passed,
                seconds=self._stages(seconds),
            ),
            fresh_tokens=sum(n for n, _ in before_loops),
            fresh_rounds=sum(n for _, n in before_loops),
            medians=self._medians(),
        )

    def _stages(self, total: float) -> dict[str, float]:
        """Seconds by stage; "prefill" precedes the first round, "host" is the remainder."""
        stages: dict[str, float] = {}
        for log in self.rounds:
            for stage, value in log.stages.items():
                stages[stage] = stages.get(stage, 0.0) + value
        first = self.rounds[0].stages if self.rounds else {}
        stages["prefill"] = max(0.0, self.first - self.begin - sum(first.values()))
        stages["host"] = max(0.0, total - sum(stages.values()))
        return stages

    def _medians(self) -> Medians:
        # the first round allocates, and a drafter reads the whole prompt in it
        later = self.rounds[1:]
        drafting = [log for log in later if log.draft_len]
        plain = [log for log in later if not log.draft_len]
        return Medians(
            draft_round=_median([log.seconds for log in drafting]),
            draft_score=self._score(drafting),
            plain_round=_median([log.seconds for log in plain]),
            plain_score=self._score(plain),
        )

    def _score(self, rounds: Sequence[_RoundLog]) -> float | None:
        return None if self.on_gpu else _median([log.stages["score"] for log in rounds])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _fresh(lengths: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """(tokens, rounds) of the rounds that end before the first repeated 8-gram does."""
    room = fresh(tokens)
    total = 0
    rounds = 0
    for n in lengths:
        if total + n > room:
            break
        total += n
        rounds += 1
    return total, rounds


def watch_memory(device: torch.device) -> Callable[[], Memory | None]:
    """Reset the high-water mark; the returned function reads it.

    It returns None if the system has no mark that can be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)

        def read() -> Memory | None:
            peak = torch.cuda.max_memory_allocated(device)
            return Memory("cuda", peak, peak - before)

        return read
    try:
        CLEAR.write_text("5", encoding="ascii")  # Linux: reset VmHWM
        level = _status("VmRSS")
    except (OSError, StopIteration):
        return lambda: None
    return lambda: Memory("rss", peak := _status("VmHWM"), max(0, peak - level))


def _status(name: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A counter of joules (of the whole GPU, or CPU package); None if the device has none."""
    if device.type == "cuda" and util.find_spec("pynvml") is not None:
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    if device.type == "cpu":
        with suppress(OSError, ValueError):
            int(RAPL.read_text(encoding="ascii"))
            return lambda: int(RAPL.read_text(encoding="ascii")) / 1e6
    return None
