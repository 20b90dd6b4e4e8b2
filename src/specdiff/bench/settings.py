"""Benchmark settings: the options, baselines and parts of a benchmark, and the cells of its table.

All of it is plain data: nothing here loads a model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdiff.bench.suites import PromptText
from specdiff.errors import UsageError
from specdiff.text.load import DTYPES, QUANTIZE
from specdiff.text.threads import checked
from specdiff.verify import VERIFIERS

HF = "hf"
ASSISTED = "hf-assisted"
DFLASH = "hf-dflash"
LOOKUP = "hf-prompt-lookup"
VANILLA = "ours-vanilla"
LLAMA_CPP = "llama.cpp"
PEERS = (LLAMA_CPP,)  # other engines, measured on request
AUTO = "auto"  # the drafter that is the default, and the draft length that is chosen while decoding
# drafters of this library, measured unless replaced; each is the spec of its own name
OURS = ("autoregressive", "sedd", "block", "ngram", "cascade", AUTO)
CURVE = 32  # positions of a full cost curve
SCALES = ("paper", "embedded")
LOOKING_UP = ("ngram", "cascade", AUTO)
NAME = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Everything that decides what is measured. Two runs can be joined (--resume) if all of it
    is equal.

    `contexts` and `widths` are those of the cost curves; `sweeps` adds the sweeps of draft length
    and steps, which take `sample` prompts, as acceptance counts do. Tuning takes `tuning_tokens`
    per prompt, at every temperature (`tune_each`) or only at the first. `only` limits the
    baselines to these and the two references of speed-ups; () means all. `peers` are other engines
    to measure. Each drafter that is a network is measured at each of `draft_temperatures`, too, as
    NAME-tT. `curves` scores every number of positions up to CURVE, besides `widths`. `scale`,
    `texts` and `finetune` belong to the paper suite: see paper_embedded.py.

    Raises UsageError.
    """

    suite: str
    model: str
    drafters: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_tokens: int = 64
    prompts: int | None = None
    per_task: int | None = None
    times: int = 1
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    gammas: tuple[int, ...] = (2, 4, 8, 16)
    steps: tuple[int, ...] = (1, 2, 4)
    draft_temperatures: tuple[float, ...] = ()
    verifier: str = "token"
    draft_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "auto"
    threads: int | str | None = None
    compile: bool = False
    sweeps: bool = True
    sample: int = 5
    tuning_tokens: int = 32
    tune_each: bool = True
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    curves: bool = False
    smoke: bool = False
    scale: str = "paper"
    texts: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    finetune_steps: int = 200
    suite_sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "gammas", "steps", "contexts", "widths"):
            for value in getattr(self, name):
                _require(name, value, value >= 1, "whole numbers of at least 1")
        for name in ("max_tokens", "times", "prompts", "per_task", "draft_len", "finetune_steps"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 1, "at least 1")
        for name in ("temperatures", "batch", "gammas", "steps"):
            values = getattr(self, name)
            _require(name, values, len(values) > 0, "one value at least")
        for name in ("temperatures", "draft_temperatures"):
            for value in getattr(self, name):
                _require(name, value, 0 <= value < float("inf"), "finite numbers >= 0")
        verifiers = f"one of {', '.join(VERIFIERS)}"
        _require("verifier", self.verifier, self.verifier in VERIFIERS, verifiers)
        _require("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        names = f"one of {', '.join(QUANTIZE)}"
        _require("quantize", self.quantize, self.quantize in QUANTIZE, names)
        checked(self.threads)
        _require("scale", self.scale, self.scale in SCALES, f"one of {', '.join(SCALES)}")
        for name in self.peers:
            _require("baselines", name, name in PEERS, f"one of {', '.join(PEERS)}")
        drafter_specs(self.drafters)

    @property
    def scored(self) -> list[int]:
        """The numbers of positions at which scoring is timed."""
        return sorted({*self.widths, *range(1, CURVE + 1)} if self.curves else {*self.widths})


def _require(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise UsageError(f"--{name.replace('_', '-')} must be {allowed}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to decode.

    kind: "hf", "hf-assisted", "hf-dflash", "hf-prompt-lookup", "llama.cpp" or "ours".
    spec: the drafter's ("none": plain decoding).
    draft_len, steps: fixed values, or AUTO; None is tuned.
    draft_temperature: of the drafts (None: the drafter's own). At temperature 0 it has no effect.
    required: the run fails if this baseline cannot be loaded.
    """

    name: str
    kind: str
    spec: str | None = None
    draft_len: int | str | None = None
    steps: int | None = None
    draft_temperature: float | None = None
    required: bool = True

    @property
    def drafts(self) -> bool:
        """Whether this engine decodes with a drafter."""
        return self.kind == "ours" and self.spec != "none"

    @property
    def looks_up(self) -> bool:
        """Whether the draft may come from the text itself, without a network."""
        return self.kind == "ours" and str(self.spec).partition(":")[0] in LOOKING_UP


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table: a baseline under one setting.

    `draft_len` None: nothing is drafted, or transformers chooses.
    """

    stage: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    verifier: str | None
    temperature: float
    batch: int


@dataclass(frozen=True, slots=True)
class Part:
    """A target with its baselines and prompts.

    suite: as `suites.read` takes it; `texts` replace it.
    prefix: documents are cut to this number of tokens.
    remedy: how to get what the part needs, reported if it cannot be loaded.
    """

    name: str
    model: str
    suite: str
    baselines: tuple[Baseline, ...]
    max_tokens: int
    dataset: str | None = None
    ignore_eos: bool = False
    prefix: int = 128
    notes: tuple[str, ...] = ()
    texts: tuple[PromptText, ...] | None = None
    remedy: str | None = None


def drafter_specs(drafters: tuple[str, ...]) -> dict[str, str]:
    """Name -> spec of NAME=SPEC or SPEC, which is then its own name.

    Raises UsageError for a name that is taken.
    """
    specs: dict[str, str] = {}
    for text in drafters:
        match = NAME.fullmatch(text)
        name, spec = match.groups() if match else (text, text)
        if name in specs or name in (HF, ASSISTED, DFLASH, LOOKUP, VANILLA, *PEERS):
            raise UsageError(f"the drafter name {name!r} is taken; give another as NAME={spec}")
        specs[name] = spec
    return specs


def baselines(settings: BenchSettings) -> tuple[Baseline, ...]:
    """Transformers' own, plain decoding, the drafters, and the other engines of `peers`.

    transformers' DFlash runs with the drafter named "block". The default drafter, "auto", always
    runs at the default draft length.
    """
    extra = drafter_specs(settings.drafters)
    specs = {name: name for name in OURS} | extra
    lengths = dict.fromkeys(specs, settings.draft_len) | {AUTO: AUTO}
    ours = [
        Baseline(name, "ours", spec, draft_len=lengths[name], required=name in extra)
        for name, spec in specs.items()
    ]
    everything = (
        Baseline(HF, HF),
        Baseline(ASSISTED, ASSISTED, specs["autoregressive"], required=False),
        Baseline(DFLASH, DFLASH, specs["block"], required=False),
        Baseline(LOOKUP, LOOKUP),
        Baseline(VANILLA, "ours", "none"),
        *ours,
        *_at_draft_temperatures(ours, settings),
        *(Baseline(name, name) for name in settings.peers),
    )
    only = (*settings.only, *settings.peers) if settings.only else ()
    if only:
        only += tuple(b.name for b in _at_draft_temperatures(ours, settings) if _named(b, only))
    return select(everything, only)


def _at_draft_temperatures(ours: Sequence[Baseline], settings: BenchSettings) -> list[Baseline]:
    return [
        replace(b, name=f"{b.name}-t{t:g}", draft_temperature=t, required=False)
        for b in ours
        if not b.looks_up
        for t in settings.draft_temperatures
    ]


def _named(baseline: Baseline, only: tuple[str, ...]) -> bool:
    """Whether the drafter is in `only` by its own name."""
    return baseline.name.rpartition("-t")[0] in only


def select(everything: tuple[Baseline, ...], only: tuple[str, ...]) -> tuple[Baseline, ...]:
    """The baselines of `only`, and the references. Raises UsageError for an unknown name."""
    names = [baseline.name for baseline in everything]
    for name in only:
        if name not in names:
            raise UsageError(
                f"--only {name!r} is no baseline of this suite; known are {', '.join(names)}"
            )
    return tuple(b for b in everything if not only or b.name in (HF, VANILLA, *only))
