"""The ways to decode that take turns: our engine with any drafter, and transformers' own three."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from specdiff import decode
from specdiff.bench.gauges import joules, watch_memory
from specdiff.bench.plan import ASSISTED, LOOKUP, Cell
from specdiff.bench.runs import Ask, Run, Watch
from specdiff.controller import Controller
from specdiff.drafters.base import Drafter
from specdiff.errors import DrafterError, UsageError
from specdiff.targets.base import Target
from specdiff.types import Batch, SamplingParams
from specdiff.verify import verifier


class Decoder(ABC):
    """One baseline, loaded."""

    @abstractmethod
    def run(self, cell: Cell, ask: Ask) -> Run:
        """Answer the prompts once, timed. Raises whatever goes wrong; the runner says so in the cell."""


@contextmanager
def unbroken() -> Iterator[None]:
    """What is measured within is the drafter's own work: raises DrafterError if it broke, and plain rounds took its place."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    broken = next((str(w.message) for w in told if str(w.message).startswith("the drafter ")), None)
    if broken:
        raise DrafterError(broken)


class Ours(Decoder):
    """Our loop around a drafter, built anew for each number of steps (None: the drafter takes none)."""

    def __init__(
        self, target: Target[Any], build: Callable[[Mapping[str, Any]], Drafter[Any]]
    ) -> None:
        self.target, self.build = target, build
        self.built: dict[int | None, Drafter[Any]] = {}

    def drafter(self, steps: int | None) -> Drafter[Any]:
        """The drafter of so many passes a draft."""
        if steps not in self.built:
            self.built[steps] = self.build({} if steps is None else {"steps": steps})
        return self.built[steps]

    def run(self, cell: Cell, ask: Ask) -> Run:
        """Raises DrafterError if the drafter broke on the way."""
        drafter = self.drafter(cell.steps)
        params = [
            SamplingParams(max_tokens=n, temperature=ask.temperature, stop_token_ids=ask.stop_ids)
            for n in ask.limits
        ]
        batch = Batch.of(ask.prompts, params, ask.seeds, device=self.target.info.device)
        length = Controller(drafter.draft_len) if cell.draft_len == "auto" else cell.draft_len
        assert not isinstance(length, str)
        with unbroken():
            watch = Watch(self.target.info.device)
            for r in decode.decode(
                self.target,
                drafter,
                batch,
                verifier=verifier(cell.verifier or "token"),
                draft_len=length,
            ):
                watch.add(r)
            return watch.run(len(ask.prompts))


class Theirs(Decoder):
    """transformers' generate on its own copy of the model, in its own attention. kind: see plan.Entry."""

    def __init__(
        self, model: PreTrainedModel, kind: str, assistant: PreTrainedModel | None = None
    ) -> None:
        self.model, self.kind, self.assistant = model, kind, assistant
        model.generation_config = (
            GenerationConfig()
        )  # generate would fill up what it is not told from the model's own defaults

    def run(self, cell: Cell, ask: Ask) -> Run:
        """Raises UsageError for a batch where transformers speculates, which it does for one row only."""
        if self.kind in (ASSISTED, LOOKUP) and len(ask.prompts) > 1:
            raise UsageError("transformers speculates at batch 1 only")
        ids, mask = _left_padded(ask, self.model.device)
        extra: dict[str, Any] = {"assistant_model": self.assistant} if self.kind == ASSISTED else {}
        if self.kind == LOOKUP:
            extra = {"prompt_lookup_num_tokens": cell.draft_len}
        torch.manual_seed(ask.seeds[0] % (1 << 63))
        streamer = _FirstToken()
        model: Any = self.model
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=mask, generation_config=_config(ask), streamer=streamer, **extra
        )
        new = out[:, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - begin
        tokens = [_until(row[:n], ask.stop_ids) for row, n in zip(new, ask.limits, strict=True)]
        first = (
            (streamer.at - begin, streamer.count)
            if streamer.count
            else (seconds, sum(map(len, tokens)))
        )
        return Run(tokens, seconds, *first)


def measured(decoder: Decoder, cell: Cell, ask: Ask, device: torch.device) -> Run:
    """The run with its memory and, where the device tells, its joules."""
    spent, peak = joules(device), watch_memory(device)
    before = spent() if spent else 0.0
    run = decoder.run(cell, ask)
    return replace(run, memory=peak(), joules=spent() - before if spent else None)


class _FirstToken(BaseStreamer):
    """When the first tokens came, and how many: generate hands over the prompt, then each emission."""

    def __init__(self) -> None:
        self.prompted, self.at, self.count = False, 0.0, 0

    def put(self, value: Tensor) -> None:
        if self.prompted and not self.count:
            self.at, self.count = time.perf_counter(), value.numel()
        self.prompted = True

    def end(self) -> None:
        return None


def _config(ask: Ask) -> GenerationConfig:
    """Temperature and ends, and nothing that would make it another law."""
    heat = (
        {"do_sample": True, "temperature": ask.temperature, "top_k": 0, "top_p": 1.0}
        if ask.temperature
        else {"do_sample": False}
    )
    ends = list(ask.stop_ids) or None
    return GenerationConfig(
        **heat,
        max_new_tokens=max(ask.limits),
        eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0,
    )


def _left_padded(ask: Ask, device: torch.device) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    width = max(len(p) for p in ask.prompts)
    rows = [[0] * (width - len(p)) + list(p) for p in ask.prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in ask.prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _until(row: list[int], stops: tuple[int, ...]) -> list[int]:
    """Up to the first end, and with it: what lies behind is padding."""
    end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]
