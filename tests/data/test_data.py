"""`specdiff data` on a tiny target: sources, temperatures, resumption after SIGKILL, errors."""

import importlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from specdiff import SpeculativeLM, cli, engine
from specdiff.cli import data_progress
from specdiff.data import forecast as forecasts
from specdiff.data import generate, sources
from specdiff.data import write as corpora
from specdiff.data.corpus import Corpus, CorpusWriter, Row
from specdiff.data.generate import CorpusSettings
from specdiff.data.ledger import Ledger
from specdiff.data.records import Record
from specdiff.data.sources import OPENING_TOKENS, RecordSource, SelfSource
from specdiff.drafters.base import NoDrafter
from specdiff.engine import Request
from specdiff.errors import CorpusError, MissingExtraError, UsageError
from specdiff.noise import row_seed
from specdiff.targets.causal import CausalTarget
from specdiff.targets.table import TableTarget
from specdiff.types import SamplingParams
from specdiff.verify import VERIFIERS

END = 0
VOCAB = 264
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>"]
SETTINGS = CorpusSettings(seed=5, max_tokens=12)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["rain"],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", chat_template=template
    )


def network() -> Any:
    """Flat enough to say anything, and ends a turn after a dozen tokens or so."""
    model = tiny.model("gpt2", vocab=VOCAB)
    end = model.get_input_embeddings().weight[END].detach()
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.weight").mul_(0.15)
        model.get_parameter("transformer.ln_f.bias").copy_(3.5 * end / end.square().sum())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target as its users have it."""
    path = tmp_path_factory.mktemp("model")
    network().save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> SpeculativeLM:
    return SpeculativeLM(
        CausalTarget(network(), name=str(folder)), "none", byte_tokenizer(TEMPLATE), max_len=256
    )


@pytest.fixture(scope="module")
def plain(folder: Path) -> SpeculativeLM:
    return SpeculativeLM(
        CausalTarget(network(), name=str(folder)), "none", byte_tokenizer(None), max_len=256
    )


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdiff", "data", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def write(
    lm: SpeculativeLM,
    source: Any,
    out: Path,
    tokens: int = 400,
    rows: int = 8,
    settings: CorpusSettings = SETTINGS,
) -> dict[str, Any]:
    with CorpusWriter(
        out, generate.about(lm, source, settings), vocab_size=VOCAB, shard_tokens=120
    ) as writer:
        ledger = Ledger(writer, Corpus(out).columns())
        for _ in generate.generate(lm, source, ledger, settings, tokens=tokens, rows=rows):
            pass
        return asdict(ledger.close())


def texts(out: Path) -> dict[int, Row]:
    corpus = Corpus(out)
    rows = [corpus[i] for i in range(len(corpus))]
    assert len({r.key for r in rows}) == len(rows), "a key came twice"
    assert len({tuple(r.tokens.tolist()) for r in rows}) == len(rows), "a text came twice"
    return {r.key: r for r in rows}


def same(one: dict[int, Row], other: dict[int, Row]) -> int:
    """How many keys both have; all of them hold the same text."""
    shared = one.keys() & other.keys()
    for key in shared:
        assert torch.equal(one[key].tokens, other[key].tokens), key
        assert (one[key].prompt_length, one[key].temperature) == (
            other[key].prompt_length,
            other[key].temperature,
        )
    return len(shared)


def test_the_target_asks_itself(lm: SpeculativeLM, tmp_path: Path) -> None:
    tokenizer = lm.tokenizer
    prefix, suffix = sources.user_turn(lm)
    assert (
        tokenizer.decode(prefix) == "<|im_start|>user\n"
        and tokenizer.decode(suffix) == "<|im_end|>\n<|im_start|>assistant\n"
    )
    summary = write(lm, SelfSource(lm, 48), tmp_path / "c")
    assert summary["tokens"] >= 400 and set(summary["dropped"]) <= {
        "question-unended",
        "question-empty",
        "duplicate",
    }
    for row in texts(tmp_path / "c").values():
        question, answer = (
            row.tokens[len(prefix) : row.prompt_length - len(suffix)].tolist(),
            row.tokens[row.prompt_length :].tolist(),
        )
        assert row.tokens[: len(prefix)].tolist() == list(prefix)
        assert row.tokens[row.prompt_length - len(suffix) : row.prompt_length].tolist() == list(
            suffix
        )
        assert 1 <= len(question) < 48 and END not in question
        assert len(answer) == SETTINGS.max_tokens or answer[-1] == END
        assert END not in answer[:-1]


def test_each_row_is_a_function_of_its_key(lm: SpeculativeLM, tmp_path: Path) -> None:
    """With any batch size, shard size, number of runs and drafter; so is the set of rows."""
    whole = write(lm, SelfSource(lm, 48), tmp_path / "a", tokens=500)
    for goal in (150, 500):
        write(lm, SelfSource(lm, 48), tmp_path / "b", tokens=goal, rows=3)
    drafted = SpeculativeLM(
        lm.target, tiny.drafter(lm.target.info, **tiny.CACHED), lm.tokenizer, 256
    )
    write(drafted, SelfSource(lm, 48), tmp_path / "c", tokens=150)
    a, b, c = (texts(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() and same(a, b) == len(a) == whole["rows"]
    assert list(a)[: len(c)] == list(c) == sorted(c) and same(a, c) == len(c) >= 5
    dropped = [Corpus(tmp_path / name).manifest["notes"]["dropped"] for name in "ab"]
    assert dropped[0] == dropped[1]
    write(lm, SelfSource(lm, 48), tmp_path / "d", settings=CorpusSettings(seed=6, max_tokens=12))
    d = texts(tmp_path / "d")
    assert any(not torch.equal(a[k].tokens, d[k].tokens) for k in a.keys() & d.keys())


def test_a_corpus_is_the_shortest_run_of_keys_that_reaches_the_goal(
    lm: SpeculativeLM, tmp_path: Path
) -> None:
    """Rows that end in one round with it, but later in order, are not part of it."""
    lengths = [
        3 + 5 * i for i in range(18)
    ]  # so that later rows are longer than the mean of those before them
    records = [Record("", {"prompt": [3] * (length - 1)}) for length in lengths]
    source = RecordSource(lm, lambda: records, {}, longest=100)
    fixed = CorpusSettings(
        max_tokens=1, temperatures=(1.0,), shares=(1.0,)
    )  # all that were begun end at once
    for goal, rows in ((10, 2), (100, 7), (200, 9)):
        assert write(lm, source, tmp_path / "c", tokens=goal, rows=64, settings=fixed)[
            "tokens"
        ] == sum(lengths[:rows])
        assert list(texts(tmp_path / "c")) == list(range(rows))


def test_temperatures_come_in_their_shares_and_keep_their_law(
    lm: SpeculativeLM, tmp_path: Path
) -> None:
    drawn = [SETTINGS.temperature(key) for key in range(4000)]
    for temperature, share in zip(SETTINGS.temperatures, SETTINGS.shares, strict=True):
        assert drawn.count(temperature) / 4000 == pytest.approx(share, abs=0.03)
    summary = write(lm, SelfSource(lm, 48), tmp_path / "c", tokens=700)
    rows = texts(tmp_path / "c")
    assert all(
        row.temperature == pytest.approx(SETTINGS.temperature(key)) for key, row in rows.items()
    )
    assert sum(law["rows"] for law in summary["by_temperature"].values()) == len(rows)
    greedy = [r for r in rows.values() if r.temperature == 0]
    assert greedy
    for row in greedy[:5]:
        expected = lm.generate(
            row.tokens[: row.prompt_length].tolist(), max_tokens=12, temperature=0
        )
        assert expected.token_ids == row.tokens[row.prompt_length :].tolist()


@pytest.mark.parametrize(
    ("temperatures", "shares", "message"),
    [
        (
            (1.0, 0.0),
            (0.5, 0.4),
            r"shares must be at least 0 and sum to 1, not 0.5, 0.4 \(sum 0.9\)",
        ),
        ((1.0, 0.0), (1.5, -0.5), "shares must be at least 0"),
        ((1.0, 0.0), (float("nan"), 1.0), "shares must be"),
        ((1.0,), (0.5, 0.5), "1 temperatures need as many shares, not 2"),
        ((-1.0,), (1.0,), "temperature must be a finite number >= 0"),
    ],
)
def test_bad_mixtures(temperatures: Any, shares: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CorpusSettings(temperatures=temperatures, shares=shares)


def test_a_model_without_a_template_starts_from_its_first_token(
    plain: SpeculativeLM, tmp_path: Path
) -> None:
    summary = write(plain, SelfSource(plain), tmp_path / "c")
    assert summary["rows"] > 10
    for row in texts(tmp_path / "c").values():
        assert (
            row.tokens[0] == END and row.prompt_length == 1 + OPENING_TOKENS
        )  # its EOS stands for the BOS it lacks


def test_a_model_with_neither_template_nor_start() -> None:
    table = TableTarget.random(5)
    with pytest.raises(UsageError, match="neither a chat template nor a BOS or EOS token"):
        SelfSource(SpeculativeLM(table, "none", None, 64))
    with pytest.raises(UsageError, match="no tokenizer, which text needs"):
        list(
            RecordSource(
                SpeculativeLM(table, "none", None, 64),
                lambda: [Record("line 1", {"text": "hi"})],
                {},
                longest=8,
            ).prompts(())
        )


def test_jsonl(lm: SpeculativeLM, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records: list[dict[str, Any]] = [
        {"prompt": "rain?"},
        {"messages": talk},
        {"messages": talk[:1]},
        {"text": "rain rain " * 40},
        {"prompt": [3, 4, 5]},
        {"prompt": " "},
        {"prompt": "long " * 300},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    source = sources.source(lm, "jsonl", path, longest=200, text_tokens=16)
    prompts = list(source.prompts(()))
    assert [lm.tokenizer.decode(p.ids) for p in prompts[:2]] == [
        f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n" for word in ("rain?", "hi")
    ]
    assert prompts[1].ids == prompts[2].ids and prompts[4].ids == (3, 4, 5)
    assert [p.cut for p in prompts] == [False, False, False, True, False, False, False] and len(
        prompts[3].ids
    ) == 16
    assert [p.reason for p in prompts[5:]] == [sources.EMPTY, sources.TOO_LONG]
    assert [p.key for p in source.prompts({0, 2})] == [1, 3, 4, 5, 6]
    summary = write(lm, source, tmp_path / "c", tokens=10_000)  # gives out before that
    assert summary["dropped"].pop("duplicate", 0) <= 1 and summary["dropped"] == {
        "prompt-empty": 1,
        "prompt-too-long": 1,
    }
    assert sum(law["cut"] for law in summary["by_temperature"].values()) == 1
    again = write(lm, source, tmp_path / "c", tokens=10_000)
    assert again["rows"] == summary["rows"]
    path.write_text('{"prompt": "another"}\n')
    with pytest.raises(CorpusError, match="begun with source"):
        write(lm, sources.source(lm, "jsonl", path, longest=200, text_tokens=16), tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("[1]\n", "line 1 must be an object"),
        ('{"prompt": "a"}\n\n7\n', "line 3 must be an object"),
        ('{"prompt": 7}\n', "prompt must be text, not int"),
        (
            '{"messages": [{"role": "user", "content": null}]}\n',
            "line 1: message 1: content must be text, not null",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
            "it has a part of type 'image_url'",
        ),
        (
            '{"question": "a", "id": 3}\n',
            "has none of the fields messages, prompt, text, article, but question, id",
        ),
        ('{"prompt": [3, 999]}\n', "token id 999 is outside the target's vocabulary of 264"),
        ('{"prompt": {"a": 1}}\n', "prompt must be text, not dict"),
        ('{"messages": [{"who": "me"}]}\n', "messages must be a list"),
    ],
)
def test_bad_jsonl(lm: SpeculativeLM, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        list(sources.source(lm, "jsonl", path, longest=200, strict=True).prompts(()))


def test_text_files(lm: SpeculativeLM, plain: SpeculativeLM, tmp_path: Path) -> None:
    (tmp_path / "t" / "deep").mkdir(parents=True)
    (tmp_path / "t" / "a.txt").write_text("\n\n".join(f"paragraph {i} " * 30 for i in range(9)))
    (tmp_path / "t" / "deep" / "b.txt").write_text("short")
    (tmp_path / "t" / "c.md").write_text("not read")
    for model in (lm, plain):  # documents are continued as they are, template or not
        prompts = list(
            sources.source(model, "text", tmp_path / "t", longest=100, text_tokens=20).prompts(())
        )
        assert [len(p.ids) for p in prompts[:-1]] == [20] * (len(prompts) - 1) and len(prompts) == 4
        assert model.tokenizer.decode(prompts[0].ids).startswith("paragraph 0")
        assert model.tokenizer.decode(prompts[-1].ids) == "short" and not prompts[-1].cut
    one = sources.source(lm, "text", tmp_path / "t" / "a.txt", longest=100, text_tokens=20)
    assert write(lm, one, tmp_path / "c", tokens=60)["rows"] >= 1


def test_sources_that_are_missing(lm: SpeculativeLM, tmp_path: Path) -> None:
    for kind, path, message in (
        ("jsonl", None, "--source jsonl needs --input"),
        ("text", tmp_path / "nowhere", "no such file"),
        ("csv", tmp_path, "unknown source 'csv'; known are self, jsonl, text"),
    ):
        with pytest.raises(UsageError, match=message):
            sources.source(lm, kind, path, longest=10)
    with pytest.raises(UsageError, match="raise --max-model-len, or lower --max-tokens"):
        sources.source(lm, "text", tmp_path, longest=0)


def test_a_data_set_needs_its_extra(lm: SpeculativeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'specdiff\[train\]'"):
        list(sources.source(lm, "self", dataset="lm1b", longest=10).prompts(()))


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="the extra specdiff[train] is not installed",
)
@pytest.mark.filterwarnings("ignore")
def test_data_sets(lm: SpeculativeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name, field in (("good", "article"), ("bad", "body")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            "".join(json.dumps({"id": i, field: f"rain {i}"}) + "\n" for i in range(5))
        )
    prompts = list(
        sources.source(lm, "self", dataset=str(tmp_path / "good"), longest=50).prompts(())
    )
    assert [lm.tokenizer.decode(p.ids) for p in prompts] == [f"rain {i}" for i in range(5)]
    with pytest.raises(UsageError, match=r"has none of the fields .*; it has id, body"):
        list(sources.source(lm, "self", dataset=str(tmp_path / "bad"), longest=50).prompts(()))
    with pytest.raises(UsageError, match="cannot load the data set"):
        list(sources.source(lm, "self", dataset=str(tmp_path / "nowhere"), longest=50).prompts(()))


def test_it_gives_up_where_nothing_new_comes(
    lm: SpeculativeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "MAX_CONSECUTIVE_DROPS", 20)
    source = RecordSource(lm, lambda: [Record("line 1", {"prompt": [3, 4]})] * 500, {}, longest=8)
    with pytest.raises(CorpusError, match=r"the last 20 texts were all dropped .*duplicate"):
        write(
            lm,
            source,
            tmp_path / "c",
            settings=CorpusSettings(max_tokens=3, temperatures=(0.0,), shares=(1.0,)),
        )
    assert len(texts(tmp_path / "c")) == 1  # what was finished is kept


def test_a_stream_depends_on_earlier_answers() -> None:
    """Requests that follow from earlier answers, None while there is nothing to do, and slots."""
    table = TableTarget.random(5, seed=3)
    queue = [Request([1], SamplingParams(max_tokens=3 + i), i) for i in range(3)]
    answers: dict[int, list[int]] = {}

    def stream() -> Iterator[Request | None]:
        while True:
            yield queue.pop(0) if queue else None

    options: dict[str, Any] = {"verifier": VERIFIERS["match"], "draft_len": 0, "rows": 2}
    for turn in engine.serve(table, NoDrafter(), stream(), slots=24, **options):
        for place, ids, prompt_length in turn.finished():
            answers[place] = ids.tolist()
            if place < 3:
                params = SamplingParams(max_tokens=4)
                queue.append(Request(answers[place], params, row_seed(0, place)))
            assert prompt_length == (1 if place < 3 else len(answers[place]) - 4)
    assert [len(answers[i]) for i in range(6)] == [4, 5, 6, 8, 9, 10]
    with pytest.raises(UsageError, match="needs slots"):
        next(engine.serve(table, NoDrafter(), stream(), **options))
    queue.append(Request([1, 2], SamplingParams(max_tokens=30), 0))
    with pytest.raises(UsageError, match=r"request 0 may reach 2 \+ 30 tokens, but slots are 24"):
        next(engine.serve(table, NoDrafter(), stream(), slots=24, **options))


def command(folder: Path, out: Path, tokens: int) -> list[str]:
    sizes = [
        "--max-tokens",
        "24",
        "--rows",
        "4",
        "--shard-tokens",
        "150",
        "--max-model-len",
        "256",
        "--device",
        "cpu",
    ]
    return [
        "specdiff",
        "data",
        "--model",
        str(folder),
        "--out",
        str(out),
        "--tokens",
        str(tokens),
        "-q",
        *sizes,
    ]


def start(argv: list[str], log: Path | None = None, largest: int | None = None) -> int:
    """The command in a forked process: importing torch again would cost more than the work.

    `log` takes its stderr; no file grows beyond `largest` bytes.
    """
    child = os.fork()
    if child == 0:
        try:
            if log is not None:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
                sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # a background shell hands it down ignored
            sys.argv = argv
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(70)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_goes_on(folder: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    assert os.waitpid(start(command(folder, tmp_path / "whole", 1200)), 0)[1] == 0
    seconds = time.monotonic() - begin
    killed = 0
    chance = random.Random(0)
    for _ in range(3):
        child = start(command(folder, tmp_path / "torn", 1200))
        time.sleep(seconds * chance.uniform(0.3, 0.8))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed
    assert os.waitpid(start(command(folder, tmp_path / "torn", 1200)), 0)[1] == 0
    whole, torn = texts(tmp_path / "whole"), texts(tmp_path / "torn")
    assert same(whole, torn) == len(whole) == len(torn)
    assert Corpus(tmp_path / "torn").tokens >= 1200
    notes = Corpus(tmp_path / "torn").manifest["notes"]
    assert sum(law["rows"] for law in notes["by_temperature"].values()) == len(torn)
    assert (
        os.waitpid(start(command(folder, tmp_path / "torn", 1500)), 0)[1] == 0
    )  # a greater goal goes on
    assert Corpus(tmp_path / "torn").tokens >= 1500 and same(texts(tmp_path / "torn"), torn) == len(
        torn
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    assert os.waitpid(start(command(folder, tmp_path / "whole", 900)), 0)[1] == 0
    torn, log = tmp_path / "torn", tmp_path / "log"
    assert os.waitpid(start(command(folder, torn, 300)), 0)[1] == 0
    before = texts(torn)
    limited = [*command(folder, torn, 900), "--shard-tokens", "100000"]
    assert os.waitstatus_to_exitcode(os.waitpid(start(limited, log, 1200), 0)[1]) == 1
    (line,) = log.read_text().splitlines()
    assert (
        line.startswith(f"specdiff: error: cannot write {torn}/")
        and "ulimit -f" in line
        and "repeat the command" in line
    )
    assert texts(torn).keys() == before.keys() and not list(torn.glob(".*.partial"))
    assert os.waitpid(start(command(folder, torn, 900)), 0)[1] == 0
    whole = texts(tmp_path / "whole")
    assert same(texts(torn), whole) == len(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_interrupted_it_keeps_what_is_finished(folder: Path, tmp_path: Path) -> None:
    child = start(command(folder, tmp_path / "c", 10**9))
    manifest = tmp_path / "c" / "manifest.json"
    while not (manifest.exists() and json.loads(manifest.read_text())["shards"]):
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert texts(tmp_path / "c")


def test_the_api_reports_progress_and_returns_a_summary(lm: SpeculativeLM, tmp_path: Path) -> None:
    out = tmp_path / "c"
    source = SelfSource(lm, 48)
    forecast = forecasts.forecast(lm, source, SETTINGS, tokens=300, rows=4, features=True)
    assert forecast.rows_at_a_time == 4 and forecast.about == generate.about(lm, source, SETTINGS)
    assert forecast.disk_bytes == 300 * (2 + 2 * lm.target.info.hidden_size + 4)
    steps: list[corpora.CorpusProgress] = []
    summary = corpora.write_generated(
        lm, source, SETTINGS, out, tokens=300, rows=4, report=steps.append
    )
    assert steps[0] == corpora.CorpusProgress(0, 300, 0, rows=0, dropped=0, unsettled=0)
    assert steps[-1].tokens == summary.tokens == summary.new_tokens >= 300
    assert steps[-1].processed == summary.generated_tokens
    assert summary.rows == len(texts(out)) and not summary.source_exhausted
    again = corpora.write_generated(lm, source, SETTINGS, out, tokens=300, rows=4)
    assert (again.new_tokens, again.generated_tokens, again.rows) == (0, 0, summary.rows)


def test_the_command(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    base = command(folder, out, 300)[2:]
    code, text, _ = here(*base, "--rows", "auto", "--dry-run", "--json")
    forecast = json.loads(text)
    assert (
        code == 0
        and not out.exists()
        and forecast["rows_at_a_time"] >= 8
        and forecast["estimated_seconds"] >= 0
    )
    code, text, message = here(*[a for a in base if a != "-q"], "--json", "--features")
    summary = json.loads(text)
    assert (
        code == 0
        and summary["tokens"] >= 300
        and summary["feature_tokens"] == summary["tokens"]
        and "% of answer tokens" in message
    )
    corpus = Corpus(out)
    states = corpus.features(0)
    assert corpus.has_features and states is not None and len(states[0]) == len(corpus[0].tokens)
    code, text, _ = here(
        "--model", str(folder), "--out", str(out), "--features"
    )  # alone: nothing is left to do
    assert code == 0 and text == ""


def test_odd_records_are_dropped_and_named(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    parts = [{"type": "text", "text": "ra"}, {"type": "text", "text": "in?"}]
    records: list[Any] = [
        {"prompt": "rain?"},
        {"messages": [{"role": "user", "content": None}]},
        7,
        {"prompt": 3},
        {"question": "?"},
        {"prompt": [3, 999]},
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [{"role": "user", "content": "snow"}, {"role": "alien", "content": "x"}]},
        {"text": "wind"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    strange = byte_tokenizer(
        "{% for m in messages %}{% if m.role == 'alien' %}"
        "{{ raise_exception('no aliens') }}{% endif %}{% endfor %}" + TEMPLATE
    )
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    strange.save_pretrained(model)
    base = [*command(model, tmp_path / "c", 100_000)[2:], "--source", "jsonl", "--input", str(path)]
    base.remove("-q")
    code, out, err = here(*base, "--json")
    summary = json.loads(out)
    dropped = {
        "record-not-an-object": 1,
        "record-not-text": 2,
        "record-without-prompt": 1,
        "template-refused": 1,
        "token-id-unknown": 1,
    }
    assert code == 0 and summary["rows"] >= 2
    assert {why: n for why, n in summary["dropped"].items() if why != "duplicate"} == dropped
    notes = Corpus(tmp_path / "c").manifest["notes"]
    assert (
        notes["dropped"]["record-not-text"] == [1, 3]
        and "line 2: message 1: content" in notes["first_dropped"]["record-not-text"]
    )
    assert (
        "no aliens" in summary["first_dropped"]["template-refused"]
        and "line 8" in summary["first_dropped"]["template-refused"]
    )
    assert "first token-id-unknown: " in err and "line 6: token id 999" in err
    first = texts(tmp_path / "c")[0]
    question = byte_tokenizer(None).decode(first.tokens[: first.prompt_length])
    assert "rain?" in question
    code, _, err = here(*base, "--strict", "--out", str(tmp_path / "d"))
    assert code == 2 and f"{path}, line 2: message 1: content must be text, not null" in err
    shutil.rmtree(tmp_path / "c")
    verbatim = here(*base, "--verbatim", "--json")
    assert json.loads(verbatim[1])["dropped"] == dropped
    assert (
        here(*base, "--verbatim", "--json")[1].partition('"dropped"')[2]
        == verbatim[1].partition('"dropped"')[2]
    )
    assert here(*base, "--verbatim", "--strict", "--out", str(tmp_path / "e"))[0] == 2


def test_a_source_without_a_usable_prompt_says_why(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": 7}\n' * 3)
    code, _, err = here(
        *command(folder, tmp_path / "c", 100)[2:], "--source", "jsonl", "--input", str(path)
    )
    assert (
        code == 2
        and f"no usable prompt (the first: {path}, line 1: prompt must be text, not int)" in err
    )


def test_progress_is_reported_from_the_start(
    here: Callable[..., tuple[int, str, str]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_progress, "FIRST_SECONDS", 0.0)
    arguments = [a for a in command(folder, tmp_path / "c", 900)[2:] if a != "-q"]
    code, _, err = here(*arguments, "--rows", "64")
    assert code == 0
    lines = err.splitlines()
    assert lines[:2] == [f"loading {folder}", "writing, 64 rows at a time: 0 of 900 tokens"]
    prompts = sum("reading prompts" in line for line in lines)
    for i, line in enumerate(lines[2 : 2 + prompts], 1):
        assert line == f"writing, 64 rows at a time: 0 of 900 tokens, reading prompts, {i} so far"
    assert prompts
    assert re.fullmatch(
        r"writing, 64 rows at a time: 0 of 900 tokens, \d+ tok/s, "
        r"\d+ tokens in unfinished rows, 0 rows stored, 0 dropped",
        lines[2 + prompts],
    )


def test_the_command_imports(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    data = {
        "tokens": torch.tensor([5, 6, 7, 8]),
        "offsets": torch.tensor([0, 2, 4]),
        "prompt_lengths": torch.tensor([1, 1]),
    }
    save_file(data, tmp_path / "rows.safetensors")
    arguments = (
        "--model",
        str(folder),
        "--out",
        str(tmp_path / "c"),
        "--from-tokens",
        str(tmp_path / "rows.safetensors"),
        "--json",
    )
    assert json.loads(here(*arguments)[1])["rows"] == 2
    assert {k: r.tokens.tolist() for k, r in texts(tmp_path / "c").items()} == {
        0: [5, 6],
        1: [7, 8],
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say how many tokens to write: --tokens N"),
        (("--tokens", "9", "--shares", "0.5,0.2,0.2"), 2, "sum to 1"),
        (
            ("--tokens", "9", "--temperatures", "1,hot"),
            2,
            "--temperatures must be numbers separated by commas, not '1,hot'",
        ),
        (
            ("--tokens", "9", "--rows", "0"),
            2,
            "--rows must be a whole number of at least 1 or 'auto', not '0'",
        ),
        (
            ("--tokens", "9", "--source", "jsonl", "--input", "/nowhere.jsonl"),
            2,
            "no such file: /nowhere.jsonl",
        ),
        (("--tokens", "9", "--max-tokens", "2000"), 2, "exceed max_len 256"),
        (
            ("--tokens", "9", "--verbatim", "--dry-run"),
            2,
            "give --tokens N, and neither --from-tokens nor --verbatim",
        ),
        (("--from-tokens", "/nowhere.safetensors"), 2, "no such file: /nowhere.safetensors"),
        (("--features",), 1, "holds no manifest.json"),
        (
            ("--tokens", "9", "--rows", "2", "--out", "/proc/nowhere"),
            1,
            "cannot write /proc/nowhere",
        ),
    ],
)
def test_errors_are_one_line(
    here: Callable[..., tuple[int, str, str]],
    folder: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    got, out, err = here(
        "--model",
        str(folder),
        "--out",
        str(tmp_path / "c"),
        "--max-model-len",
        "256",
        "--max-tokens",
        "24",
        *arguments,
    )
    assert (got, out) == (code, "") and message in err and "Traceback" not in err


def test_a_corpus_of_an_earlier_version_is_resumed(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    """Its manifest has a digest of the beginning of the weights alone; later ones have all."""
    model, manifest = tmp_path / "model", tmp_path / "c" / "manifest.json"
    shutil.copytree(folder, model)
    (model / "more.safetensors").write_bytes(bytes(2 << 20))
    base = command(model, tmp_path / "c", 100)[2:]
    assert here(*base)[0] == 0
    content = json.loads(manifest.read_text())
    digest = content["about"].pop("target_weights")
    manifest.write_text(json.dumps(content))
    longer = command(model, tmp_path / "c", 200)[2:]
    assert here(*longer)[0] == 0 and Corpus(tmp_path / "c").tokens >= 200
    assert json.loads(manifest.read_text())["about"] == content["about"] | {
        "target_weights": digest
    }
    (model / "more.safetensors").write_bytes(bytes((2 << 20) - 1) + b"1")
    code, _, err = here(*longer)
    assert code == 1 and f"begun with target_weights = '{digest}', not" in err
    manifest.write_text(
        json.dumps(content | {"about": content["about"] | {"target_sha256": "0" * 64}})
    )
    code, _, err = here(*longer)
    assert code == 1 and "begun with target_sha256" in err


def test_a_folder_of_something_else_is_left_alone(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    code, _, err = here(*command(folder, folder, 100)[2:])
    assert code == 2 and "it is not a corpus; choose another --out" in err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_shard_changed_on_disk_is_named(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    base = command(folder, tmp_path / "c", 300)[2:]
    assert here(*base)[0] == 0
    path = tmp_path / "c" / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for arguments in (base, ["--model", str(folder), "--out", str(tmp_path / "c"), "--features"]):
        code, _, err = here(*arguments)
        assert code == 1 and f"{path} was changed after it was written" in err


def test_another_seed_or_target_is_refused(
    here: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    base = command(folder, tmp_path / "c", 100)[2:]
    assert here(*base)[0] == 0
    code, _, err = here(*base, "--seed", "9")
    assert code == 1 and "begun with seed = 0, not 9" in err
    other = tmp_path / "other"
    model = network()
    with torch.no_grad():
        model.get_parameter("transformer.h.0.ln_1.bias").add_(0.01)
    model.save_pretrained(other)
    byte_tokenizer(TEMPLATE).save_pretrained(other)
    code, _, err = here(*command(other, tmp_path / "c", 100)[2:])
    assert code == 1 and "begun with target" in err
