"""Experiment: a loaded part of a benchmark, with its target, prompts and baselines.

It runs cells, and it records failures and the best settings so far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import specdiff
from specdiff import catalog
from specdiff.bench import baselines, suites
from specdiff.bench.baselines import Decoder, OurDecoder, TransformersDecoder
from specdiff.bench.journal import Tuning
from specdiff.bench.llama_cpp import LlamaCppDecoder
from specdiff.bench.settings import (
    ASSISTED,
    DFLASH,
    HF,
    LLAMA_CPP,
    LOOKUP,
    PEERS,
    VANILLA,
    Baseline,
    BenchSettings,
    Cell,
    Part,
)
from specdiff.bench.suites import EncodedPrompt
from specdiff.bench.timing import Measurement, Workload
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.base import NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.errors import UnsupportedModelError, UsageError
from specdiff.noise import row_seed
from specdiff.text.lm import SpeculativeLM
from specdiff.types import TargetInfo

# transformers raises all kinds of the last three
LOADING = (specdiff.SpecdiffError, OSError, RuntimeError, ValueError, MemoryError)
DrafterSetting = tuple[int | str | None, int | None]  # draft length, steps


@dataclass(slots=True)
class Experiment:
    """A loaded part.

    problems: why a baseline cannot run at all.
    limits: why a cell does not run, nor any like it at a larger batch.
    best, rates: tuning's settings and tokens per second, by baseline and temperature.
    """

    part: Part
    settings: BenchSettings
    lm: SpeculativeLM
    prompts: list[EncodedPrompt]
    notes: list[str]
    decoders: dict[str, Decoder] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    limits: dict[Cell, str] = field(default_factory=dict)
    best: dict[tuple[str, float], DrafterSetting] = field(default_factory=dict)
    rates: dict[tuple[str, float], float] = field(default_factory=dict)

    def baselines(self, *, drafting: bool = False) -> list[Baseline]:
        """The loaded baselines; `drafting`: only those of ours with a drafter."""
        loaded = [b for b in self.part.baselines if b.name in self.decoders]
        return [b for b in loaded if b.drafts or not drafting]

    def distinct(self, temperature: float) -> list[Baseline]:
        """The loaded baselines, without those that are like others at temperature 0."""
        return [b for b in self.baselines() if temperature or b.draft_temperature is None]

    def takes_steps(self, baseline: Baseline) -> bool:
        """Whether a baseline's drafter has a number of network passes."""
        decoder = self.decoders[baseline.name]
        if not isinstance(decoder, OurDecoder):
            return False
        return isinstance(decoder.drafter(baseline.steps), DenoisingDrafter | AnyOrderDrafter)

    def grid(self, baseline: Baseline) -> list[DrafterSetting]:
        """The settings to tune over: draft lengths, and steps if the sweeps are on."""
        settings = self.settings
        if baseline.kind in (HF, ASSISTED, DFLASH, *PEERS) or baseline.spec == "none":
            return [(None, None)]
        fixed = baseline.draft_len
        lengths: tuple[int | str, ...] = settings.gammas if fixed is None else (fixed,)
        if not self.takes_steps(baseline):
            return [(n, None) for n in lengths]
        steps = settings.steps if settings.sweeps else settings.steps[:1]
        if baseline.steps is not None:
            steps = (baseline.steps,)
        return [(n, t) for t in steps for n in lengths]

    def cell(
        self,
        stage: str,
        baseline: Baseline,
        temperature: float,
        batch: int,
        setting: DrafterSetting | None = None,
    ) -> Cell:
        """The cell of a baseline, at its best setting unless another is given."""
        best = self.best.get((baseline.name, temperature))
        draft_len, steps = setting or best or self.grid(baseline)[0]
        verifier = self.settings.verifier if baseline.kind == "ours" else None
        return Cell(stage, baseline.name, draft_len, steps, verifier, temperature, batch)

    def workload(
        self,
        prompts: Sequence[EncodedPrompt],
        temperature: float,
        *,
        seed: int,
        most: int | None = None,
        exactly: int | None = None,
    ) -> Workload:
        """The same work for all baselines of a turn.

        Rows end at the part's limit, after `most` tokens, or at the model's last position;
        with `exactly`, after that number of tokens whatever they are.
        """
        limit = exactly or most or self.part.max_tokens
        return Workload(
            prompts=tuple(p.ids for p in prompts),
            limits=tuple(min(limit, self.lm.max_len - len(p.ids)) for p in prompts),
            temperature=temperature,
            stop_ids=() if exactly or self.part.ignore_eos else self.lm.end_ids,
            seeds=tuple(row_seed(self.settings.seed + seed, i) for i in range(len(prompts))),
        )

    def attempt(self, cell: Cell, work: Workload, *, remember: bool = True) -> Measurement | str:
        """One run, or why there is none.

        `remember`: after a failure, the same setting is not tried again at this batch or above.
        """
        if cell.baseline in self.problems:
            return self.problems[cell.baseline]
        for other, why in self.limits.items():
            alike = cell == replace(other, stage=cell.stage, batch=cell.batch)
            if alike and other.batch <= cell.batch:
                return why
        device = self.lm.target.info.device
        try:
            return baselines.measure(self.decoders[cell.baseline], cell, work, device)
        except Exception as error:  # whatever it is, the other baselines still run
            why = explain(error, cell.batch)
            if remember:
                self.limits[cell] = why
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return why

    def restore(self, tuning: Tuning) -> None:
        """Restore tuning results, from this run or the resumed one."""
        if tuning.best is None:
            self.problems[tuning.baseline] = tuning.why or "tuning failed"
            return
        temperatures = self.settings.temperatures
        if self.settings.tune_each:
            temperatures = (float(tuning.temperature),)
        for temperature in temperatures:
            key = (tuning.baseline, temperature)
            self.best[key] = (tuning.best.draft_len, tuning.best.steps)
            self.rates[key] = tuning.best.tokens_per_second or 0.0


