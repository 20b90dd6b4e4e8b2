"""Baseline decoders: our engine with any drafter, and transformers' own ways.

At temperature 0 all of them must emit the same tokens; `equality.divergences` compares them.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from specdiff import catalog, decode
from specdiff.bench.settings import ASSISTED, DFLASH, LOOKUP, Cell
from specdiff.bench.timing import Measurement, RoundTimer, Workload, energy_counter, watch_memory
from specdiff.controller import Controller, profile_of
from specdiff.drafters.base import Drafter
from specdiff.errors import DrafterError, UnsupportedModelError, UsageError
from specdiff.models.packed import formats
from specdiff.nn.borrowed import scatter
from specdiff.nn.small_lm import SmallLM
from specdiff.profile import Profile
from specdiff.targets.base import Target
from specdiff.targets.causal import CausalTarget
from specdiff.types import Batch, SamplingParams, TargetInfo
from specdiff.verify import verifier


class Decoder(ABC):
    """One baseline, loaded."""

    @abstractmethod
    def run(self, cell: Cell, work: Workload) -> Measurement:
        """Answer the prompts once, timed. Any exception is reported in the cell."""


@contextmanager
def without_faults() -> Iterator[None]:
    """Raises DrafterError if the drafter failed within and plain rounds replaced it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    fault = next((text for text in messages if text.startswith("the drafter ")), None)
    if fault:
        raise DrafterError(fault)


class OurDecoder(Decoder):
    """Our loop with a drafter, which is built once for each number of steps."""

    def __init__(
        self, target: Target[Any], build: Callable[[Mapping[str, Any]], Drafter[Any]]
    ) -> None:
        self.target = target
        self.build = build
        self._drafters: dict[int | None, Drafter[Any]] = {}
        self._profiles: dict[int | None, Profile] = {}

    def drafter(self, steps: int | None) -> Drafter[Any]:
        """The drafter at `steps` network passes per draft (None: its own number)."""
        if steps not in self._drafters:
            self._drafters[steps] = self.build({} if steps is None else {"steps": steps})
        return self._drafters[steps]

    def run(self, cell: Cell, work: Workload) -> Measurement:
        """Raises DrafterError if the drafter fails."""
        drafter = self.drafter(cell.steps)
        batch = batch_of(work, self.target.info.device)
        profile = self._profiles.setdefault(cell.steps, profile_of(drafter))
        greedy = cell.temperature == 0
        length = Controller(profile, greedy) if cell.draft_len == "auto" else cell.draft_len
        assert not isinstance(length, str)
        with without_faults():
            watch = RoundTimer(self.target.info.device)
            for r in decode.decode(
                self.target,
                drafter,
                batch,
                verifier=verifier(cell.verifier or "token"),
                draft_len=length,
            ):
                watch.add(r)
            return watch.measurement(len(work.prompts))


def batch_of(work: Workload, device: torch.device) -> Batch:
    """The workload as a batch of our loop."""
    params = [
        SamplingParams(max_tokens=n, temperature=work.temperature, stop_token_ids=work.stop_ids)
        for n in work.limits
    ]
    return Batch.of(work.prompts, params, work.seeds, device=device)


