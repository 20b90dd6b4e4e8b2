"""The paper suite: Christopher et al. 2024, with two targets, three data sets and both drafters.

Only figures that are known are printed next to ours. The weights are the published ones: the paper
finetunes targets and drafters on each data set first, for which `specdiff train` has recipes (name
the results with --model and --drafter sedd=FOLDER). `paper_smoke` has tiny stand-ins for them, and
`paper_embedded` the same protocol at the scale of a CPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from specdiff.bench import paper_embedded
from specdiff.bench.metrics import CellResult
from specdiff.bench.results import (
    AppendixRow,
    BenchResults,
    PaperTables,
    PartResult,
    Table2Row,
)
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
from specdiff.data.records import SETS

SUITE = "paper"
TARGETS = {"gpt2-xl": "openai-community/gpt2-xl", "gpt-neo-2.7B": "EleutherAI/gpt-neo-2.7B"}
DRAFTERS = {"autoregressive": "openai-community/gpt2", "sedd": "louaaron/sedd-small"}
SPECULATION = 5  # draft length of standard speculation
DATASETS = {  # SEDD's draft length, tokens to generate
    "cnn_dailymail": (40, 1024),
    "openwebtext": (45, 1024),
    "lm1b": (30, 100),
}
PREFIX = {"lm1b": 16}  # tokens of a document to continue; elsewhere 128
REPORTED = {  # Table 2: speed-up over plain decoding, data set -> target -> method
    "cnn_dailymail": {
        "gpt2-xl": {"autoregressive": 2.95, "sedd": 7.59},
        "gpt-neo-2.7B": {"autoregressive": 4.50, "sedd": 8.73},
    },
    "openwebtext": {
        "gpt2-xl": {"autoregressive": 3.16, "sedd": 4.79},
        "gpt-neo-2.7B": {"autoregressive": 3.38, "sedd": 5.50},
    },
    "lm1b": {
        "gpt2-xl": {"autoregressive": 1.70, "sedd": 2.35},
        "gpt-neo-2.7B": {"autoregressive": 2.47, "sedd": 3.25},
    },
}
NOTES = (
    "the published weights; the paper finetunes targets and drafters on each data set before it "
    "measures",
    "SEDD's draft lengths 40, 45 and 30 are assumed to belong to CNN/DM, OpenWebText and LM1B, in "
    "that order",
    "1024 new tokens after a prompt do not fit 1024 positions: text is generated to the end of the "
    "context; ends of text are ignored",
)
VERSIONS = (
    "the paper's figures are those of its first versions (up to 8.7x); its fourth says up to 7.2x "
    "over plain decoding"
)
APPENDIX = (
    "Appendix A of the paper: its figures are not part of this package, so only ours are shown"
)
SMOKE = "smoke: tiny random models on random tokens; the path is real, the figures mean nothing"


def parts(
    settings: BenchSettings,
    targets: Mapping[str, str],
    drafters: Mapping[str, str],
    texts: Mapping[str, tuple[PromptText, ...]] | None = None,
) -> list[Part]:
    """Every data set with every target.

    `targets` and `drafters` map names to weights; `texts` replace the data sets.
    """
    return [
        Part(
            name=f"{dataset}/{name}",
            model=model,
            suite=f"dataset:{dataset}",
            baselines=_baselines(settings, drafters, draft_len),
            max_tokens=min(tokens, settings.max_tokens),
            dataset=dataset,
            ignore_eos=True,
            prefix=PREFIX.get(dataset, 128),
            notes=NOTES,
            texts=None if texts is None else texts[dataset],
            remedy=_remedy(model, drafters, dataset),
        )
        for dataset, (draft_len, tokens) in DATASETS.items()
        for name, model in targets.items()
    ]


def _remedy(model: str, drafters: Mapping[str, str], dataset: str) -> str:
    weights = ";  ".join(f"hf download {name}" for name in (model, *drafters.values()))
    texts = f"hf download --repo-type dataset {SETS[dataset][0]}"
    return (
        "With access to the hub, this gets all it needs:  pip install 'specdiff[train]';  "
        f"{weights};  {texts}"
    )


def _baselines(
    settings: BenchSettings, drafters: Mapping[str, str], draft_len: int
) -> tuple[Baseline, ...]:
    specs = {**drafters, **drafter_specs(settings.drafters)}
    lengths = {"autoregressive": SPECULATION, "sedd": draft_len}
    ours = [
        Baseline(
            name,
            "ours",
            spec,
            draft_len=settings.draft_len or lengths.get(name),
            steps=settings.steps[0] if name == "sedd" else None,
        )
        for name, spec in specs.items()
    ]
    everything = (
        Baseline(HF, HF),
        Baseline(ASSISTED, ASSISTED, specs["autoregressive"], required=False),
        Baseline(VANILLA, "ours", "none"),
        *ours,
    )
    return select(everything, settings.only)


def with_tables(results: BenchResults) -> BenchResults:
    """The results with Table 2 and Appendix A, if the suite is the paper's."""
    if results.suite != SUITE:
        return results
    table2 = [row for part in results.parts for row in _table2(part)]
    notes: tuple[str, ...] = NOTES
    if results.settings.get("scale") == paper_embedded.SCALE:
        table2 = sorted([*_reported(), *table2], key=_place)
        notes = paper_embedded.notes(results.settings)
    tables = PaperTables(
        table2=table2,
        appendix_a=[row for part in results.parts for row in _appendix(part)],
        notes=[*([SMOKE] if results.settings["smoke"] else []), *notes, VERSIONS, APPENDIX],
    )
    return replace(results, paper=tables)


