"""One part, loaded: the target, its prompts, and every baseline that could be had. Knows what failed, and which settings were best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

import specdiff
from specdiff import catalog
from specdiff.bench import assistants, suites
from specdiff.bench.baselines import Decoder, Ours, Theirs, measured
from specdiff.bench.plan import ASSISTED, HF, LOOKUP, VANILLA, Cell, Entry, Part, Settings
from specdiff.bench.runs import Ask, Run
from specdiff.bench.suites import Prompt
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.base import NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.errors import UsageError
from specdiff.noise import row_seed
from specdiff.text.lm import SpeculativeLM

LOADING = (
    specdiff.SpecdiffError,
    OSError,
    RuntimeError,
    ValueError,
    MemoryError,
)  # transformers raises all kinds of the last three
Best = tuple[int | None, int | None]


@dataclass(slots=True)
class Session:
    """`problems` says why a baseline cannot run at all, `limits` why it does not from a batch size on; `best` and `rates` (tokens per
    second) are what tuning found at a temperature."""

    part: Part
    settings: Settings
    lm: SpeculativeLM
    prompts: list[Prompt]
    notes: list[str]
    decoders: dict[str, Decoder] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    limits: dict[Cell, str] = field(default_factory=dict)
    best: dict[tuple[str, float], Best] = field(default_factory=dict)
    rates: dict[tuple[str, float], float] = field(default_factory=dict)

    def entries(self, *, drafting: bool = False) -> list[Entry]:
        """The baselines that were loaded; `drafting`: only those of ours with a drafter."""
        return [
            e
            for e in self.part.entries
            if e.name in self.decoders and not (drafting and (e.kind != "ours" or e.spec == "none"))
        ]

    def takes_steps(self, entry: Entry) -> bool:
        """Whether a baseline's drafter counts network passes."""
        decoder = self.decoders[entry.name]
        return isinstance(decoder, Ours) and isinstance(
            decoder.drafter(entry.steps), DenoisingDrafter | AnyOrderDrafter
        )

    def grid(self, entry: Entry) -> list[Best]:
        """The settings among which a baseline's are tuned: draft lengths, and steps where sweeps are wanted."""
        settings = self.settings
        if entry.kind in (HF, ASSISTED) or entry.spec == "none":
            return [(None, None)]
        lengths = settings.gammas if entry.draft_len is None else (entry.draft_len,)
        if not self.takes_steps(entry):
            return [(n, None) for n in lengths]
        steps = (
            (entry.steps,)
            if entry.steps is not None
            else settings.steps
            if settings.sweeps
            else settings.steps[:1]
        )
        return [(n, t) for t in steps for n in lengths]

    def cell(
        self, stage: str, entry: Entry, temperature: float, batch: int, chosen: Best | None = None
    ) -> Cell:
        """The cell of a baseline, at its best settings or at `chosen` ones."""
        draft_len, steps = chosen or self.best.get((entry.name, temperature)) or self.grid(entry)[0]
        verifier = self.settings.verifier if entry.kind == "ours" else None
        return Cell(stage, entry.name, draft_len, steps, verifier, temperature, batch)

    def ask(
        self,
        prompts: Sequence[Prompt],
        temperature: float,
        *,
        seed: int,
        most: int | None = None,
        exactly: int | None = None,
    ) -> Ask:
        """What all baselines of a turn are asked alike. Rows end at the part's limit, or `most` tokens, or the model's last position;
        `exactly`: at so many tokens, and at no end of text before."""
        wanted = exactly or most or self.part.max_tokens
        limits = tuple(min(wanted, self.lm.max_len - len(p.ids)) for p in prompts)
        seeds = tuple(row_seed(self.settings.seed + seed, i) for i in range(len(prompts)))
        ends = () if exactly or self.part.ignore_eos else self.lm.end_ids
        return Ask(tuple(p.ids for p in prompts), limits, temperature, ends, seeds)

    def attempt(self, cell: Cell, ask: Ask, *, remember: bool = True) -> Run | str:
        """One run, or why there is none. `remember`: nor will there be from then on by this setting at any larger batch."""
        if cell.baseline in self.problems:
            return self.problems[cell.baseline]
        for met, why in self.limits.items():
            if met.batch <= cell.batch and met == replace(cell, stage=met.stage, batch=met.batch):
                return why
        try:
            return measured(self.decoders[cell.baseline], cell, ask, self.lm.target.info.device)
        except Exception as error:  # whatever it is, the other baselines go on
            why = explained(error, cell.batch)
            if remember:
                self.limits[cell] = why
            if self.lm.target.info.device.type == "cuda":
                torch.cuda.empty_cache()
            return why

    def learn(self, record: Mapping[str, Any]) -> None:
        """What tuning found, now or in the run that is gone on with."""
        if record["kind"] != "tune":
            return
        if record["best"] is None:
            self.problems[record["baseline"]] = record["why"]
            return
        best = record["best"]
        for heat in (
            (float(record["temperature"]),)
            if self.settings.tune_each
            else self.settings.temperatures
        ):
            self.best[record["baseline"], heat] = (best["draft_len"], best["steps"])
            self.rates[record["baseline"], heat] = best["tokens_per_second"]


def explained(error: Exception, batch: int) -> str:
    """An error in one line; out of memory says at which batch size."""
    line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "not enough memory" in line
        or "can't allocate memory" in line
    ):
        return f"out of memory at batch {batch}: {line or type(error).__name__}"
    return line if isinstance(error, specdiff.SpecdiffError) else f"{type(error).__name__}: {line}"


def load(part: Part, settings: Settings, texts: list[suites.Text]) -> Session:
    """Load a part's target and baselines. Raises what loading the target raises, and UsageError where no prompt is left."""
    lm = specdiff.load(
        part.model, "none", device=settings.device, dtype=settings.dtype, max_len=1 << 30
    )
    prompts, notes = suites.encode(texts, lm, part.prefix)
    if not prompts:
        raise UsageError(
            f"{part.model} has no room for any prompt: {notes[0] if notes else 'there are none'}"
        )
    session = Session(part, settings, lm, prompts, [*part.notes, *notes])
    shared: dict[str, PreTrainedModel] = {}
    for entry in part.entries:
        try:
            session.decoders[entry.name] = _decoder(entry, part, lm, shared)
        except LOADING as error:
            session.problems[entry.name] = explained(error, 1)
    return session


def _decoder(
    entry: Entry, part: Part, lm: SpeculativeLM, shared: dict[str, PreTrainedModel]
) -> Decoder:
    info = lm.target.info
    if entry.kind == "ours":
        build: Callable[[Mapping[str, Any]], Any] = partial(
            catalog.drafter, entry.spec or "none", info
        )
        made = Ours(lm.target, build)
        if isinstance(made.drafter(entry.steps), NoDrafter) != (entry.name == VANILLA):
            raise UsageError(
                f"the drafter {entry.spec!r} is no drafter for {info.name!r}; plain decoding is measured as {VANILLA}"
            )
        return made
    if HF not in shared:
        shared[HF] = assistants.stock(part.model, info)
    helper = assistants.assistant(entry.spec or "", info) if entry.kind == ASSISTED else None
    assert entry.kind in (HF, ASSISTED, LOOKUP)
    return Theirs(shared[HF], entry.kind, helper)
