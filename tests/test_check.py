"""The conformance suite passes what is lawful, and fails what is not, by the check that says why.

Shapes: B rows, K drafted tokens, V vocabulary.
"""

import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from doubles import (
    DropsUnlikely,
    Misreported,
    StaleTarget,
    Through,
    ToyDenoiser,
    early_bonus,
    every_round_alike,
    no_residual,
    one_stream,
    one_uniform,
    swapped,
    three_uniforms,
    verifier_of,
)
from law.samples import causal_drafter
from specdiff import SpeculativeLM, catalog, cli, verify
from specdiff.check import Finding, Subject, check_drafter, check_target, check_verifier
from specdiff.check.contract import Scores
from specdiff.check.doubles import TableDrafter
from specdiff.check.drafters import contract, of_the_target
from specdiff.check.recording import requests, run
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.base import Drafter, NoDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.ngram import NGramDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw, probabilities
from specdiff.targets.causal import CausalTarget
from specdiff.targets.table import TableTarget
from specdiff.types import Batch, Context, Draft, TargetInfo, TargetOutput
from specdiff.verify import VERIFIERS

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
Build = Callable[[TargetInfo], Drafter[Any]]


def failed(findings: Iterable[Finding]) -> dict[str, str]:
    return {f.name: f.message for f in findings if not f.passed}


def toy(info: TargetInfo) -> ToyDenoiser:
    return ToyDenoiser(info.vocab_size, seed=2)


def example(name: str) -> Build:
    return lambda info: catalog.drafter(str(EXAMPLES / name), info)


# ---- what is lawful ----

LAWFUL: dict[str, Build] = {
    "none": lambda info: NoDrafter(),
    "example": example("mine.py:Mine"),
    "table": lambda info: TableDrafter(info.vocab_size),
    "point masses": lambda info: TableDrafter(info.vocab_size, point=True),
    "one-shot": lambda info: DenoisingDrafter(toy(info)),
    "left-to-right": lambda info: DenoisingDrafter(toy(info), steps=2, draft_temperature=0.7),
    "sedd": lambda info: tiny.drafter(info, length=40, **SMALL),
    "sedd left-to-right": lambda info: tiny.drafter(
        info, steps=2, attention="causal-context", time_conditioning=False, **SMALL
    ),
    "autoregressive": lambda info: causal_drafter(info, seed=6),
}
SMALL: dict[str, Any] = {"n_blocks": 1, "hidden_size": 8, "n_heads": 2, "cond_dim": 4}


@pytest.mark.parametrize("name", LAWFUL)
def test_a_lawful_drafter_passes(name: str) -> None:
    findings = list(check_drafter(Subject(LAWFUL[name]), {"block": verify.block}, quick=True))
    assert not failed(findings)
    assert {"drafts", "rejection", "law under block", "greedy", "faults"} <= {
        f.name for f in findings
    }


def test_a_drafter_of_one_target_is_checked_against_that() -> None:
    target = tiny.target("llama")
    build = lambda info: tiny.drafter(info, **tiny.CACHED)  # noqa: E731
    findings = list(check_drafter(Subject(build, target), {"token": verify.token}, quick=True))
    assert not failed(findings)
    assert "contract: law" in {f.name for f in findings} and not [
        f for f in findings if f.name.startswith("law under")
    ]


# ---- drafts over vocabularies too large to enumerate ----

MANY: dict[str, Build] = {
    "none": lambda info: NoDrafter(),
    "ngram": lambda info: NGramDrafter(info),
    "sedd": lambda info: tiny.drafter(info, **tiny.CACHED),
    "sedd left-to-right": lambda info: tiny.drafter(info, steps=2, **tiny.CACHED),
    "sedd windowed": lambda info: tiny.drafter(info, steps=2, n_blocks=1, length=40),
    "sedd any": lambda info: AnyOrderDrafter(tiny.drafter(info, **tiny.CACHED).denoiser, steps=2),
    "sedd of the uniform process": lambda info: AnyOrderDrafter(
        uniform(info), steps=2, sampler="euler"
    ),
    "autoregressive": lambda info: causal_drafter(info, seed=6),
}


