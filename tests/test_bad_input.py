"""B1: every bad argument and artifact gives one clear error that names value, file or field.

Nothing of it is run.
"""

import builtins
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdiff
import tiny
from specdiff import SamplingParams, SpeculativeLM, catalog
from specdiff.controller import draft_length
from specdiff.drafters.base import NoDrafter
from specdiff.errors import (
    ConfigError,
    DrafterError,
    SpecdiffError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from specdiff.nn.ddit import SEDD
from specdiff.targets.causal import CausalTarget
from specdiff.text import chat_template


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no converted model of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def target() -> CausalTarget:
    return tiny.target("llama")


@pytest.fixture(scope="module")
def lm(target: CausalTarget) -> SpeculativeLM:
    return SpeculativeLM(target, tiny.drafter(target.info), None, 64)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target's and a drafter's folder that load."""
    root = tmp_path_factory.mktemp("sound")
    tiny.model("llama").save_pretrained(root / "model")
    tiny.sedd(tiny.sedd_config()).save_pretrained(root / "drafter")
    return {"model": root / "model", "drafter": root / "drafter"}


@pytest.fixture
def folder(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy to damage."""

    def copied(kind: str) -> Path:
        broken = tmp_path / kind
        broken.mkdir()
        for file in sound[kind].iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        return broken

    return copied


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def trap(folder: Path) -> Path:
    """Put a pickle that runs code where the weights should be; returns the mark it would leave."""
    mark = folder.parent / "executed"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    (folder / "model.safetensors").unlink()
    return mark


def refuses_to_open(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = builtins.open

    def guarded(file: Any, *arguments: Any, **options: Any) -> Any:
        assert not str(file).endswith(name), f"{file} was opened"
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(torch, "load", lambda *a, **o: pytest.fail("torch.load was called"))


def test_the_sound_ones_load(sound: dict[str, Path]) -> None:
    broken = specdiff.load(str(sound["model"]), str(sound["drafter"]), device="cpu")
    assert len(broken.generate([1, 2], max_tokens=3, seed=0).token_ids) == 3


# names


@pytest.mark.parametrize(
    "name",
    ["./nowhere", "/nowhere/at/all", "~/no such folder", "no-such-model", "someone/no-such-model"],
)
def test_unknown_model(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        specdiff.load(name, device="cpu")
    assert name in str(caught.value)
    assert "smollm2-135m" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["nope", "./nowhere", "/nowhere/drafter", "someone/no-such-drafter", "./nowhere.py", "sedd2"],
)
def test_unknown_drafter(target: CausalTarget, name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        catalog.drafter(name, target.info)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "./nowhere"])
def test_an_unknown_drafter_lists_the_known(target: CausalTarget, name: str) -> None:
    with pytest.raises(
        UnknownNameError, match=r"auto, none, .*folder or hub id, module:Class, \./file\.py:Class"
    ):
        catalog.drafter(name, target.info)


def test_unknown_device_and_dtype(sound: dict[str, Path]) -> None:
    with pytest.raises(
        UsageError, match="dtype 'float8'; known are auto, float32, bfloat16, float16"
    ):
        specdiff.load(str(sound["model"]), dtype="float8")
    with pytest.raises(UsageError, match="device 'toaster'"):
        specdiff.load(str(sound["model"]), device="toaster")


@pytest.mark.parametrize("value", [1, 0, -5])
def test_max_len_out_of_range(sound: dict[str, Path], value: int) -> None:
    with pytest.raises(UsageError, match=f"max_len must be at least 2, not {value}"):
        specdiff.load(str(sound["model"]), max_len=value)


# options of a request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"draft_len": 0},
            "draft_len must be at least 1, not 0; for plain decoding use the drafter 'none'",
        ),
        ({"draft_len": -1}, "draft_len must be at least 1, not -1"),
        (
            {"draft_len": "long"},
            "draft_len must be a whole number of at least 1 or 'auto', not 'long'",
        ),
        ({"temperature": -0.5}, "temperature must be a finite number >= 0.*not -0.5"),
        ({"temperature": math.nan}, "temperature must be a finite number >= 0.*not nan"),
        ({"temperature": math.inf}, "temperature must be a finite number >= 0.*not inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\].*not 0.0"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\].*not nan"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\].*not 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\].*not -0.1"),
        ({"min_p": math.nan}, r"min_p must be in \[0, 1\].*not nan"),
        ({"top_k": -3}, "top_k must be >= 0.*not -3"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": -8}, "max_tokens must be at least 1, not -8"),
        ({"stop_token_ids": (4, -2)}, r"stop_token_ids must be token ids >= 0, not \(4, -2\)"),
        (
            {"temprature": 1.0},
            "unknown option 'temprature'; sampling options are max_tokens, temperature",
        ),
        (
            {"repetition_penalty": 0.0},
            r"repetition_penalty must be a finite number > 0 \(1 is off\), not 0.0",
        ),
        ({"repetition_penalty": math.nan}, "repetition_penalty.*not nan"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\] \(0 is off\), not 2.1"),
        ({"frequency_penalty": -3}, r"frequency_penalty must be in \[-2, 2\] \(0 is off\), not -3"),
        (
            {"logit_bias": {3: 101.0}},
            r"logit_bias must map token ids >= 0 to numbers in \[-100, 100\], not 3 to 101.0",
        ),
        ({"logit_bias": {-3: 1.0}}, "logit_bias must map.*not -3 to 1.0"),
        (
            {"logit_bias": dict.fromkeys(range(301), 1.0)},
            "logit_bias may hold at most 300 entries, not 301",
        ),
        (
            {"logit_bias": {10**6: 1.0}},
            "logit_bias names token id 1000000, which is outside the target's vocabulary of",
        ),
        (
            {"allowed_token_ids": ()},
            r"allowed_token_ids must be one token id >= 0 at least, not \(\)",
        ),
        (
            {"allowed_token_ids": (1, 10**6)},
            "allowed_token_ids names token id 1000000, which is outside",
        ),
        ({"logprobs": 21}, r"logprobs must be in \[0, 20\], or None \(off\), not 21"),
        ({"stop": [""]}, "stop must hold strings of at least one character, not ''"),
        ({"stop": ["a"] * 17}, "stop may hold at most 16 strings, not 17"),
        ({"stop": "a" * 257}, "stop strings may have at most 256 characters, not 257"),
        ({"verifier": "hope"}, "unknown verifier 'hope'; known are token, block, match"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
    ],
)
def test_an_option_out_of_range(lm: SpeculativeLM, options: dict[str, Any], message: str) -> None:
    for ask in (lm.generate, lambda *a, **o: list(lm.stream(*a, **o))):
        with pytest.raises(UsageError, match=message):
            ask([1, 2, 3], **options)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_tokens", (0, 2**63, 1.5, "all", None)),
        ("temperature", (-1, math.inf, math.nan, "hot", None)),
        ("top_k", (-1, True)),
        ("top_p", (0, 1.1)),
        ("min_p", (-0.1, 1.1)),
        ("stop_token_ids", (5, "5", [-1], [2**63], [1.5], [None])),
        ("repetition_penalty", (0, math.inf)),
        ("presence_penalty", (2.1,)),
        ("frequency_penalty", (-3,)),
        ("logit_bias", (5, "5", [5], {1: 101}, {1: "x"}, {1.5: 1}, {-1: 1}, [(1, 2), (1, 3)])),
        ("logit_bias", (dict.fromkeys(range(301), 1),)),
        ("allowed_token_ids", ((), [-1], [1.5])),
        ("logprobs", (-1, 21, 1.5)),
    ],
)
def test_a_usage_error_names_the_option(param: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{param: value})
        assert caught.value.param == param, value


