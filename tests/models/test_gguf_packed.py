"""A GGUF file computed as it is: the model that its expansion to float32 is, up to bfloat16."""

from pathlib import Path
from typing import Any

import ggufs
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import specdiff
from specdiff.errors import WeightsError
from specdiff.models import gguf, packed
from specdiff.models.gguf_packed import load_packed

IDS = torch.randint(3, ggufs.VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))
FORMS = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8 in groups"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specdiff" / "gguf"


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies bfloat16, whatever this one is."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def written(path: Path, architecture: str, kind: str) -> Path:
    return ggufs.write(path, ggufs.model(architecture), architecture, kind=kind)


def loaded(path: Path) -> PreTrainedModel:
    result = load_packed(path, {})
    assert result is not None
    return result[0]


def expanded(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    folder = gguf.converted(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    out: torch.Tensor = model(IDS, attention_mask=torch.ones_like(IDS)).logits.float()
    return out


@pytest.mark.filterwarnings("ignore:.*expanded to bfloat16:UserWarning")
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("architecture", ggufs.MODELS)
def test_every_weight_is_the_files(tmp_path: Path, architecture: str, kind: str) -> None:
    """Packed matrices are those that transformers expands, in its order of rows, within three
    roundings (each 2^-8 of the largest weight of a group); all other tensors are equal."""
    path = written(tmp_path / "model.gguf", architecture, kind)
    model = loaded(path)
    exact = expanded(path, torch.float32)
    half = expanded(path, torch.bfloat16)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, packed.PackedLinear) and not name.endswith((".upper", ".lower"))
    }
    assert len(layers) >= (5 if architecture in ("gpt2", "phi3") else 9)
    assert {layer.format for layer in layers.values()} == {FORMS[kind]}
    for name, layer in layers.items():
        plain: Any = exact.get_submodule(name)
        weight = plain.weight.t() if type(plain) is Conv1D else plain.weight
        groups = weight.reshape(len(weight), -1, packed.GROUP)
        bound = groups.abs().amax(-1).repeat_interleave(packed.GROUP, 1) * 3 * 2**-8
        assert ((layer.expanded().float() - weight).abs() <= bound).all(), name
        if plain.bias is not None:
            assert layer.bias is not None
            assert torch.equal(layer.bias, plain.bias.bfloat16()), name
    others = dict(model.named_parameters())
    assert others.keys() <= dict(half.named_parameters()).keys()
    for name, tensor in others.items():
        assert torch.equal(tensor, half.get_parameter(name)), name
    for name, buffer in half.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.filterwarnings("ignore:.*expanded to bfloat16:UserWarning")
@pytest.mark.parametrize("architecture", ggufs.MODELS)
def test_logits_are_near_those_of_the_expanded_model(tmp_path: Path, architecture: str) -> None:
    path = written(tmp_path / "model.gguf", architecture, "Q8_0")
    exact = logits(expanded(path, torch.float32))
    half = (logits(expanded(path, torch.bfloat16)) - exact).norm() / exact.norm()
    # as far from float32 as bfloat16 is
    assert (logits(loaded(path)) - exact).norm() / exact.norm() < 2 * half + 0.01


@pytest.mark.filterwarnings("ignore:.*expanded to bfloat16:UserWarning")
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_configs_and_defaults_are_those_of_the_expanded_model(
    tmp_path: Path, architecture: str
) -> None:
    path = written(tmp_path / "model.gguf", architecture, "Q4_1")
    model = loaded(path)
    half = expanded(path, torch.bfloat16)
    own = model.config.to_dict()
    other = half.config.to_dict()
    for name in ("_name_or_path", "architectures"):
        own.pop(name, None)
        other.pop(name, None)
    assert own == other
    assert model.generation_config.to_dict() == half.generation_config.to_dict()
    assert not model.training


def test_tied_tables(tmp_path: Path) -> None:
    model = ggufs.model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    path = ggufs.write(tmp_path / "tied.gguf", model, kind="Q8_0")
    with pytest.warns(UserWarning, match=r"2 more|down_proj"):
        lm = specdiff.load(path, "none", device="cpu")
    info = lm.target.info
    assert info.embedding is not None and info.head is not None
    assert info.head.data_ptr() == info.embedding.data_ptr()
    table = expanded(path, torch.bfloat16).get_input_embeddings().weight
    assert torch.equal(info.embedding, table)
    assert packed.formats(lm.target.model) == "13 int8 in groups"