def uniform(info: TargetInfo) -> SEDDDenoiser:
    return SEDDDenoiser(
        tiny.sedd(tiny.sedd_config(info.vocab_size, process="uniform", n_blocks=1)), info
    )


@pytest.fixture(scope="module")
def llama() -> CausalTarget:
    return tiny.target("llama")


@pytest.mark.parametrize("name", MANY)
def test_what_a_built_in_drafter_says_of_its_draws_is_true(llama: CausalTarget, name: str) -> None:
    findings = list(contract(MANY[name](llama.info), llama, 500))
    assert not failed(findings)
    assert len(findings) == (
        1 if name in ("none", "ngram") or "any" in name or "uniform" in name else 5
    )


@pytest.mark.parametrize(
    "name", ["one position late", "untempered", "any order", "one uniform", "another seed"]
)
def test_what_is_not_true_shows_over_many_tokens_too(llama: CausalTarget, name: str) -> None:
    build, check, why = PLANTED[name]
    assert why in failed(contract(build(llama.info), llama, 1000)).get(check, "")


@pytest.mark.real
@pytest.mark.parametrize("name", ["sedd", "autoregressive"])
def test_what_a_bundled_drafter_says_of_its_draws_is_true(lm: SpeculativeLM, name: str) -> None:
    findings = list(contract(catalog.drafter(name, lm.target.info), lm.target, 200))
    assert not failed(findings) and len(findings) == 5


@pytest.mark.real
def test_what_is_not_true_shows_in_the_few_texts_affordable_there(
    monkeypatch: pytest.MonkeyPatch, lm: SpeculativeLM
) -> None:
    drafter = catalog.drafter("autoregressive", lm.target.info)
    propose = drafter.propose
    monkeypatch.setattr(
        drafter,
        "propose",
        lambda context, state, noise, k: late(
            None, context, noise, propose(context, state, noise, k)
        ),
    )
    assert "contract: law" in failed(contract(drafter, lm.target, 200))


@pytest.mark.parametrize("name", ["token", "block"])
def test_what_goes_wrong_late_in_a_draft_shows_in_the_texts_too(name: str) -> None:
    """Three uniforms for all positions: exact for drafts of three."""
    target, broken = TableTarget.random(3, seed=4), through(three_uniforms)
    finding = of_the_target("law", target, broken(target.info), VERIFIERS[name], 20_000)
    assert not finding.passed and "draft_len 8" in finding.message
    assert of_the_target(
        "law", target, broken(target.info), VERIFIERS[name], 20_000, longest=3
    ).passed


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_passes(name: str) -> None:
    assert not failed(check_verifier(VERIFIERS[name], quick=True))


@pytest.mark.parametrize("family", ["table", *tiny.FAMILIES])
def test_every_target_passes(family: str) -> None:
    target = TableTarget.random(5) if family == "table" else tiny.target(family)
    assert not failed(check_target(target, quick=True))


# ---- what is not ----


class Bug(Drafter[None]):
    """A lawful draft (of a toy denoiser, one pass a token) with `spoil` done to it."""

    draft_len = 3

    def __init__(
        self, info: TargetInfo, spoil: Callable[["Bug", Context, Noise, Draft], Draft]
    ) -> None:
        self.inner, self.spoil = DenoisingDrafter(toy(info), steps=3), spoil

    def propose(self, context: Context, state: Any, noise: Noise, draft_len: int) -> Draft:
        draft = self.inner.propose(context, None, noise, draft_len)
        # greedy batches draft point masses, which have no probabilities to spoil
        return draft if draft.probs is None else self.spoil(self, context, noise, draft)


def law(draft: Draft) -> torch.Tensor:
    assert draft.probs is not None
    return draft.probs


def late(bug: Bug | None, context: Context, noise: Noise, draft: Draft) -> Draft:
    return replace(draft, probs=torch.cat([law(draft)[:, :1], law(draft)[:, :-1]], 1))