@pytest.mark.parametrize("value", [0, 2.5, True, "many"])
def test_a_bad_draft_length_names_the_option(value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        draft_length(value, NoDrafter(), steady=True)
    assert caught.value.param == "draft_len"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"max_tokens": "all"},
        {"draft_len": 2.5},
        {"seed": "lucky"},
        {"seed": 0.5},
        {"rows": "few"},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_an_option_of_the_wrong_type(lm: SpeculativeLM, options: dict[str, Any]) -> None:
    """Never taken for something else."""
    with pytest.raises((UsageError, TypeError)):
        lm.generate([1, 2, 3], **{"max_tokens": 4} | options)


def test_a_fixed_draft_len_of_the_loop_itself(target: CausalTarget) -> None:
    for bad in (0, -1):
        with pytest.raises(UsageError, match=f"draft_len must be at least 1, not {bad}"):
            next(
                specdiff.decode.decode(
                    target, tiny.drafter(target.info), tiny.batch_of([[1]]), draft_len=bad
                )
            )


def test_a_prompt_longer_than_max_len(lm: SpeculativeLM) -> None:
    with pytest.raises(UsageError, match=r"70 tokens.*max_len 64; shorten it or raise max_len"):
        lm.generate([1] * 70)


def test_a_token_id_out_of_range(lm: SpeculativeLM) -> None:
    with pytest.raises(
        UsageError,
        match=f"token id {tiny.VOCAB} is outside the target's vocabulary of {tiny.VOCAB}",
    ):
        lm.generate([1, tiny.VOCAB])


