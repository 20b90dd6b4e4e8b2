"""What is to be measured, as data: the settings of a benchmark, its parts, the baselines, and the cells of its table."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from specdiff.bench.suites import Text
from specdiff.errors import UsageError
from specdiff.text.load import DTYPES
from specdiff.verify import VERIFIERS

HF, ASSISTED, LOOKUP, VANILLA = "hf", "hf-assisted", "hf-prompt-lookup", "ours-vanilla"
OURS = {
    "autoregressive": "autoregressive",
    "sedd": "sedd",
    "ngram": "ngram",
}  # name -> drafter spec, measured unless replaced
NAME = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what is measured. Two runs may be joined (--resume) where all of it is equal.

    `contexts` and `widths` are those of the cost curves; `sweeps` adds the sweeps of draft length and steps; `sample` prompts are enough
    for those and for acceptance counts, `tuning_tokens` for tuning, which is done at every temperature (`tune_each`) or at the first.
    `only`: these baselines, and the two that speed-ups are quoted against; () is all.
    Raises UsageError.
    """

    suite: str
    model: str
    drafters: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_tokens: int = 64
    prompts: int | None = None
    times: int = 1
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    gammas: tuple[int, ...] = (2, 4, 8, 16)
    steps: tuple[int, ...] = (1, 2, 4)
    verifier: str = "token"
    draft_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    sweeps: bool = True
    sample: int = 5
    tuning_tokens: int = 32
    tune_each: bool = True
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    smoke: bool = False
    suite_sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "gammas", "steps", "contexts", "widths"):
            for value in getattr(self, name):
                _demand(name, value, value >= 1, "whole numbers of at least 1")
        for name in ("max_tokens", "times", "prompts", "draft_len"):
            value = getattr(self, name)
            _demand(name, value, value is None or value >= 1, "at least 1")
        for name in ("temperatures", "batch", "gammas", "steps"):
            _demand(name, getattr(self, name), len(getattr(self, name)) > 0, "one value at least")
        for heat in self.temperatures:
            _demand("temperatures", heat, 0 <= heat < float("inf"), "finite numbers >= 0")
        _demand(
            "verifier", self.verifier, self.verifier in VERIFIERS, f"one of {', '.join(VERIFIERS)}"
        )
        _demand("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        named(self.drafters)


def _demand(name: str, value: object, met: bool, allowed: str) -> None:
    if not met:
        raise UsageError(f"--{name.replace('_', '-')} must be {allowed}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One baseline of a part. kind: "hf", "hf-assisted", "hf-prompt-lookup" or "ours"; spec: a drafter's ("none": plain decoding).

    `draft_len` and `steps` are fixed where given, else tuned. `required`: the run has failed if it cannot be had.
    """

    name: str
    kind: str
    spec: str | None = None
    draft_len: int | None = None
    steps: int | None = None
    required: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table: a baseline under one setting. `draft_len` None: nothing is drafted, or transformers chooses."""

    stage: str
    baseline: str
    draft_len: int | str | None
    steps: int | None
    verifier: str | None
    temperature: float
    batch: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Part:
    """A target with its baselines and texts. `suite` is what `suites.read` knows it by; `texts`, where given, stand for it; `prefix` cuts
    documents to their first tokens. `remedy`: how to get what it needs, told where it cannot be loaded.
    """

    name: str
    model: str
    suite: str
    entries: tuple[Entry, ...]
    max_tokens: int
    dataset: str | None = None
    ignore_eos: bool = False
    prefix: int = 128
    notes: tuple[str, ...] = ()
    texts: tuple[Text, ...] | None = None
    remedy: str | None = None


def named(drafters: tuple[str, ...]) -> dict[str, str]:
    """NAME=SPEC or SPEC (which is then its own name), by name. Raises UsageError for a name given twice, or one that is taken."""
    found: dict[str, str] = {}
    for text in drafters:
        match = NAME.fullmatch(text)
        name, spec = match.groups() if match else (text, text)
        if name in found or name in (HF, ASSISTED, LOOKUP, VANILLA):
            raise UsageError(f"the drafter name {name!r} is taken; give another as NAME={spec}")
        found[name] = spec
    return found


def entries(settings: Settings) -> tuple[Entry, ...]:
    """The baselines of a part: transformers' three, plain decoding, the built-in drafters, and those that were named."""
    given = named(settings.drafters)
    fixed = settings.draft_len
    theirs = (
        Entry(HF, HF),
        Entry(ASSISTED, ASSISTED, (OURS | given)["autoregressive"], required=False),
        Entry(LOOKUP, LOOKUP),
    )
    ours = (
        Entry(n, "ours", s, draft_len=fixed, required=n in given) for n, s in (OURS | given).items()
    )
    return chosen((*theirs, Entry(VANILLA, "ours", "none"), *ours), settings.only)


def chosen(listed: tuple[Entry, ...], only: tuple[str, ...]) -> tuple[Entry, ...]:
    """The entries of `only`, and the references. Raises UsageError for a name that is none of them."""
    known = [entry.name for entry in listed]
    for name in only:
        if name not in known:
            raise UsageError(
                f"--only {name!r} is no baseline of this suite; known are {', '.join(known)}"
            )
    return tuple(entry for entry in listed if not only or entry.name in (HF, VANILLA, *only))
