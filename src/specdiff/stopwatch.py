"""Stopwatches: seconds by stage of a round, on the host or on a CUDA stream."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, Self

import torch


def stopwatch(device: torch.device) -> "Stopwatch | DeviceStopwatch":
    """A stopwatch that measures the work of a stage on `device`, not the time to queue it."""
    if device.type != "cuda":
        return Stopwatch()
    stream = torch.cuda.current_stream(device)
    return DeviceStopwatch(lambda: StreamEvent(stream))


class Event(Protocol):
    """A mark on a device's stream; the device records the time at which it reaches the mark."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Self) -> float: ...


class Stopwatch:
    """Host seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self.last
        self.last = now


class DeviceStopwatch:
    """Device seconds by stage. A stage returns to the host as soon as its work is queued."""

    def __init__(self, event: Callable[[], Event]) -> None:
        self.event = event
        self.seconds = DeviceSeconds(self._mark())

    def lap(self, stage: str) -> None:
        self.seconds.ends[stage] = self._mark()

    def _mark(self) -> Event:
        event = self.event()
        event.record()
        return event


class DeviceSeconds(Mapping[str, float]):
    """Durations by stage, computed on first access, which waits for the round's last stage.

    A loop that has read `Round.batch.done` does not wait again.
    """

    def __init__(self, start: Event) -> None:
        self.start = start
        self.ends: dict[str, Event] = {}
        self.durations: dict[str, float] = {}

    def __getitem__(self, stage: str) -> float:
        if not self.durations:
            last = self.start
            for name, end in self.ends.items():
                end.synchronize()
                self.durations[name] = last.elapsed_time(end) / 1000  # events count milliseconds
                last = end
        return self.durations[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ends)

    def __len__(self) -> int:
        return len(self.ends)


class StreamEvent:
    """A CUDA event on a given stream, whatever the current device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self.event.record(self.stream)

    def synchronize(self) -> None:
        self.event.synchronize()

    def elapsed_time(self, end: Self) -> float:
        return float(self.event.elapsed_time(end.event))