# a drafter's folder


def loaded(folder: Path, target: CausalTarget, **options: Any) -> Any:
    return catalog.drafter(str(folder), target.info, options)


def test_a_drafter_of_another_vocabulary(target: CausalTarget, tmp_path: Path) -> None:
    for size in (tiny.VOCAB - 1, tiny.VOCAB + 1, 50257):
        config = (
            tiny.sedd_config(size)
            if size < 1000
            else tiny.sedd_config(size, hidden_size=8, n_heads=2, n_blocks=1)
        )
        SEDD(config).save_pretrained(tmp_path / "other")
        with pytest.raises(
            DrafterError,
            match=rf"{size} tokens.*has {tiny.VOCAB}; use a drafter trained for this target",
        ):
            loaded(tmp_path / "other", target)


@pytest.mark.parametrize("left", [0, 4, 8, 200, -1])
def test_truncated_safetensors(folder: Any, target: CausalTarget, left: int) -> None:
    for kind in ("drafter", "model"):
        broken = folder(kind)
        file = broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[:left])
        with pytest.raises(WeightsError, match=r"truncated or damaged") as caught:
            loaded(broken, target) if kind == "drafter" else specdiff.load(
                str(broken), device="cpu"
            )
        assert str(broken) in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b"not json",
        b"\xff\xfe",
        b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
    ],
)
def test_safetensors_with_a_false_header(folder: Any, target: CausalTarget, header: bytes) -> None:
    broken = folder("drafter")
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        loaded(broken, target)


def test_safetensors_with_an_endless_header(folder: Any, target: CausalTarget) -> None:
    broken = folder("drafter")
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*truncated or damaged"):
        loaded(broken, target)


def test_a_tensor_of_the_wrong_shape(folder: Any, target: CausalTarget) -> None:
    broken = folder("drafter")
    name = "blocks.1.attn_out.weight"
    tensors = load_file(broken / "model.safetensors")
    save_file(tensors | {name: torch.zeros(3, 5)}, broken / "model.safetensors")
    with pytest.raises(
        WeightsError,
        match=rf"model\.safetensors: {name} has shape \[3, 5\], "
        r"but config\.json asks for \[32, 32\]",
    ):
        loaded(broken, target)


