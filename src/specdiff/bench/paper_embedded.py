"""The paper suite at the embedded scale: its protocol with the packaged target and drafters.

The texts are packaged: requests to summarize, paragraphs and sentences to continue. A user's own
files replace them, and other files finetune target and drafters first, as the paper does.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from specdiff import files
from specdiff.bench import suites
from specdiff.bench.settings import (
    ASSISTED,
    HF,
    VANILLA,
    Baseline,
    BenchSettings,
    Part,
    drafter_specs,
    select,
)
from specdiff.bench.suites import PromptText
from specdiff.catalog import DEFAULT_MODEL
from specdiff.data.records import Record, prompt_of, read_jsonl
from specdiff.errors import UsageError

SCALE = "embedded"
PACKAGED = Path(__file__).parent / "prompts" / "paper.jsonl"
TOKENS = {"cnn_dailymail": 128, "openwebtext": 256, "lm1b": 100}  # data set -> tokens to generate
PREFIX = {"lm1b": 16}  # tokens of a document to continue; elsewhere 128
FIELDS = ("messages", "prompt", "article", "text")
DOCUMENTS = ("article", "text")  # fields that hold a document to continue
DRAFTERS = ("autoregressive", "sedd")  # those of the paper
FINETUNED = "finetuned"
FOLDER = "finetuned"  # in the folder of the results
DIFFERENCES = (
    "the packaged target has 135 M parameters and runs on this machine; the paper has gpt2-xl and "
    "gpt-neo-2.7B on a GPU: compare the order of the rows, not their size",
    "the bundled drafters have 9 M parameters, a fifteenth of the target; the paper's SEDD has "
    "90 M, a seventeenth of gpt2-xl",
    "K and the number of passes of our rows are the fastest of a tuning run; the paper's 5, and "
    "40, 45 and 30 (assumed to belong to its data sets in this order), suit its own targets",
    "the paper generates 1024 tokens from CNN/DM and OpenWebText; here it is 128 and 256 at most",
)
TEXTS = {
    "cnn_dailymail": "requests to summarize a passage, written for this package",
    "openwebtext": "paragraphs to continue, written for this package",
    "lm1b": "beginnings of sentences in the shape of LM1B, written for this package",
}


@dataclass(frozen=True, slots=True)
class Finetuning:
    """Target and drafters of one data set, in their folders, and the text they learn from."""

    dataset: str
    text: Path
    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / "target"

    @property
    def drafters(self) -> dict[str, str]:
        """Name -> folder."""
        return {name: str(self.folder / name) for name in DRAFTERS}


def named(flag: str, pairs: tuple[str, ...]) -> dict[str, Path]:
    """Data set -> file, of NAME=FILE. Raises UsageError."""
    paths = {}
    for pair in pairs:
        name, separator, file = pair.partition("=")
        if not separator or name not in TOKENS:
            names = ", ".join(TOKENS)
            raise UsageError(f"{flag} takes NAME=FILE with a NAME of {names}, not {pair!r}")
        path = Path(file).expanduser()
        if not path.is_file():
            raise UsageError(f"{flag} {name}: no such file: {path}")
        paths[name] = path
    return paths


def digest(settings: BenchSettings) -> str:
    """Of all files that the settings name; "" without any."""
    pairs = [*settings.texts, *settings.finetune]
    paths = [named("--texts", (pair,)) for pair in pairs]
    digests = [files.digest(path) for one in paths for path in one.values()]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def texts(settings: BenchSettings) -> dict[str, tuple[PromptText, ...]]:
    """The prompts and documents of each data set. Raises UsageError naming file and line."""
    own = named("--texts", settings.texts)
    requests = [text for text in suites.read("embedded") if text.task == "summarise"]
    packaged = [*requests, *_read("", PACKAGED)]
    tasks = {"cnn_dailymail": "summarise"}
    result = {}
    for name in TOKENS:
        if name in own:
            result[name] = tuple(_read(name, own[name]))
        else:
            task = tasks.get(name, name)
            result[name] = tuple(text for text in packaged if text.task == task)
    return result


def _read(dataset: str, path: Path) -> Iterator[PromptText]:
    for i, record in enumerate(read_jsonl(path)):
        field, body = prompt_of(record, FIELDS)
        task = dataset or str(record.value["task"])
        name = str(record.value.get("id", f"{task}-{i}"))
        yield PromptText(name, task, body, document=field in DOCUMENTS)


def finetunings(settings: BenchSettings, folder: Path) -> dict[str, Finetuning]:
    """What is finetuned, by data set.

    Raises UsageError for a text that holds a measured prompt: it would measure memory.
    """
    plans = {}
    measured = texts(settings)
    for name, path in named("--finetune", settings.finetune).items():
        prompts = {_identity(text.body): text.id for text in measured[name]}
        for record in read_jsonl(path):
            overlap = prompts.get(_identity(_body(record)))
            if overlap is not None:
                raise UsageError(
                    f"{record.place} is the measured prompt {overlap}; finetune on other texts"
                )
        plans[name] = Finetuning(name, path, folder / FOLDER / name)
    return plans


def _body(record: Record) -> object:
    return prompt_of(record, FIELDS)[1]


def _identity(body: object) -> str:
    return " ".join(str(body).split())


def parts(settings: BenchSettings, folder: Path) -> list[Part]:
    """Every data set with the target as it is, and once more with what was finetuned on it."""
    model = settings.model or DEFAULT_MODEL
    target = Path(model).name
    sources = named("--texts", settings.texts)
    plans = finetunings(settings, folder)
    result = []
    for name, prompts in texts(settings).items():
        source = f"the texts of {sources[name].name}" if name in sources else TEXTS[name]
        plain = Part(
            name=f"{name}/{target}",
            model=model,
            suite="",
            baselines=_baselines(settings, {}),
            max_tokens=min(TOKENS[name], settings.max_tokens),
            dataset=name,
            ignore_eos=True,
            prefix=PREFIX.get(name, 128),
            notes=(f"{source}; ends of text are ignored; nothing is finetuned",),
            texts=prompts,
        )
        result.append(plain)
        if name in plans:
            result.append(_finetuned(plain, plans[name], settings, source))
    return result


def _finetuned(plain: Part, plan: Finetuning, settings: BenchSettings, source: str) -> Part:
    note = (
        f"{source}; ends of text are ignored; target and drafters are finetuned for "
        f"{settings.finetune_steps} steps each on {plan.text.name}"
    )
    return Part(
        name=f"{plain.name} {FINETUNED}",
        model=str(plan.target),
        suite="",
        baselines=_baselines(settings, plan.drafters),
        max_tokens=plain.max_tokens,
        dataset=plain.dataset,
        ignore_eos=True,
        prefix=plain.prefix,
        notes=(note,),
        texts=plain.texts,
    )


def _baselines(settings: BenchSettings, finetuned: Mapping[str, str]) -> tuple[Baseline, ...]:
    extra = drafter_specs(settings.drafters)
    specs = {**{name: name for name in DRAFTERS}, **extra, **finetuned}
    ours = [
        Baseline(name, "ours", spec, settings.draft_len, required=name in extra)
        for name, spec in specs.items()
    ]
    everything = (
        Baseline(HF, HF),
        Baseline(ASSISTED, ASSISTED, specs["autoregressive"], required=False),
        Baseline(VANILLA, "ours", "none"),
        *ours,
    )
    return select(everything, settings.only)


def notes(settings: Mapping[str, object]) -> tuple[str, ...]:
    """What differs from the paper, for the page."""
    pairs = settings.get("finetune") or ()
    untouched = (
        "nothing was finetuned on the data sets (--finetune NAME=FILE does), as the paper does "
        "with targets and drafters"
    )
    return DIFFERENCES if pairs else (*DIFFERENCES, untouched)