def another_seed(bug: Bug, context: Context, noise: Noise, draft: Draft) -> Draft:
    other = replace(noise, seed=noise.seed + 1)
    return replace(
        draft, tokens=bug.inner.propose(context, None, other, draft.tokens.shape[1]).tokens
    )


def filtered(bug: Bug, context: Context, noise: Noise, draft: Draft) -> Draft:
    """Drawn from the two likeliest, which then are not renormalised."""
    q = law(draft)
    q = torch.where(q >= q.topk(2, dim=-1).values[..., 1:], q, 0)
    tokens = torch.where(
        q.gather(-1, draft.tokens[..., None])[..., 0] > 0, draft.tokens, q.argmax(-1)
    )
    return Draft(tokens, q)


def leaking(bug: Bug, context: Context, noise: Noise, draft: Draft) -> Draft:
    """Each row drafts for the text of the row before it in the batch."""
    batch = context.batch
    ids = batch.ids.scatter(1, batch.length[:, None] - 1, batch.anchor.roll(1)[:, None])
    return bug.inner.propose(
        replace(context, batch=replace(batch, ids=ids)), None, noise, draft.tokens.shape[1]
    )


def unseeded(bug: Bug, context: Context, noise: Noise, draft: Draft) -> Draft:
    other = replace(noise, seed=noise.seed + random.getrandbits(40))
    return bug.inner.propose(context, None, other, draft.tokens.shape[1])


def ones_everywhere(bug: Bug, context: Context, noise: Noise, draft: Draft) -> Draft:
    """A point mass on the first token, said to be on another."""
    return Draft(
        torch.zeros_like(draft.tokens),
        torch.nn.functional.one_hot(torch.ones_like(draft.tokens), law(draft).shape[-1]).double(),
    )