def test_tensors_missing_and_unknown(folder: Any, target: CausalTarget) -> None:
    broken = folder("drafter")
    tensors = load_file(broken / "model.safetensors")
    rest = {k: v for k, v in tensors.items() if k != "blocks.0.norm2.weight"}
    save_file(rest, broken / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors lacks blocks\.0\.norm2\.weight"):
        loaded(broken, target)
    save_file(tensors | {"surprise": torch.zeros(1)}, broken / "model.safetensors")
    with pytest.raises(WeightsError, match=r"has unknown surprise"):
        loaded(broken, target)
    edit(broken, lambda c: c["model"].update(n_blocks=3))
    with pytest.raises(
        WeightsError,
        match=r"lacks blocks\.2\..* and \d+ more and has unknown surprise; does its config\.json",
    ):
        loaded(broken, target)


REQUIRED = ["tokens", "graph", "noise", "model", "graph.type", "noise.type"]
REQUIRED += [f"model.{key}" for key in ("hidden_size", "n_blocks", "n_heads", "cond_dim")]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_config_key(folder: Any, target: CausalTarget, key: str) -> None:
    broken = folder("drafter")
    *path, last = key.split(".")

    def drop(config: dict[str, Any]) -> None:
        for part in path:
            config = config[part]
        del config[last]

    edit(broken, drop)
    with pytest.raises(ConfigError, match=rf"config\.json lacks the key '{last}'"):
        loaded(broken, target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", "48"), ("tokens", True), ("tokens", None), ("tokens", 48.0),
        ("graph", "absorb"), ("noise", []), ("graph.type", 3), ("graph.type", "melt"),
        ("noise.type", "cosine"), ("model", 5), ("model.hidden_size", "32"),
        ("model.n_blocks", None), ("model.n_heads", 5), ("attention", "sideways"),
        ("attention", 7), ("model.n_heads", 0), ("model.n_heads", -4), ("model.hidden_size", 0),
        ("model.hidden_size", -32), ("model.n_blocks", -1), ("model.cond_dim", 0), ("tokens", -1),
        ("model.length", "1024"), ("model.length", 0), ("model.dropout", "none"),
        ("model.scale_by_sigma", "yes"), ("borrow_embeddings", "no"), ("draft_vocab_size", "20"),
        ("draft_vocab_size", -3), ("context_window", "8"), ("context_window", 0),
        ("time_conditioning", "no"), ("draft_len", "8"), ("draft_len", 0),
    ],
)  # fmt: skip
def test_a_config_key_with_a_bad_value(
    folder: Any, target: CausalTarget, key: str, value: Any
) -> None:
    broken = folder("drafter")
    *path, last = key.split(".")

    def change(config: dict[str, Any]) -> None:
        for part in path:
            config = config[part]
        config[last] = value

    edit(broken, change)
    with pytest.raises(ConfigError) as caught:
        loaded(broken, target)
    assert last in str(caught.value) or key.split(".")[0] in str(caught.value)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "\x00", "[1, 2]", "null", '"tokens"', "1e999"]
)
def test_a_config_that_is_no_json_object(folder: Any, target: CausalTarget, text: str) -> None:
    broken = folder("drafter")
    (broken / "config.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"config\.json (is not valid JSON|must hold a JSON object)"
    ):
        loaded(broken, target)


def test_a_config_in_no_encoding(folder: Any, target: CausalTarget) -> None:
    broken = folder("drafter")
    (broken / "config.json").write_bytes(b'{"tokens": "\xff\xfe"}')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        loaded(broken, target)


def test_folders_that_hold_nothing(tmp_path: Path, target: CausalTarget, folder: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"holds no config\.json; a drafter folder needs config\.json and model\.safetensors",
    ):
        loaded(tmp_path, target)
    with pytest.raises(ConfigError, match=r"holds no config\.json; a target folder needs"):
        specdiff.load(str(tmp_path), device="cpu")
    for kind in ("drafter", "model"):
        broken = folder(kind)
        (broken / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"safetensors"):
            loaded(broken, target) if kind == "drafter" else specdiff.load(
                str(broken), device="cpu"
            )


def test_a_model_that_is_no_drafter(folder: Any, target: CausalTarget) -> None:
    broken = folder("model")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(
        ConfigError,
        match=r"no drafter format with model_type 'nonsense'.*"
        r"sedd, mdlm, block .*and transformers' causal LMs",
    ):
        loaded(broken, target)


def test_a_drafter_that_is_no_model(folder: Any) -> None:
    with pytest.raises(SpecdiffError, match="sedd"):
        specdiff.load(str(folder("drafter")), device="cpu")


def test_draft_vocab_ids_out_of_range(target: CausalTarget, tmp_path: Path) -> None:
    for bad in (-1, tiny.VOCAB, 2**40):
        network = tiny.sedd(tiny.sedd_config(**tiny.CACHED))
        network.draft_vocab[3] = bad
        network.save_pretrained(tmp_path / "bad")
        with pytest.raises(WeightsError, match="draft_vocab"):
            loaded(tmp_path / "bad", target)


# pickles and code