def explain(error: Exception, batch: int) -> str:
    """An error in one line; out of memory names the batch size."""
    line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "not enough memory" in line
        or "can't allocate memory" in line
    ):
        return f"out of memory at batch {batch}: {line or type(error).__name__}"
    return line if isinstance(error, specdiff.SpecdiffError) else f"{type(error).__name__}: {line}"


def load(part: Part, settings: BenchSettings, texts: list[suites.PromptText]) -> Experiment:
    """Load a part's target and baselines.

    Raises what loading the target raises, and UsageError if no prompt fits.
    """
    lm = specdiff.load(
        part.model,
        "none",
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        max_len=1 << 30,
        threads=settings.threads,
        compile=settings.compile,
    )
    lm.wait_for_compilation()
    prompts, notes = suites.encode(texts, lm, part.prefix)
    if not prompts:
        reason = notes[0] if notes else "there are none"
        raise UsageError(f"{part.model} has no room for any prompt: {reason}")
    experiment = Experiment(part, settings, lm, prompts, [*part.notes, *notes])
    shared: dict[str, PreTrainedModel] = {}
    for baseline in part.baselines:
        try:
            experiment.decoders[baseline.name] = _decoder(baseline, part, lm, settings, shared)
        except LOADING as error:
            experiment.problems[baseline.name] = explain(error, 1)
    return experiment


def _decoder(
    baseline: Baseline,
    part: Part,
    lm: SpeculativeLM,
    settings: BenchSettings,
    shared: dict[str, PreTrainedModel],
) -> Decoder:
    info = lm.target.info
    if baseline.kind == "ours":
        spec = baseline.spec or "none"
        build: Callable[[Mapping[str, Any]], Any] = partial(catalog.drafter, spec, info)
        if baseline.draft_temperature is not None:
            build = partial(_at_draft_temperature, build, baseline.draft_temperature)
        decoder = OurDecoder(lm.target, build)
        plain = isinstance(decoder.drafter(baseline.steps), NoDrafter)
        if plain != (baseline.name == VANILLA):
            raise UsageError(
                f"the drafter {baseline.spec!r} is no drafter for {info.name!r}; "
                f"plain decoding is measured as {VANILLA}"
            )
        return decoder
    if baseline.kind == LLAMA_CPP:
        return LlamaCppDecoder(part.model, lm.max_len)
    if HF not in shared:
        shared[HF] = baselines.stock_model(part.model, lm.target, settings.quantize)
    assistant: nn.Module | None = None
    if baseline.kind == ASSISTED:
        assistant = baselines.assistant_model(baseline.spec or "", info)
    if baseline.kind == DFLASH:
        assistant = _dflash_assistant(baseline.spec or "", info)
    assert baseline.kind in (HF, ASSISTED, DFLASH, LOOKUP)
    return TransformersDecoder(shared[HF], baseline.kind, assistant)


def _at_draft_temperature(
    build: Callable[[Mapping[str, Any]], Any], draft_temperature: float, options: Mapping[str, Any]
) -> Any:
    return build({**options, "draft_temperature": draft_temperature})


def _dflash_assistant(spec: str, info: TargetInfo) -> nn.Module:
    """Raises UnsupportedModelError where transformers is older than its DFlash generator."""
    try:
        from specdiff.bench import dflash
    except ImportError as error:
        raise UnsupportedModelError(
            f"this version of transformers has no DFlash generator ({error}); update it"
        ) from error
    return dflash.assistant(spec, info)