class Lingering(Drafter[dict[str, Any]]):
    """Drafts after the last token of its own last draft, though it may have been rejected (and,
    `admits` not, after the last request's)."""

    draft_len = 3

    def __init__(self, info: TargetInfo, *, admits: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = 1.5 * torch.randn(
            info.vocab_size, info.vocab_size, dtype=torch.float64, generator=generator
        )
        self.admits = admits

    def open(self, rows: int, slots: int) -> dict[str, Any]:
        return {
            "last": torch.zeros(rows, dtype=torch.long),
        }

    def admit(self, state: dict[str, Any], context: Context, rows: torch.Tensor) -> None:
        if self.admits:
            state["last"] = state["last"].index_fill(0, rows, 0)

    def propose(
        self, context: Context, state: dict[str, Any], noise: Noise, draft_len: int
    ) -> Draft:
        q = probabilities(
            self.table[state["last"]][:, None].expand(-1, draft_len, -1), context.batch.params
        )
        tokens = draw(q, noise.uniform(Purpose.DRAFT, draft_len))
        state["last"] = tokens[:, -1]
        return Draft(tokens, q)


def divides(bug: Bug, context: Context, noise: Noise, draft: Draft) -> Draft:
    return replace(draft, size=draft.tokens[:, 0] * (1 // 0))


def bug(spoil: Callable[..., Draft]) -> Build:
    return lambda info: Bug(info, spoil)


def through(change: Callable[[Noise], Noise]) -> Build:
    return lambda info: Through(DenoisingDrafter(toy(info), steps=3), change)


PLANTED: dict[str, tuple[Build, str, str]] = {
    "any order": (
        example("unlawful.py:AnyOrder"),
        "contract: earlier laws",
        "any other order than left to right",
    ),
    "one position late": (bug(late), "contract: law", "one position late"),
    "untempered": (
        lambda info: Misreported(toy(info), draft_temperature=0.7),
        "contract: law",
        "before a temperature",
    ),
    "one uniform": (
        through(one_uniform),
        "contract: ancestors",
        "one uniform used for several positions",
    ),
    "three uniforms": (
        through(three_uniforms),
        "contract: ancestors",
        "one uniform used for several positions",
    ),
    "not renormalised": (bug(filtered), "probabilities", "not summing to 1"),
    "leak between rows": (bug(leaking), "batches", "other rows of its batch"),
    "another seed": (bug(another_seed), "contract: law", "another draw"),
    "stale after rejection": (
        lambda info: Lingering(info, admits=True),
        "rejection",
        "rejected tokens",
    ),
    "stale after release": (
        lambda info: Lingering(info, admits=False),
        "admission",
        "forget what the rows held before",
    ),
    "nan": (bug(lambda b, c, n, d: replace(d, probs=law(d) * torch.nan)), "probabilities", "NaN"),
    "ids beyond": (
        bug(lambda b, c, n, d: replace(d, tokens=d.tokens + 5)),
        "tokens",
        "outside the target's vocabulary",
    ),
    "shape": (
        bug(lambda b, c, n, d: replace(d, probs=law(d)[:, :1])),
        "drafts",
        "probabilities of shape",
    ),
    "size": (
        bug(lambda b, c, n, d: replace(d, size=torch.full((len(d.tokens),), -1))),
        "size",
        "below 0",
    ),
    "impossible": (bug(ones_everywhere), "possible", "have probability 0"),
    "raises": (bug(divides), "drafts", "raised ZeroDivisionError"),
    "python's random": (bug(unseeded), "deterministic", "draw from `noise` only"),
    "draws of the round before": (
        through(every_round_alike),
        "contract: past rounds",
        "fresh draw",
    ),
    "the verifier's uniforms": (through(one_stream), "contract: verifier", "Purpose.DRAFT"),
    "drops what it finds unlikely": (
        lambda i: DropsUnlikely(DenoisingDrafter(toy(i)), floor=0.3),
        "contract: law",
        "do not follow",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_fails_the_right_check(name: str) -> None:
    build, check, why = PLANTED[name]
    findings = failed(check_drafter(Subject(build), {}))
    assert why in findings.get(check, ""), findings


class Multinomial(Drafter[None]):
    """BUG: draws from torch's global generator."""

    draft_len = 3

    def __init__(self, info: TargetInfo) -> None:
        self.vocab = info.vocab_size

    def propose(self, context: Context, state: None, noise: Noise, draft_len: int) -> Draft:
        q = torch.full((len(context.batch.length), draft_len, self.vocab), 1 / self.vocab)
        tokens = torch.multinomial(q.flatten(0, 1), 1).view(-1, draft_len)
        return Draft(tokens, q)


def test_one_cause_is_reported_once() -> None:
    findings = list(check_drafter(Subject(Multinomial), {}, quick=True))
    assert failed(findings).keys() == {"deterministic"}
    assert "torch.multinomial" in failed(findings)["deterministic"]
    assert not {"batches", "admission", "rejection"} & {f.name for f in findings}


@pytest.mark.parametrize("plan", ["token", "block"])
@pytest.mark.parametrize("wrong", [swapped, no_residual, early_bonus])
def test_a_wrong_verifier_fails(wrong: Callable[..., Any], plan: str) -> None:
    findings = failed(
        check_verifier(verifier_of(wrong(verify.PLANS[plan]), longest=plan == "block"), quick=True)
    )
    assert findings.keys() & {"law with probabilities", "law with point masses", "well formed"}


@pytest.mark.parametrize(
    "fault", [{"keeps": True}, {"shift": 1}], ids=["not overwritten", "one slot off"]
)
def test_a_target_with_stale_slots_fails(fault: dict[str, Any]) -> None:
    findings = failed(check_target(StaleTarget(TableTarget.random(5).table, **fault)))
    assert "entries of rejected drafts" in findings["history"]


@pytest.mark.parametrize("sums", [False, True])
def test_a_target_that_takes_over_too_much_fails(sums: bool) -> None:
    lawful, wrong = (StaleTarget(TableTarget.random(5).table, sums=sums, beyond=n) for n in (0, 1))
    assert not failed(check_target(lawful, quick=True))
    assert failed(check_target(wrong, quick=True)).keys() == {"reuse"}


class Rewriting(CausalTarget):
    """BUG: rows that are done are drafted for one slot too early, into what they shall keep."""

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        return super().score(
            cache, replace(batch, length=(batch.length - 2 * batch.done.long()).clamp(min=1)), draft
        )


def test_a_target_that_writes_into_rows_that_are_done_fails() -> None:
    findings = failed(check_target(Rewriting(tiny.model("llama")), quick=True))
    assert findings.keys() == {"reuse"} and "first `prefix_lengths` positions" in findings["reuse"]


class Stretching(TableTarget):
    """BUG: logits shrink while any row of the batch is long."""

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        output = super().score(cache, batch, draft)
        longest = int(batch.length.max()) + draft.tokens.shape[1]
        return replace(output, logits=output.logits * 0.8) if longest > 48 else output


class Overhearing(TableTarget):
    """BUG: one cache serves the latest stream, whosever it is."""

    latest: Any = None

    def admit(self, cache: Any, rows: Any, prompts: Any, prefix_lengths: Any) -> Any:
        self.latest = cache
        return super().admit(cache, rows, prompts, prefix_lengths)

    def score(self, cache: Any, batch: Batch, draft: Draft) -> TargetOutput:
        rows = min(len(cache.slots), len(self.latest.slots))
        width = min(cache.slots.shape[1], self.latest.slots.shape[1])
        cache.slots[:rows, :width] = self.latest.slots[:rows, :width]
        return super().score(cache, batch, draft)


@pytest.mark.parametrize("kind", [Stretching, Overhearing])
def test_a_target_that_depends_on_length_or_on_another_stream_fails(
    kind: type[TableTarget],
) -> None:
    findings = failed(check_target(kind(TableTarget.random(7).table), quick=True))
    assert findings.keys() == {"lengths"} and "how long the neighbors" in findings["lengths"]


def test_a_model_that_was_let_through_at_load_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE that changes its frequencies for all rows of a forward once one of them is long."""
    monkeypatch.setattr("specdiff.models.ragged.refuse", lambda config: None)
    monkeypatch.setattr("specdiff.targets.causal.self_test", lambda model: 0.0)
    sizes = tiny.model("llama").config.to_dict()
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 12.0]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 24,
        **factors,
    }
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**sizes, "rope_parameters": rope}))
    for parameter in net.parameters():
        parameter.data *= 6 if parameter.dim() > 1 else 1
    findings = failed(check_target(CausalTarget(net), quick=True))
    assert "how long the neighbors" in findings["lengths"]


def test_lawful_scores_have_the_promised_tails() -> None:
    """Over 40 lawful runs the largest score is as chance makes it, and never near its threshold."""
    target, ratios = TableTarget.random(5, seed=3), []
    drafter = DenoisingDrafter(ToyDenoiser(5, seed=2), steps=2)
    for seed in range(40):
        scores = Scores(5, generator=torch.Generator().manual_seed(seed))
        queue = [replace(r, seed=r.seed + seed) for r in requests(target, 60)]
        run(target, drafter, queue, scores.look, draft_len=3, rows=60, verifier=verify.token)
        ratios += [
            f.statistic / f.threshold
            for f in scores.findings()
            if f.statistic is not None and f.threshold is not None
        ]
    assert 0.4 < max(ratios) < 0.9


# ---- the command ----


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", "check", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_the_command(here: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = here(f"{EXAMPLES}/mine.py:Mine", "--quick", "--verifier", "token")
    assert code == 0 and "passed  contract: law" in out and "FAILED" not in out
    code, out, _ = here(f"{EXAMPLES}/unlawful.py:AnyOrder", "--json", "--verifier", "match")
    report = json.loads(out)
    assert code == 1 and report["passed"] is False
    (why,) = [f["message"] for f in report["findings"] if f["name"] == "contract: earlier laws"]
    assert "computed after it had been revealed" in why
    assert here("--target", "table", "--quick")[0] == here("--verifier", "block", "--quick")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to check"),
        (("nope",), "unknown drafter 'nope'"),
        (("none", "--verifier", "hope"), "unknown verifier 'hope'"),
        (
            ("--verifier", "token", "--model", "table"),
            "--model is the target a drafter is checked with",
        ),
        (("--verifier", "json:nothing"), "json defines no 'nothing'"),
    ],
)
def test_usage(
    here: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = here(*arguments)
    assert code == 2 and message in err