@pytest.mark.parametrize("kind", ["drafter", "model"])
def test_a_pickle_is_refused_and_never_opened(
    folder: Any, target: CausalTarget, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = folder(kind)
    mark = trap(broken)
    refuses_to_open(monkeypatch, ".bin")
    with pytest.raises(
        WeightsError,
        match=r"pytorch_model\.bin.* is a pickle, which can run code.*(Convert|convert)",
    ):
        loaded(broken, target) if kind == "drafter" else specdiff.load(str(broken), device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["drafter", "model"])
def test_a_pickle_in_safetensors_clothing(folder: Any, target: CausalTarget, kind: str) -> None:
    broken = folder(kind)
    mark = trap(broken)
    (broken / "pytorch_model.bin").rename(broken / "model.safetensors")
    with pytest.raises(WeightsError, match=r"safetensors"):
        loaded(broken, target) if kind == "drafter" else specdiff.load(str(broken), device="cpu")
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_left_alone(
    folder: Any, target: CausalTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("drafter", "model"):
        broken = folder(kind)
        mark = broken.parent / "executed"
        (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
        refuses_to_open(monkeypatch, ".bin")
        assert (
            loaded(broken, target)
            if kind == "drafter"
            else specdiff.load(str(broken), device="cpu")
        )
        assert not mark.exists()


@pytest.mark.parametrize("model_type", ["llama", "brand_new"])
def test_auto_map_is_refused(folder: Any, model_type: str) -> None:
    """config.json may not bring its own code, of a known family or not."""
    broken = folder("model")
    mark = broken.parent / "executed"
    (broken / "modeling.py").write_text(
        f"import os; os.mkdir({str(mark)!r})\nclass Config: ...\nclass Model: ...\n"
    )
    auto = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit(broken, lambda c: c.update(auto_map=auto, model_type=model_type))
    with pytest.raises(
        (UnsupportedModelError, ConfigError), match=r"auto_map|own code|custom code|brand_new"
    ) as caught:
        specdiff.load(str(broken), device="cpu")
    assert str(broken) in str(caught.value)
    assert not mark.exists()


def test_a_tokenizer_may_not_bring_code(folder: Any) -> None:
    broken = folder("model")
    mark = broken.parent / "executed"
    (broken / "tokenization.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Tok: ...\n")
    (broken / "tokenizer_config.json").write_text(
        json.dumps(
            {"auto_map": {"AutoTokenizer": ["tokenization.Tok", None]}, "tokenizer_class": "Tok"}
        )
    )
    with pytest.raises(
        ConfigError, match=r"the tokenizer \(tokenizer_config.json\) cannot be read"
    ):
        specdiff.load(str(broken), device="cpu")
    assert not mark.exists()


# a target's folder


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"hidden_size": 4}', '{"model_type": "no_such_family"}', '{"model_type": 7}'],
)
def test_a_targets_config_that_says_nothing(folder: Any, text: str) -> None:
    broken = folder("model")
    (broken / "config.json").write_text(text)
    with pytest.raises(SpecdiffError) as caught:
        specdiff.load(str(broken), device="cpu")
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "wide"), ("num_attention_heads", 0)])
def test_a_targets_config_with_a_bad_value(folder: Any, key: str, value: Any) -> None:
    broken = folder("model")
    edit(broken, lambda c: c.update({key: value}))
    with pytest.raises(ConfigError) as caught:
        specdiff.load(str(broken), device="cpu")
    assert str(broken / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", r"lack {}"), ("misshapen", r"hold {} in shape \[3, 5\], not \[64, 32\]")],
)
def test_a_target_with_a_bad_tensor(folder: Any, how: str, message: str) -> None:
    """transformers itself fills a missing one with random numbers, and warns."""
    broken = folder("model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(broken / "model.safetensors")
    changed = {k: v for k, v in tensors.items() if k != name} | (
        {} if how == "missing" else {name: torch.zeros(3, 5)}
    )
    save_file(changed, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message.replace("{}", name.replace(".", r"\."))):
        specdiff.load(str(broken), device="cpu")


def test_a_target_that_says_nan(folder: Any) -> None:
    broken = folder("model")
    tensors = load_file(broken / "model.safetensors")
    save_file(
        {k: v * math.nan for k, v in tensors.items()},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UnsupportedModelError, match="self-test"):
        specdiff.load(str(broken), device="cpu")


# a drafter in the user's own file

GOOD = """
from specdiff import Draft, Drafter
class Mine(Drafter):
    draft_len = 3
    def __init__(self, target, flavour="plain"):
        self.flavour = flavour
        if flavour == "bitter":
            raise RuntimeError("too bitter")
        if flavour == "odd":
            None + 1
    def propose(self, context, state, noise, draft_len): return Draft.empty(context.batch)
class Other:
    def __init__(self, target): ...
class Abstract(Drafter): ...
value = 5
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(GOOD)
    return tmp_path / "mine.py"


def test_a_good_file(mine: Path, target: CausalTarget) -> None:
    assert catalog.drafter(f"{mine}:Mine", target.info).flavour == "plain"
    assert (
        catalog.drafter(f'{mine}:Mine:{{"flavour": "sweet: and sour"}}', target.info).flavour
        == "sweet: and sour"
    )
    assert (
        catalog.drafter(f'{mine}:Mine:{{"flavour": "a"}}', target.info, {"flavour": "b"}).flavour
        == "b"
    )


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            'Mine:{"flavour": "bitter"}',
            DrafterError,
            r"mine\.py:Mine raised RuntimeError while being built: too bitter",
        ),
        (
            'Mine:{"flavour": "odd"}',
            DrafterError,
            r"mine\.py:Mine raised TypeError while being built",
        ),
        ('Mine:{"flavor": 1}', UsageError, r"mine\.py:Mine does not take these options.*flavor"),
        (
            "Mine:{not json",
            UsageError,
            r"options of drafter .*mine\.py:Mine are not valid JSON.*\{not json",
        ),
        (
            "Mine:[1]",
            UsageError,
            r"options of drafter .*mine\.py:Mine must be a JSON object, not \[1\]",
        ),
        (
            "Other",
            DrafterError,
            r"mine\.py:Other gave a Other, not a specdiff Drafter; subclass specdiff\.Drafter",
        ),
        ("value", DrafterError, r"mine\.py:value"),
        ("Abstract", SpecdiffError, r"mine\.py:Abstract"),
        ("Missing", UnknownNameError, r"mine\.py defines no 'Missing'"),
    ],
)
def test_a_bad_drafter_in_a_file(
    mine: Path, target: CausalTarget, spec: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        catalog.drafter(f"{mine}:{spec}", target.info)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "raised ZeroDivisionError while being imported: division by zero"),
        ("def broken(:", "raised SyntaxError while being imported"),
        (
            "import no_such_module_anywhere",
            "raised ModuleNotFoundError while being imported.*no_such_module_anywhere",
        ),
    ],
)
def test_a_file_that_raises_on_import(
    tmp_path: Path, target: CausalTarget, text: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(DrafterError, match=rf"bad\.py {message}"):
        catalog.drafter(f"{tmp_path / 'bad.py'}:Mine", target.info)


def test_a_file_or_module_that_is_not_there(tmp_path: Path, target: CausalTarget) -> None:
    with pytest.raises(UnknownNameError, match=r"no drafter file '.*gone\.py'"):
        catalog.drafter(f"{tmp_path / 'gone.py'}:Mine", target.info)
    with pytest.raises(
        UnknownNameError, match=r"no module 'gone_module'.*installed, or did you mean a \./file\.py"
    ):
        catalog.drafter("gone_module:Mine", target.info)
    with pytest.raises(UnknownNameError, match=r"json defines no 'Mine'"):
        catalog.drafter("json:Mine", target.info)


def test_options_for_no_drafter(target: CausalTarget) -> None:
    with pytest.raises(UsageError, match="'none' takes no options, but got steps"):
        catalog.drafter("none", target.info, {"steps": 2})


def test_options_for_a_ready_made_drafter(sound: dict[str, Path]) -> None:
    """load() cannot apply options to an object: it says so rather than dropping them."""
    with pytest.raises((UsageError, DrafterError), match="drafter_options"):
        specdiff.load(str(sound["model"]), NoDrafter(), device="cpu", drafter_options={"steps": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"order": "random"}, "unknown order 'random'; known are one-shot, left-to-right, any"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"draft_temperature": math.nan}, "draft_temperature.*nan"),
        ({"stepz": 2}, "stepz"),
    ],
)
def test_options_of_a_trained_drafter(
    sound: dict[str, Path], target: CausalTarget, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loaded(sound["drafter"], target, **options)


# GGUF


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


GGUFS = {
    "empty": b"",
    "garbage": b"\x93NUMPY" * 40,
    "magic alone": b"GGUF",
    "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "nothing in it": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "endless metadata": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "endless tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "endless key": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"abc", 2**62),
    "endless string": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + string(b"general.architecture")
    + struct.pack("<I", 8)
    + string(b"x", 2**63),
    "endless array": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + string(b"a.b")
    + struct.pack("<IIQ", 9, 4, 2**61),
    "unknown type": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + string(b"a.b")
    + struct.pack("<II", 77, 0),
    "unknown family": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + string(b"general.architecture")
    + struct.pack("<I", 8)
    + string(b"nope"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")  # numpy, on lengths that overflow
@pytest.mark.parametrize("kind", GGUFS)
def test_a_damaged_gguf(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUFS[kind])
    with pytest.raises(
        WeightsError, match=r"model\.gguf cannot be read as GGUF \(truncated or damaged\?\)"
    ):
        specdiff.load(str(file), device="cpu")
    assert not [
        p for p in (tmp_path / "cache").rglob("*") if p.is_file()
    ]  # no half conversion is kept


@pytest.mark.real
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.999])
def test_a_truncated_gguf(tmp_path: Path, share: float) -> None:
    from specdiff.models import gguf

    whole = gguf.packaged(*catalog.PACKAGED_MODELS["smollm2-135m"])
    size = int(whole.stat().st_size * share)
    with whole.open("rb") as source:
        (tmp_path / "cut.gguf").write_bytes(source.read(size))
    with pytest.raises(
        WeightsError, match=r"cut\.gguf cannot be read as GGUF \(truncated or damaged\?\)"
    ):
        specdiff.load(str(tmp_path / "cut.gguf"), device="cpu")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_gguf_that_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match=r"no file '.*gone\.gguf'"):
        specdiff.load("./gone.gguf", device="cpu")


# chat templates


def chatting(target: CausalTarget, template: str) -> SpeculativeLM:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"hi": 0, "there": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return SpeculativeLM(
        target,
        "none",
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", chat_template=template),
        64,
    )


@pytest.fixture(scope="module")
def chatty(target: CausalTarget) -> SpeculativeLM:
    """One for all templates, so that only those that must be killed cost a process of their own."""
    return chatting(target, "")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 5000000 }}",
        "{{ '%999999999s' | format('x') | length }}{{ 'x' * 10 ** 10 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ messages[0].content + 1 }}",
    ],
    ids=[
        "subclasses",
        "globals",
        "mutates",
        "endless",
        "nested",
        "bignum",
        "bomb",
        "long",
        "memory",
        "recursive",
        "raises",
        "syntax",
        "type",
    ],
)
def test_an_evil_or_broken_chat_template(
    chatty: SpeculativeLM, template: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    mark = tmp_path / "executed"
    chatty.tokenizer.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(SpecdiffError, match="chat template"):
        chatty.chat([{"role": "user", "content": "hi there"}], max_tokens=1)
    assert not mark.exists()


def test_after_a_template_was_stopped_the_next_conversation_is_rendered(
    target: CausalTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    monkeypatch.setattr(
        chat_template, "WAITING", 100
    )  # on the clock: computing is what is short here, and a machine may be busy
    # constants are computed while compiling
    bomb = "{% if messages|length > 1 %}{{ (messages|length + 7) ** (10 ** 10) }}{% endif %}"
    broken = chatting(target, bomb + "{{ messages[0].content }}{{ unk_token }}")
    hi = {"role": "user", "content": "hi"}
    assert broken.render([hi]) == broken.tokenizer.apply_chat_template(
        [hi], tokenize=True, return_dict=False
    )
    with pytest.raises(
        UsageError, match=r"chat template refuses these messages \(it did not end within 1 seconds"
    ):
        broken.render([hi, hi])
    assert len(broken.render([hi])) == 2


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"content": "hi"}], ["hi"], [5], "hi"])
def test_messages_of_the_wrong_shape(target: CausalTarget, messages: Any) -> None:
    broken = chatting(target, "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}")
    with pytest.raises(UsageError, match=r"role.*content"):
        broken.chat(messages, max_tokens=1)
