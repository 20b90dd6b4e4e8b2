"""GGUF files: the model that the file describes, or one clear error; never another file's cache."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ggufs
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import specdiff
from specdiff.errors import (
    SpecdiffError,
    StorageError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from specdiff.models import gguf
from specdiff.models.loading import load_model

IDS = torch.randint(3, ggufs.VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specdiff" / "gguf"


def rebuilt(path: Path) -> PreTrainedModel:
    net: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.converted(path), dtype=torch.float32
    )
    return net.eval()


@torch.inference_mode()
def logits(net: Any) -> torch.Tensor:
    out: torch.Tensor = net(IDS, attention_mask=torch.ones_like(IDS)).logits
    return out


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*") if path.suffix != ".lock"]


# the model


@pytest.mark.parametrize("architecture", ggufs.MODELS)
def test_a_model_is_rebuilt_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    net = ggufs.model(architecture)
    assert torch.equal(
        logits(rebuilt(ggufs.write(tmp_path / "model.gguf", net, architecture))), logits(net)
    )


def test_every_served_architecture_is_tested() -> None:
    from specdiff.models.gguf_header import ARCHITECTURES

    assert set(ARCHITECTURES) == set(ggufs.MODELS)


def test_generation_from_a_file(tmp_path: Path) -> None:
    net = ggufs.model("llama")
    path = ggufs.write(tmp_path / "model.gguf", net)
    lm = specdiff.load(str(path), "ngram", device="cpu", dtype="float32")
    prompt = IDS[0, :9].tolist()
    expected = net.generate(
        IDS[:, :9], attention_mask=torch.ones(1, 9), do_sample=False, max_new_tokens=12
    )[0, 9:].tolist()
    assert lm.generate(prompt, temperature=0, max_tokens=12).token_ids == expected
    assert lm.encode("aa") == [ggufs.VOCAB - 1]


def test_a_files_neighbors_are_not_read(tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    for name in ("adapter_config.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text("{ not json")
    assert torch.equal(logits(rebuilt(path)), logits(ggufs.model("llama")))


# what is missing


def test_a_part_of_a_split_model(tmp_path: Path, cache: Path) -> None:
    path = ggufs.write(
        tmp_path / "a-00002-of-00003.gguf",
        ggufs.model("llama"),
        fields={"split.count": 3, "split.no": 1},
    )
    with pytest.raises(
        WeightsError,
        match=r"a-00002-of-00003\.gguf is part 2 of a model split into 3 files; join them",
    ):
        gguf.converted(path)
    assert entries(cache) == []


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight", "blk.0.attn_k.weight"],
)
def test_a_missing_tensor(tmp_path: Path, cache: Path, name: str) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"), tensors={name: None})
    with pytest.raises(
        WeightsError, match=rf"model\.gguf lacks {name}; it cannot be loaded as a llama model"
    ):
        gguf.converted(path)
    assert entries(cache) == []


def test_a_layer_less_than_the_metadata_says(tmp_path: Path) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf", ggufs.model("qwen2"), "qwen2", fields={"block_count": 3}
    )
    with pytest.raises(WeightsError, match=r"lacks blk\.2\.attn_k\.bias, .* and 9 more"):
        gguf.converted(path)


def test_a_layer_more_than_the_metadata_says(tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"), fields={"block_count": 1})
    with pytest.raises(
        WeightsError,
        match=r"holds blk\.1\.attn_k\.weight, .* and 6 more, which the model has no place for",
    ):
        gguf.converted(path)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "rope_factors_long.weight", "blk.0.ffn_gate_inp.weight"]
)
def test_a_tensor_without_a_place(tmp_path: Path, name: str) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf", ggufs.model("llama"), tensors={name: torch.ones(32)}
    )
    with pytest.raises(WeightsError, match=rf"holds {name}, which the model has no place for"):
        gguf.converted(path)


def test_a_tensor_of_another_size(tmp_path: Path) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf",
        ggufs.model("llama"),
        tensors={"token_embd.weight": torch.ones(260, 32)},
    )
    with pytest.raises(
        WeightsError, match=r"token_embd\.weight holds 8320 numbers, but its metadata asks for 8352"
    ):
        gguf.converted(path)


@pytest.mark.parametrize(
    "key", ["context_length", "attention.head_count", "attention.layer_norm_rms_epsilon"]
)
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"), fields={key: None})
    with pytest.raises(SpecdiffError, match=rf"lacks the metadata key llama\.{key}"):
        gguf.converted(path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf", ggufs.model("llama"), fields={"general.type": "adapter"}
    )
    with pytest.raises(WeightsError, match=r"holds no model: its general\.type is 'adapter'"):
        gguf.converted(path)


# what the file says of its computation

CONTRADICTED: list[tuple[str, str, Any]] = [
    ("llama", "rope.scaling.type", "yarn"),
    ("llama", "rope.scaling.type", "linear"),
    ("llama", "rope.scaling.factor", 4.0),
    ("llama", "rope.scaling.attn_factor", 1.5),
    ("llama", "rope.scaling.yarn_log_multiplier", 0.1),
    ("llama", "rope.scale_linear", 2.0),
    ("llama", "attention.sliding_window", 8),
    ("llama", "attn_logit_softcapping", 50.0),
    ("llama", "final_logit_softcapping", 30.0),
    ("llama", "attention.scale", 0.5),
    ("llama", "attention.key_length", 16),
    ("llama", "attention.causal", False),
    ("llama", "logit_scale", 0.25),
    ("llama", "residual_scale", 0.25),
    ("llama", "expert_count", 8),
    ("llama", "something.new", 1),
    ("llama", "feed_forward_length", [48, 32]),
    ("qwen2", "rope.dimension_count", 4),
    ("qwen2", "rope.scaling.type", "yarn"),
    ("qwen3", "attention.key_length", 64),
    ("phi3", "attention.sliding_window", 16),
    ("phi3", "rope.dimension_count", 6),
    ("gemma2", "attn_logit_softcapping", 20.0),
    ("gemma2", "final_logit_softcapping", 20.0),
    ("gemma3", "rope.scaling.type", "linear"),
    ("gemma3", "rope.freq_base_swa", 20000.0),
    ("gpt2", "rope.freq_base", 10000.0),
]


@pytest.mark.parametrize(("architecture", "key", "value"), CONTRADICTED, ids=lambda v: str(v))
def test_a_key_that_the_model_would_not_obey(
    tmp_path: Path, cache: Path, architecture: str, key: str, value: Any
) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf", ggufs.model(architecture), architecture, fields={key: value}
    )
    with pytest.raises(
        UnsupportedModelError,
        match=rf"model\.gguf: {architecture}\.{key} is .*load the model's safetensors instead",
    ):
        gguf.converted(path)
    assert entries(cache) == []


@pytest.mark.parametrize(
    ("architecture", "key"),
    [("qwen3", "attention.key_length"), ("gemma2", "attention.sliding_window")],
)
def test_a_key_whose_absence_means_another_model(
    tmp_path: Path, architecture: str, key: str
) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf", ggufs.model(architecture), architecture, fields={key: None}
    )
    with pytest.raises(SpecdiffError, match=rf"{architecture}\.{key}"):
        gguf.converted(path)


def test_the_gemmas_of_an_unstated_scale(tmp_path: Path) -> None:
    path = ggufs.write(
        tmp_path / "model.gguf", ggufs.model("gemma2"), "gemma2", fields={"block_count": 46}
    )
    with pytest.raises(
        UnsupportedModelError,
        match="a gemma2 of 46 layers scales attention in a way that GGUF does not state",
    ):
        gguf.converted(path)


@pytest.mark.parametrize("architecture", ["mamba", "qwen2moe", "falcon", "bert"])
def test_an_architecture_that_is_not_served(tmp_path: Path, architecture: str) -> None:
    writer = ggufs.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tensor("token_embd.weight", torch.ones(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModelError,
        match=rf"GGUF architecture '{architecture}' is not served; served are gemma2, .*qwen3",
    ):
        gguf.converted(tmp_path / "model.gguf")


def test_keys_that_change_nothing(tmp_path: Path) -> None:
    fields = {
        "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.finetuned": False,
        "expert_count": 0, "attention.sliding_window": ggufs.LENGTH, "attention.key_length": 8,
        "attention.value_length": 8, "attention.causal": True,
        "attention.scale": 8**-0.5, "rope.scaling.original_context_length": ggufs.LENGTH,
        "general.sampling.temp": 0.7, "tensor_data_layout": "Meta AI original pth",
    }  # fmt: skip
    net = ggufs.model("llama")
    assert torch.equal(
        logits(rebuilt(ggufs.write(tmp_path / "model.gguf", net, fields=fields))), logits(net)
    )


# rotary frequencies scaled as in Llama 3

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0,
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def divisors(
    factor: float = 8.0, low: float = 1.0, high: float = 4.0, length: int = 8192, width: int = 8
) -> torch.Tensor:
    """As llama.cpp's converter computes them."""
    out = []
    for frequency in 500000.0 ** (-torch.arange(0, width, 2) / width):
        wavelength = float(2 * torch.pi / frequency)
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        out.append(
            1.0 if wavelength < length / high else factor if wavelength > length / low else between
        )
    return torch.tensor(out)


