"""The baseline llama.cpp: refusals everywhere, and real runs where xllamacpp is installed."""

from importlib import util
from pathlib import Path

import pytest
import torch

from specdiff import catalog
from specdiff.bench import llama_cpp
from specdiff.bench.equality import divergences
from specdiff.bench.settings import LLAMA_CPP, VANILLA, BenchSettings, Cell, baselines
from specdiff.bench.timing import Measurement, Workload
from specdiff.errors import MissingExtraError, UnsupportedModelError, UsageError
from specdiff.models import gguf

MODEL = catalog.DEFAULT_MODEL
CELL = Cell("main", LLAMA_CPP, None, None, None, 0.0, 1)
QUESTION = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)


def work(
    limit: int, *prompts: tuple[int, ...], temperature: float = 0.0, seed: int = 0
) -> Workload:
    rows = prompts or (QUESTION,)
    return Workload(rows, (limit,) * len(rows), temperature, (2,), (seed,) * len(rows))


def test_it_is_measured_on_request_only() -> None:
    names = [b.name for b in baselines(BenchSettings("embedded", MODEL))]
    assert LLAMA_CPP not in names
    for only in ((), ("ngram",)):
        settings = BenchSettings("embedded", MODEL, peers=(LLAMA_CPP,), only=only)
        assert [b.name for b in baselines(settings)][-1] == LLAMA_CPP
    with pytest.raises(UsageError, match=r"--baselines must be one of llama.cpp, not 'vllm'"):
        BenchSettings("embedded", MODEL, peers=("vllm",))


def test_a_target_without_a_gguf_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs a target that is a GGUF file, not './model'"):
        llama_cpp.check("./model")


def test_without_the_extra_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'specdiff\[peers\]'"):
        llama_cpp.check(str(tmp_path / "model.gguf"))


def test_its_tokens_are_not_compared_with_the_targets() -> None:
    own = Cell("main", VANILLA, None, None, "token", 0.0, 1)
    answers = {cell: Measurement([[i]], 1.0, 1.0, 1) for i, cell in enumerate((own, CELL))}
    assert not list(divergences(None, torch.float32, work(1), ["question"], answers))


@pytest.fixture(scope="module")
def decoder() -> llama_cpp.LlamaCppDecoder:
    pytest.importorskip("xllamacpp", reason="needs the extra: pip install 'specdiff[peers]'")
    try:
        gguf.packaged(*catalog.PACKAGED_MODELS[MODEL])
    except MissingExtraError as error:
        pytest.skip(str(error))
    return llama_cpp.LlamaCppDecoder(MODEL, 512)


def test_a_greedy_run_is_timed_and_repeatable(decoder: llama_cpp.LlamaCppDecoder) -> None:
    run = decoder.run(CELL, work(24))
    assert 0 < run.first_seconds < run.seconds and run.first_tokens == 1
    assert 1 < run.size <= 24
    assert run.tokens == decoder.run(CELL, work(24)).tokens


def test_samples_depend_on_the_seed_and_end_at_the_limit(
    decoder: llama_cpp.LlamaCppDecoder,
) -> None:
    runs = [decoder.run(CELL, work(12, temperature=1.0, seed=s)).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert all(len(row) <= 12 for (row,) in runs)


def test_it_refuses_batches_and_files_it_cannot_read(
    decoder: llama_cpp.LlamaCppDecoder, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="batch 1 only"):
        decoder.run(CELL, work(4, QUESTION, QUESTION))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"llama.cpp cannot load"):
        llama_cpp.LlamaCppDecoder(str(damaged), 64)
