"""The suite `paper`: Christopher et al. 2024, the two targets, three data sets, and both ways to draft, beside the paper's own figures.

Only figures that are known are printed beside ours. Weights are the published ones: the paper finetunes targets and drafters on each
data set first, for which `specdiff train` has recipes (name the results with --model and --drafter sedd=FOLDER).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from specdiff.bench.plan import ASSISTED, HF, VANILLA, Entry, Part, Settings, chosen, named
from specdiff.bench.suites import Text
from specdiff.data.records import SETS

SUITE = "paper"
TARGETS = {"gpt2-xl": "openai-community/gpt2-xl", "gpt-neo-2.7B": "EleutherAI/gpt-neo-2.7B"}
DRAFTERS = {"autoregressive": "openai-community/gpt2", "sedd": "louaaron/sedd-small"}
SPECULATION = 5  # draft length of standard speculation
DATASETS = {
    "cnn_dailymail": (40, 1024),
    "openwebtext": (45, 1024),
    "lm1b": (30, 100),
}  # SEDD's draft length, tokens to generate
PREFIX = {"lm1b": 16}  # tokens of a document to go on from; elsewhere 128
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
    "the published weights; the paper finetunes targets and drafters on each data set before it measures",
    "SEDD's draft lengths 40, 45 and 30 are taken for CNN/DM, OpenWebText and LM1B, in that order",
    "1024 new tokens behind a prompt do not fit 1024 positions: text is generated to the end of the context; ends of text are ignored",
)

VERSIONS = "the paper's figures are those of its first versions (up to 8.7x); its fourth says up to 7.2x over plain decoding"


def parts(
    settings: Settings,
    targets: Mapping[str, str],
    drafters: Mapping[str, str],
    texts: Mapping[str, tuple[Text, ...]] | None = None,
) -> list[Part]:
    """Every data set with every target. `targets` and `drafters` say where the weights are; `texts` stand for the data sets."""
    return [
        Part(
            name=f"{dataset}/{name}",
            model=model,
            suite=f"dataset:{dataset}",
            entries=_entries(settings, drafters, draft_len),
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
    return f"Where the hub can be reached, this gets all it needs:  pip install 'specdiff[train]';  {weights};  {texts}"


def _entries(settings: Settings, drafters: Mapping[str, str], draft_len: int) -> tuple[Entry, ...]:
    given = named(settings.drafters)
    lengths = {"autoregressive": SPECULATION, "sedd": draft_len}
    steps = settings.steps[0]
    ours = (
        Entry(
            n,
            "ours",
            spec,
            draft_len=settings.draft_len or lengths.get(n),
            steps=steps if n == "sedd" else None,
        )
        for n, spec in {**drafters, **given}.items()
    )
    assistant = {**drafters, **given}["autoregressive"]
    theirs = (Entry(HF, HF), Entry(ASSISTED, ASSISTED, assistant, required=False))
    return chosen((*theirs, Entry(VANILLA, "ours", "none"), *ours), settings.only)


def compare(measured: Sequence[Mapping[str, Any]], *, smoke: bool) -> dict[str, Any]:
    """Table 2 and Appendix A, ours beside the paper's.

    table2: {target, dataset, baseline, draft_len, paper, vs_hf, vs_vanilla, tau, accepted_per_draft, why}; paper is the reported speed-up
    over plain decoding, null where none is known. appendix_a: {target, dataset, baseline, draft_len, steps, alpha, accepted_per_draft,
    vs_hf, vs_vanilla, paper}, every setting of the sweeps; its `paper` is always null, for its figures are not known here.
    """
    first = [row for part in measured for row in _table2(part)]
    second = [row for part in measured for row in _appendix(part)]
    notes = [
        *NOTES,
        VERSIONS,
        "Appendix A of the paper: its figures are not part of this package, so only ours are shown",
    ]
    tiny = (
        ["smoke: tiny random models on random tokens; the path is real, the figures mean nothing"]
        if smoke
        else []
    )
    return {"table2": first, "appendix_a": second, "notes": [*tiny, *notes]}


def _table2(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    dataset, _, target = part["name"].partition("/")
    reported = REPORTED.get(dataset, {}).get(target, {})
    rows = []
    for baseline in dict.fromkeys(
        [
            *DRAFTERS,
            *(b["name"] for b in part["baselines"] if b["kind"] == "ours" and b["spec"] != "none"),
        ]
    ):
        known = (
            c
            for c in part["cells"]
            if c["stage"] == "main" and c["baseline"] == baseline and c["draft_len"] != "auto"
        )
        cell = next(known, None)
        told = {
            "target": target,
            "dataset": dataset,
            "baseline": baseline,
            "paper": reported.get(baseline),
        }
        rows.append(told | _figures(cell) | {"why": cell["why"] if cell else _why(part, baseline)})
    return rows


def _why(part: Mapping[str, Any], baseline: str) -> str:
    return str(
        part["missing"]
        or next(
            (b["why"] for b in part["baselines"] if b["name"] == baseline and b["why"]),
            "not measured yet",
        )
    )


def _appendix(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    dataset, _, target = part["name"].partition("/")
    swept = [
        c for c in part["cells"] if c["stage"] == "sweep" and c["baseline"] not in (HF, VANILLA)
    ]
    where = {"target": target, "dataset": dataset, "paper": None}
    return [
        {
            **where,
            "baseline": c["baseline"],
            "steps": c["steps"],
            "alpha": c["alpha"],
            **_figures(c),
        }
        for c in swept
    ]


def _figures(cell: Mapping[str, Any] | None) -> dict[str, Any]:
    if cell is None:
        return dict.fromkeys(("draft_len", "vs_hf", "vs_vanilla", "tau", "accepted_per_draft"))
    ratios = {
        name: cell[full]["ratio"] if cell[full] else None
        for name, full in (("vs_hf", "speedup_vs_hf"), ("vs_vanilla", "speedup_vs_vanilla"))
    }
    return {name: cell[name] for name in ("draft_len", "tau", "accepted_per_draft")} | ratios