def _reported() -> Iterator[Table2Row]:
    """The paper's own rows, with its targets and draft lengths."""
    for dataset, targets in REPORTED.items():
        lengths = {"autoregressive": SPECULATION, "sedd": DATASETS[dataset][0]}
        for target, speeds in targets.items():
            for baseline, speed in speeds.items():
                about: dict[str, Any] = _figures(None) | {"draft_len": lengths[baseline]}
                yield Table2Row(target, dataset, baseline, paper=speed, why=None, **about)


def _place(row: Table2Row) -> tuple[int, int, str]:
    """By data set, then the paper's drafters before others; targets stay in order."""
    names = [*DRAFTERS, row.baseline]
    return list(DATASETS).index(row.dataset), names.index(row.baseline), row.baseline


def _table2(part: PartResult) -> Iterator[Table2Row]:
    dataset, _, target = part.name.partition("/")
    reported = REPORTED.get(dataset, {}).get(target, {})
    measured = [b.name for b in part.baselines if b.kind == "ours" and b.spec != "none"]
    cells = {c.baseline: c for c in part.stage("main") if c.draft_len != "auto"}
    for baseline in dict.fromkeys([*DRAFTERS, *measured]):
        cell = cells.get(baseline)
        yield Table2Row(
            target=target,
            dataset=dataset,
            baseline=baseline,
            paper=reported.get(baseline),
            **_figures(cell),
            why=cell.why if cell else _why(part, baseline),
        )


def _why(part: PartResult, baseline: str) -> str:
    reasons = [b.why for b in part.baselines if b.name == baseline and b.why]
    return next(filter(None, [part.missing, *reasons]), "not measured yet")


def _appendix(part: PartResult) -> Iterator[AppendixRow]:
    dataset, _, target = part.name.partition("/")
    for cell in part.stage("sweep"):
        if cell.baseline not in (HF, VANILLA):
            yield AppendixRow(
                target=target,
                dataset=dataset,
                baseline=cell.baseline,
                steps=cell.steps,
                alpha=cell.alpha,
                **_figures(cell),
            )


def _figures(cell: CellResult | None) -> dict[str, Any]:
    """The columns that both tables share."""
    if cell is None:
        return dict.fromkeys(("draft_len", "vs_hf", "vs_vanilla", "tau", "accepted_per_draft"))
    return {
        "draft_len": cell.draft_len,
        "vs_hf": cell.speedup_vs_hf.ratio if cell.speedup_vs_hf else None,
        "vs_vanilla": cell.speedup_vs_vanilla.ratio if cell.speedup_vs_vanilla else None,
        "tau": cell.tau,
        "accepted_per_draft": cell.accepted_per_draft,
    }