def long_llama(rope: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(**ggufs.SIZES | {"max_position_embeddings": 16384}, rope_parameters=rope)
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(12 if parameter.dim() > 1 else 1)
    return net


def test_rotary_scaling_of_llama_3_is_applied(tmp_path: Path) -> None:
    net, plain = long_llama(LLAMA3), long_llama({"rope_type": "default", "rope_theta": 500000.0})
    fields = {"context_length": 16384}
    path = ggufs.write(
        tmp_path / "scaled.gguf", net, fields=fields, tensors={"rope_freqs.weight": divisors()}
    )
    assert 1 < divisors()[2] < 8 == divisors()[3]  # one in between, too
    assert (logits(rebuilt(path)) - logits(net)).abs().max() < 1e-4
    assert (logits(net) - logits(plain)).abs().max() > 1e-2
    path = ggufs.write(tmp_path / "plain.gguf", plain, fields=fields)
    assert torch.equal(logits(rebuilt(path)), logits(plain))


@pytest.mark.parametrize(
    "other",
    [
        divisors(low=2.0),
        divisors(length=4096),
        divisors(width=16),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_other_rotary_scaling_is_refused(tmp_path: Path, other: torch.Tensor) -> None:
    net = long_llama(LLAMA3)
    path = ggufs.write(
        tmp_path / "model.gguf",
        net,
        fields={"context_length": 16384},
        tensors={"rope_freqs.weight": other},
    )
    with pytest.raises(
        UnsupportedModelError, match=r"rotary scaling of rope_freqs\.weight is not that of Llama 3"
    ):
        gguf.converted(path)


# the tokenizer


@pytest.mark.parametrize("kind", [None, "bert", "rwkv"])
def test_a_tokenizer_that_cannot_be_rebuilt(tmp_path: Path, kind: str | None) -> None:
    """Token ids still work; the warning comes with every load, converted or not."""
    net = ggufs.model("llama")
    path = ggufs.write(tmp_path / "model.gguf", net, tokenizer=kind)
    for _ in range(2):
        with pytest.warns(
            UserWarning,
            match=r"text prompts are unavailable.* tokenizer of .*model\.gguf cannot be rebuilt \(",
        ):
            lm = specdiff.load(str(path), "none", device="cpu", dtype="float32")
        assert len(lm.generate([5, 6, 7], max_tokens=3, ignore_eos=True).token_ids) == 3
        with pytest.raises(
            UsageError, match="this model has no tokenizer; give prompts as lists of token ids"
        ):
            lm.generate("hello")


# the cache


def test_a_second_load_takes_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    folder = gguf.converted(path)
    monkeypatch.setattr(gguf, "_convert", lambda *a: pytest.fail("converted again"))
    assert gguf.converted(path) == folder
    assert entries(cache) == [folder]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "complete"])
@pytest.mark.parametrize("left", [None, 0, 40])
def test_a_damaged_cache_entry_is_converted_again(
    tmp_path: Path, name: str, left: int | None
) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    file = gguf.converted(path) / name
    content = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(content[:left])
    assert torch.equal(logits(rebuilt(path)), logits(ggufs.model("llama")))
    assert file.read_bytes() == content


def test_another_file_of_the_same_name_size_and_time(tmp_path: Path) -> None:
    net = ggufs.model("llama")
    path = ggufs.write(tmp_path / "model.gguf", net)
    stat = path.stat()
    first = logits(rebuilt(path))
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(2)
    ggufs.write(path, net)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert torch.equal(logits(rebuilt(path)), logits(net))
    assert not torch.equal(logits(net), first)


def test_two_loads_at_once(tmp_path: Path, cache: Path) -> None:
    """Both convert, and one of the equal results stays."""
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(gguf.converted(path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == entries(cache) * 4


def test_models_are_built_one_at_a_time(tmp_path: Path) -> None:
    """transformers swaps a base-class method while it builds a model; threads could leave it."""
    method = PreTrainedModel.tie_weights
    folder, device = tmp_path / "model", torch.device("cpu")
    ggufs.model("gemma2").save_pretrained(folder)
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda _: load_model(folder, torch.float32, device), range(16)))
    assert PreTrainedModel.tie_weights is method
    for model in models:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    with pytest.warns(
        UserWarning, match="cannot write .*file/specdiff/gguf: Not a directory.*set XDG_CACHE_HOME"
    ) as caught:
        folder = gguf.converted(path)
    assert len(caught) == 1
    # the same one for as long as the process runs, and no second warning
    assert gguf.converted(path) == folder
    assert torch.equal(logits(rebuilt(path)), logits(ggufs.model("llama")))


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        gguf.converted(path)


def test_a_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*model-.*largest file size allowed"):
            gguf.converted(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(cache) == []
    gguf.converted(path)