class TransformersDecoder(Decoder):
    """transformers' generate on its own copy of the model. kind: see settings.Baseline."""

    def __init__(
        self, model: PreTrainedModel, kind: str, assistant: nn.Module | None = None
    ) -> None:
        self.model = model
        self.kind = kind
        self.assistant = assistant
        # generate fills unset options from the model's own defaults
        model.generation_config = GenerationConfig()

    def run(self, cell: Cell, work: Workload) -> Measurement:
        """Raises UsageError for a batch if transformers speculates: it takes one row only."""
        if self.kind in (ASSISTED, DFLASH, LOOKUP) and len(work.prompts) > 1:
            raise UsageError("transformers speculates at batch 1 only")
        ids, mask = _left_padded(work, self.model.device)
        extra: dict[str, Any] = {}
        if self.kind in (ASSISTED, DFLASH):
            extra = {"assistant_model": self.assistant}
        if self.kind == DFLASH:
            extra["speculation_type"] = "dflash"
        if self.kind == LOOKUP:
            extra = {"prompt_lookup_num_tokens": cell.draft_len}
        torch.manual_seed(work.seeds[0] % (1 << 63))
        streamer = _FirstToken()
        model: Any = self.model
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=mask, generation_config=_config(work), streamer=streamer, **extra
        )
        new = out[:, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - begin
        tokens = [_until(row[:n], work.stop_ids) for row, n in zip(new, work.limits, strict=True)]
        if streamer.count:
            return Measurement(tokens, seconds, streamer.time - begin, streamer.count)
        return Measurement(tokens, seconds, seconds, sum(map(len, tokens)))


def measure(decoder: Decoder, cell: Cell, work: Workload, device: torch.device) -> Measurement:
    """One run with its memory and, if the device reports it, its energy."""
    joules = energy_counter(device)
    peak = watch_memory(device)
    before = joules() if joules else 0.0
    measurement = decoder.run(cell, work)
    return replace(measurement, memory=peak(), joules=joules() - before if joules else None)


class _FirstToken(BaseStreamer):
    """Time and size of the first emission: generate streams the prompt, then each emission."""

    def __init__(self) -> None:
        self.after_prompt = False
        self.time = 0.0
        self.count = 0

    def put(self, value: Tensor) -> None:
        if self.after_prompt and not self.count:
            self.time = time.perf_counter()
            self.count = value.numel()
        self.after_prompt = True

    def end(self) -> None:
        return None


def _config(work: Workload) -> GenerationConfig:
    """Temperature and stop ids, and nothing that changes the distribution."""
    ends = list(work.stop_ids) or None
    config = GenerationConfig(
        max_new_tokens=max(work.limits),
        eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0,
        do_sample=False,
    )
    if work.temperature:
        config.update(do_sample=True, temperature=work.temperature, top_k=0, top_p=1.0)
    return config


def _left_padded(
    work: Workload, device: torch.device
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    width = max(len(p) for p in work.prompts)
    rows = [[0] * (width - len(p)) + list(p) for p in work.prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in work.prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _until(row: list[int], stops: tuple[int, ...]) -> list[int]:
    """Up to the first stop id, inclusive: what follows is padding."""
    end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]


class SpreadHead(nn.Module):
    """Read-out over a draft vocabulary as logits of the target's whole vocabulary.

    Tokens outside the draft vocabulary cannot be drawn, as in our own drafter.
    """

    def __init__(self, head: nn.Module, draft_vocab: Int[Tensor, "C"], vocab_size: int) -> None:
        super().__init__()
        self.head = head
        self.vocab_size = vocab_size
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    def forward(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B V"]:
        logits: Tensor = self.head(hidden)
        return scatter(logits, self.get_buffer("draft_vocab"), self.vocab_size)


def stock_model(model: str, target: Target[Any], quantize: str) -> PreTrainedModel:
    """The target as transformers loads it, with its own weights and none of our code.

    quantize: that of `specdiff.load`. A quantized target's model computes with the same layers.
    """
    info = target.info
    rounded = isinstance(target, CausalTarget) and formats(target.model)
    stock: PreTrainedModel
    stock, _ = catalog.network(
        model, info.dtype, info.device, quantize=quantize if rounded else "none"
    )
    return stock


def assistant_model(spec: str, info: TargetInfo) -> PreTrainedModel:
    """The causal LM of an autoregressive drafter spec, as transformers can run it.

    Raises UnsupportedModelError if there is none, and what loading raises.
    """
    folder: Path | None = catalog.trained_folder(spec, info)
    if folder is None:
        raise UnsupportedModelError(
            f"the drafter {spec!r} is no causal LM that transformers could run as an assistant"
        )
    small = SmallLM.from_pretrained(folder, dtype=info.dtype)
    if small.vocab_size != info.vocab_size:
        raise UnsupportedModelError(
            f"the drafter has {small.vocab_size} tokens, but the target {info.vocab_size}"
        )
    net: Any = small.net
    if small.borrows:
        # else our own drafter would have been refused
        assert info.embedding is not None and info.head is not None
        small.borrow(info.embedding, info.head)
    if small.draft_vocab_size is not None:
        head = SpreadHead(net.get_output_embeddings(), small.draft_vocab, small.vocab_size)
        net.set_output_embeddings(head)
    assistant: PreTrainedModel = net.to(info.device).eval()
    return assistant
