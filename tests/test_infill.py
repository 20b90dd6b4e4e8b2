"""Infilling: prefix and suffix stay, seeds reproduce samples, and perplexity is as defined."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from specdiff import SpeculativeLM, cli
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.denoising import DenoisingDrafter
from specdiff.drafters.sedd import SEDDDenoiser
from specdiff.errors import UsageError
from specdiff.targets.causal import CausalTarget
from specdiff.targets.table import TableTarget
from specdiff.text import sample

UNIFORM = {"process": "uniform", "scale_by_sigma": False, "schedule": "geometric"}
KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "denoiser": {"output": "denoiser"},
    "uniform": UNIFORM,
    "causal": tiny.CACHED,
}


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    return tiny.target("llama")


def lm_of(target: CausalTarget, kind: str) -> SpeculativeLM:
    denoiser = SEDDDenoiser(tiny.sedd(tiny.sedd_config(tiny.VOCAB, **KINDS[kind])), target.info)
    drafter = AnyOrderDrafter(denoiser) if kind == "uniform" else DenoisingDrafter(denoiser)
    return SpeculativeLM(target, drafter, None, 96)


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_their_length_and_their_seed(
    target: CausalTarget, kind: str, sampler: str
) -> None:
    lm = lm_of(target, kind)
    ask: Callable[..., Any] = partial(sample.infill, lm, length=9, steps=4, sampler=sampler)
    for options in (
        {},
        {"prefix": [3, 1, 4]},
        {} if kind == "causal" else {"prefix": [3, 1, 4], "suffix": [1, 5]},
    ):
        samples = ask(count=3, seed=1, **options)
        assert [len(s.token_ids) for s in samples] == [9, 9, 9] and all(
            0 <= t < tiny.VOCAB for s in samples for t in s.token_ids
        )
        assert len({tuple(s.token_ids) for s in samples}) == 3
        assert [s.token_ids for s in ask(count=1, seed=1, **options)] == [samples[0].token_ids]
        assert all(s.perplexity is not None and s.perplexity > 1 for s in samples)


def test_prefix_and_suffix_weigh_on_what_lies_between(target: CausalTarget) -> None:
    lm = lm_of(target, "own")
    texts = {
        name: [
            s.token_ids for s in sample.infill(lm, length=4, steps=2, count=4, seed=0, **options)
        ]
        for name, options in {
            "one": {"prefix": [1], "suffix": [2]},
            "two": {"prefix": [9], "suffix": [2]},
            "three": {"prefix": [1], "suffix": [9]},
        }.items()
    }
    assert texts["one"] != texts["two"] and texts["one"] != texts["three"]


def test_perplexity_is_the_targets_own_in_chunks_or_whole(
    target: CausalTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny.VOCAB, (30,), generator=generator)
    with torch.no_grad():
        logp = (
            tiny.model("llama")(ids[None])
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(-1, ids[1:, None])[:, 0]
        )
    for size, expected in [(0, logp), (1, logp), (7, logp[6:])]:
        for chunk in (128, 4):
            monkeypatch.setattr(sample, "CHUNK", chunk)
            got = sample.perplexity(target, ids[:size].tolist(), ids[size:].tolist())
            assert got == pytest.approx(math.exp(-expected.mean().item()), rel=1e-4)
    assert sample.perplexity(target, [], [3]) is None
    with pytest.raises(UsageError, match="300 tokens are more than the 256 positions"):
        sample.perplexity(target, [], [1] * 300)


def test_perplexity_of_a_known_law() -> None:
    table = TableTarget.random(4, seed=1)
    law = table.law([2], 3)
    assert sample.perplexity(table, [2], [1, 0, 3]) == pytest.approx(
        law[1, 0, 3] ** (-1 / 3), rel=1e-9
    )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("causal", {"suffix": [1]}, "context is causal, so it cannot see a suffix"),
        ("own", {"length": 0}, "length must be at least 1, not 0"),
        ("own", {"steps": 0}, "steps must be at least 1, not 0"),
        ("own", {"count": 0}, "count must be at least 1, not 0"),
        ("own", {"sampler": "magic"}, "unknown sampler 'magic'; known are analytic, euler"),
        (
            "own",
            {"prefix": [1] * 40, "length": 57},
            "are 97, but this drafter's canvas has 96 positions",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    target: CausalTarget, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sample.infill(lm_of(target, kind), **options)


def test_a_whole_canvas_can_be_filled(target: CausalTarget) -> None:
    assert len(sample.infill(lm_of(target, "own"), length=96, steps=2, seed=0)[0].token_ids) == 96


def test_only_a_sedd_network_writes_alone(target: CausalTarget) -> None:
    with pytest.raises(UsageError, match="only a SEDD drafter can infill, and 'ngram' is not one"):
        sample.infill(SpeculativeLM(target, "ngram", None, 64))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path / "drafter")
    common = [
        "--model",
        str(tmp_path / "model"),
        "--drafter",
        str(tmp_path / "drafter"),
        "--length",
        "5",
        "--steps",
        "2",
        "--seed",
        "3",
    ]

    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["specdiff", "sample", *common, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    code, out, err = run("--count", "2", "--device", "cpu")
    assert code == 0 and len(out.split()) == 10 and "perplexity under" in err
    code, out, _ = run("--json", "--device", "cpu")
    report = json.loads(out)
    assert code == 0 and len(report["samples"][0]["token_ids"]) == 5 and report["perplexity"] > 1
    code, out, err = run("--sampler", "magic", "--device", "cpu")
    assert code == 2 and out == "" and "unknown sampler 'magic'" in err
