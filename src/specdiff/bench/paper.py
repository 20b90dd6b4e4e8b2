"""The paper suite: Christopher et al. 2024, with two targets, three data sets and both drafters.

Only figures that are known are printed next to ours. The weights are the published ones: the paper
finetunes targets and drafters on each data set first, for which `specdiff train` has recipes (name
the results with --model and --drafter sedd=FOLDER). `tiny_models` and `tiny_texts` stand in for
them in a smoke run: the whole path in a minute, without a network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from specdiff import files
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
from specdiff.nn.ddit import SEDD
from specdiff.nn.sedd_config import SEDDConfig

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

# of the tiny models
VOCAB = 64
WIDTH = 32
POSITIONS = 256
DOCUMENTS = 4
LENGTH = 24


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
    tables = PaperTables(
        table2=[row for part in results.parts for row in _table2(part)],
        appendix_a=[row for part in results.parts for row in _appendix(part)],
        notes=[*([SMOKE] if results.settings["smoke"] else []), *NOTES, VERSIONS, APPENDIX],
    )
    return replace(results, paper=tables)


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


def tiny_models(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(targets, drafters), name -> folder; written if missing, the same in every run."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    gpt2: dict[str, Any] = {"n_embd": WIDTH, "n_head": 4, "n_positions": POSITIONS, **sizes}
    neo = GPTNeoConfig(
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=POSITIONS,
        window_size=16,
        attention_types=[[["global", "local"], 1]],
        **sizes,
    )
    diffusion = SEDDConfig(
        tokens=VOCAB, hidden_size=WIDTH, n_blocks=1, n_heads=4, cond_dim=16, length=128
    )
    networks: dict[str, tuple[Any, Any]] = {
        "gpt2-xl": (GPT2LMHeadModel, GPT2Config(n_layer=2, **gpt2)),
        "gpt-neo-2.7B": (GPTNeoForCausalLM, neo),
        "autoregressive": (GPT2LMHeadModel, GPT2Config(n_layer=1, **gpt2)),
        "sedd": (SEDD, diffusion),
    }
    for seed, (name, (network, config)) in enumerate(networks.items()):
        if not (folder / name / "model.safetensors").exists():
            torch.manual_seed(seed)
            with files.staged_folder(folder / name) as partial:
                network(config).save_pretrained(partial)
    targets = {name: str(folder / name) for name in TARGETS}
    return targets, {name: str(folder / name) for name in DRAFTERS}


def tiny_texts() -> dict[str, tuple[PromptText, ...]]:
    """Documents of random tokens for every data set."""
    texts = {}
    for seed, dataset in enumerate(DATASETS):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(VOCAB, (DOCUMENTS, LENGTH), generator=generator).tolist()
        texts[dataset] = tuple(
            PromptText(f"{dataset}-{i}", dataset, row, document=True) for i, row in enumerate(rows)
        )
    return texts