def test_a_matrix_without_a_kernel_is_expanded_and_named(tmp_path: Path) -> None:
    """The down projections have rows of 48."""
    path = written(tmp_path / "model.gguf", "llama", "Q4_1")
    with pytest.warns(
        UserWarning,
        match=r"model\.gguf: model\.layers\.0\.mlp\.down_proj\.weight, .* are expanded to "
        r"bfloat16, as no kernel computes F32 as it is",
    ):
        model = loaded(path)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear


# which files, and when


def test_only_the_header_is_cached(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "model.gguf", "qwen3", "Q4_1")
    with pytest.warns(UserWarning, match="expanded to bfloat16"):
        specdiff.load(path, "ngram", device="cpu")
    (folder,) = (entry for entry in cache.glob("*") if entry.is_dir())
    assert folder.name.endswith("-header")
    assert not [*folder.glob("*.safetensors")]
    with pytest.warns(UserWarning, match="expanded to bfloat16"):
        specdiff.load(path, "none", device="cpu").generate("aa", max_tokens=2)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"quantize": "none"}, {"model_options": {"device_map": "cpu"}}],
)
def test_an_explicit_choice_expands_it(tmp_path: Path, options: dict[str, Any]) -> None:
    path = written(tmp_path / "model.gguf", "llama", "Q4_1")
    lm = specdiff.load(path, "none", **options)
    assert packed.formats(lm.target.model) == ""


def test_a_cpu_without_bfloat16_expands_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    path = written(tmp_path / "model.gguf", "llama", "Q4_1")
    lm = specdiff.load(path, "none", device="cpu")
    assert packed.formats(lm.target.model) == ""
    assert lm.target.info.dtype == torch.float32


def test_a_file_of_plain_floats_is_loaded_as_ever(tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "model.gguf", ggufs.model("llama"))
    assert load_packed(path, {}) is None
    assert packed.formats(specdiff.load(path, "none", device="cpu").target.model) == ""


def test_weights_rounded_again(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "llama", "Q8_0")
    lm = specdiff.load(path, "none", device="cpu", quantize="int8")
    assert packed.formats(lm.target.model) == "9 int8"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*expanded to bfloat16:UserWarning")
def test_greedy_text_is_plain_decodings(tmp_path: Path, architecture: str) -> None:
    path = written(tmp_path / "model.gguf", architecture, "Q4_1")
    prompt = IDS[0, :9].tolist()
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    plain = specdiff.load(path, "none", device="cpu").generate(prompt, **greedy)
    drafted = specdiff.load(path, "ngram", device="cpu").generate(prompt, draft_len=4, **greedy)
    assert drafted.token_ids == plain.token_ids


def test_a_file_cut_off_within_a_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "llama", "Q4_1")
    folder = gguf.described(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    from specdiff.models.gguf_packed import Tensors

    tensors = Tensors(path, folder)
    last = max(tensors.places, key=lambda name: tensors.places[name].offset)
    with pytest.raises(WeightsError, match=r"model\.gguf ends within the tensor of"):
        tensors.expanded(last)
    with pytest.raises(WeightsError, match=r"model\.gguf cannot be read as GGUF"):
        load_packed(path, {})


@pytest.mark.real
def test_the_packaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    lm = specdiff.load("smollm2-135m", "none", device="cpu")
    half = specdiff.load("smollm2-135m", "none", device="cpu", dtype="bfloat16")
    exact = specdiff.load("smollm2-135m", "none", device="cpu", dtype="float32")
    assert packed.formats(lm.target.model) == "210 int4, 1 int8 in groups"
    ids = torch.tensor([lm.encode("The capital of France is Paris, and that of Italy is Rome.")])
    with torch.inference_mode():
        chances = [m.target.model(ids).logits.float().log_softmax(-1) for m in (exact, lm, half)]
    distances = [
        float((chances[0].exp() * (chances[0] - other)).sum(-1).mean()) for other in chances[1:]
    ]
    assert distances[0] < 5 * distances[1] + 1e-3  # nats a token, packed and bfloat16
    answer = lm.generate("What is the capital of France?", temperature=0, max_tokens=24)
    assert "Paris" in answer.text
