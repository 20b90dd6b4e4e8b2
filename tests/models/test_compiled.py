"""Compiled layers: equal to the eager ones, stored on disk, and refused where they are not."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SUPPORTED
from families import model as family_model
from filelock import FileLock
from torch import nn
from transformers import PreTrainedModel

import specdiff
import tiny
from specdiff.compiled import background, store
from specdiff.compiled.compilation import Compilation
from specdiff.compiled.graphs import Graph, Graphs
from specdiff.errors import UsageError
from specdiff.models import packed
from specdiff.models.cache import RaggedCache
from specdiff.targets.causal import CausalTarget

SLOTS = 400
NAMES = ("float32", "packed")


def net(name: str) -> PreTrainedModel:
    """Llama in float32, or in bfloat16 with a layer of each packed form."""
    model = tiny.model("llama")
    if name == "float32":
        return model
    with torch.no_grad():  # attention so sharp that its own rounding changes it in bfloat16
        for parameter in model.get_submodule("model.layers").parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    model = model.bfloat16()
    for layer in model.get_submodule("model.layers"):
        for path, form in (
            ("self_attn.q_proj", "int4"),
            ("self_attn.k_proj", "int8"),
            ("mlp.gate_proj", "int8 in groups"),
        ):
            layer.set_submodule(path, _packed(layer.get_submodule(path).weight, form))
    return model


def _packed(weight: torch.Tensor, form: str) -> nn.Module:
    if form == "int8":
        return packed.Int8Linear(weight)
    groups = packed.Groups.rounded(weight)
    return packed.Int4Linear(groups) if form == "int4" else packed.SplitInt8Linear(groups)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def compiled(model: PreTrainedModel, mode: bool | str = True) -> tuple[CausalTarget, Compilation]:
    """A target with compiled layers, compiled now unless they are on disk."""
    target = CausalTarget(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compilation = target.compile(mode)
    assert compilation is not None
    assert compilation.wait(600), compilation.states
    return target, compilation


class Counted:
    """A loaded layer that counts its runs."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.runs = 0

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.runs += 1
        outputs: list[torch.Tensor] = self.loader.run(inputs)
        return outputs


@pytest.mark.usefixtures("compiled_home")
def test_logits_states_and_cache_equal_the_eager_ones(name: str) -> None:
    """Drafts of every length, half of them rejected, across bounds of the attended slots.

    In bfloat16, compiled layers are no farther from the same weights in float32 than eager ones,
    or hardly.
    """
    target, compilation = compiled(net(name))
    layer = compilation.compiled[1]
    layer.loaders = {count: Counted(loader) for count, loader in layer.loaders.items()}
    models = [CausalTarget(exact(name)).ragged, CausalTarget(net(name)).ragged, target.ragged]
    caches = [RaggedCache(1, SLOTS) for _ in models]
    generator = torch.Generator().manual_seed(2)
    results: list[list[torch.Tensor]] = [[] for _ in models]
    length = 0
    for count in [40, *range(1, 17), 70, *range(16, 0, -1), 17]:
        for _ in range(2):
            ids = torch.randint(tiny.VOCAB, (1, count), generator=generator)
            at = length + torch.arange(count)[None]
            for model, cache, result in zip(models, caches, results, strict=True):
                logits, states = model.forward(cache, ids, at, taps=(0, 1))
                assert states is not None
                result += [logits.float().flatten(), states.float().flatten()]
        length += count
    for cache, result in zip(caches, results, strict=True):
        stores = [*cache.keys.values(), *cache.values.values()]
        result += [store[:, :, :length].float().flatten() for store in stores]
    expected, eager, values = (torch.cat(result) for result in results)
    allowed = max(1.2 * float((eager - expected).norm()), 1e-5 * float(expected.norm()))
    assert float((values - expected).norm()) <= allowed
    assert [layer.loaders[count].runs for count in range(1, 17)] == [4] * 16
    assert all("forward" not in vars(part) for part in compilation.layers)
    target.open(1, SLOTS)  # the hooks that recorded hidden states are no change
    assert compilation.ready == frozenset(range(1, 17))


def exact(name: str) -> PreTrainedModel:
    """The model with plain weights in float32."""
    model = net(name)
    for path, part in [*model.named_modules()]:
        if isinstance(part, packed.PackedLinear) and not path.endswith(("upper", "lower")):
            plain = nn.Linear(part.in_features, part.out_features, bias=False)
            plain.weight = nn.Parameter(part.expanded().clone())
            model.set_submodule(path, plain)
    return model.float()


@pytest.mark.usefixtures("compiled_home")
def test_greedy_text_equals_plain_decoding() -> None:
    model = net("float32")
    target, compilation = compiled(tiny.copy_of(model))
    layer = compilation.compiled[0]
    layer.loaders = {count: Counted(loader) for count, loader in layer.loaders.items()}
    for prompt in tiny.prompts(4):
        text = tiny.plain(model, prompt, 40)
        drafter = tiny.Hinted([text], tiny.VOCAB)
        batch = tiny.batch_of([prompt], 40, temperature=0.0)
        assert tiny.decoded(target, drafter, batch, draft_len=4) == [text]
    assert layer.loaders[5].runs > 10


@pytest.mark.usefixtures("compiled_home")
def test_more_rows_and_the_users_own_calls_are_eager() -> None:
    model = net("float32")
    target, compilation = compiled(tiny.copy_of(model))
    texts = [tiny.plain(model, prompt, 12) for prompt in tiny.prompts(3)]
    for layer in compilation.compiled:
        layer.loaders = {}  # a compiled call would raise
    batch = tiny.batch_of(tiny.prompts(3), 12, temperature=0.0)
    assert tiny.decoded(target, tiny.Hinted(texts, tiny.VOCAB), batch, draft_len=3) == texts
    ids = torch.tensor([texts[0]])
    assert torch.equal(target.model(ids).logits, model(ids).logits)


def test_eager_serves_while_layers_are_compiled_and_each_is_compiled_once(
    compiled_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(net("float32"))
    written = {path: path.stat().st_mtime_ns for path in compiled_home.rglob("*.pt2")}
    target = CausalTarget(net("float32"))
    empty = tmp_path / "empty"
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty))
    # as if another process were compiling the same layers
    (empty / "specdiff").mkdir(parents=True)
    shared = empty / "specdiff" / "compiled"
    shared.mkdir(mode=0o700)
    with FileLock(shared / ".lock"):
        compilation = target.compile(True)
        assert compilation is not None
        assert set(compilation.states.values()) == {"compiling"} and not compilation.ready
        prompt = tiny.prompts(1)[0]
        text = tiny.plain(net("float32"), prompt, 12)
        batch = tiny.batch_of([prompt], 12, temperature=0.0)
        assert tiny.decoded(target, tiny.Hinted([text], tiny.VOCAB), batch) == [text]
        for folder in compiled_home.glob("*/"):
            shutil.copytree(folder, shared / folder.name)
    assert compilation.wait(600), compilation.states
    assert compilation.ready == set(range(1, 17))
    copies = {path: path.stat().st_mtime_ns for path in shared.rglob("*.pt2")}
    assert sorted(copies.values()) == sorted(written.values())


def test_auto_uses_what_is_on_disk_and_compiles_nothing(
    compiled_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(net("float32"))
    _, compilation = compiled(net("float32"), "auto")
    assert compilation.ready == set(range(1, 17))
    other = CausalTarget(tiny.model("llama", positions=200)).compile("auto")
    assert other is not None and not other.ready and other.finished.is_set()
    assert CausalTarget(net("float32")).compile(False) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CausalTarget(net("float32")).compile("auto") is None


@pytest.fixture
def copied(
    compiled_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Path]]:
    """The entries of the float32 model in a cache of their own."""
    _, compilation = compiled(net("float32"))
    folders = [store.entry(compilation.kinds[0].description, p) for p in store.POSITIONS]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder in folders:
        shutil.copytree(folder, store.home() / folder.name)
    yield [store.home() / folder.name for folder in folders]


def truncate(folder: Path) -> None:
    with (folder / store.PACKAGE).open("r+b") as file:
        file.truncate(1000)


def flip(folder: Path) -> None:
    content = bytearray((folder / store.PACKAGE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / store.PACKAGE).write_bytes(content)


def garble(folder: Path) -> None:
    (folder / store.ENTRY).write_text("[]", encoding="utf-8")


@pytest.mark.parametrize("damage", [truncate, flip, garble])
def test_a_damaged_entry_is_removed(copied: list[Path], damage: Any) -> None:
    damage(copied[0])
    compilation = CausalTarget(net("float32")).compile("auto")
    assert compilation is not None
    assert compilation.ready == set(range(2, 17))
    assert [folder.exists() for folder in copied] == [False, True]


def test_machine_code_that_others_could_have_written_is_not_loaded(copied: list[Path]) -> None:
    (copied[1] / store.PACKAGE).chmod(0o666)
    with pytest.warns(UserWarning, match="could have been written by another user"):
        compilation = CausalTarget(net("float32")).compile("auto")
    assert compilation is not None and compilation.ready == {1}


def test_layers_that_differ_are_refused(
    copied: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BUG: the compiled layers of a model with another epsilon are loaded."""
    model = net("float32")
    for module in model.modules():
        if "variance_epsilon" in vars(module):
            module.variance_epsilon = 0.5
    folders = dict(zip(store.POSITIONS, copied, strict=True))
    monkeypatch.setattr(store, "entry", lambda _, positions: folders[positions])
    with pytest.warns(UserWarning, match="differ from the eager ones by") as record:
        compilation = CausalTarget(model).compile("auto")
    assert compilation is not None and not compilation.ready and len(record) == 2


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    target = CausalTarget(net("float32"))
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler 'no-such-compiler'.*stays eager"):
        state = target.compile(True)
    assert state is not None and state.finished.is_set() and not state.wait()
    assert (background.no_compiler() or "-") in state.states["1"]


@pytest.mark.usefixtures("compiled_home")
def test_models_that_stay_eager() -> None:
    neo = CausalTarget(family_model(next(f for f in SUPPORTED if f.name == "GPT-Neo")))
    hooked = CausalTarget(net("float32"))
    hooked.model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: None)
    custom = CausalTarget(net("float32"))
    custom.model.get_submodule("model.layers")[0] = Custom(custom.model)
    reasons = {"changed at every call": neo, "another library": hooked, "no part of": custom}
    for reason, target in reasons.items():
        with pytest.warns(UserWarning, match=f"{reason}.*stays eager"):
            assert target.compile(True) is None
        assert target.ragged.runner is None
        target.compile("auto")  # in silence


class Custom(nn.Module):
    """A layer of the user's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model.get_submodule("model.layers.0")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.usefixtures("compiled_home")
def test_a_changed_model_is_eager_again() -> None:
    target, compilation = compiled(net("float32"))
    target.model.get_submodule("model.layers.1").mlp = nn.Identity()
    with pytest.warns(UserWarning, match="have been changed since"):
        target.open(1, 20)
    assert not compilation.ready
    target.open(1, 20)  # says so once


@pytest.mark.usefixtures("compiled_home")
def test_weights_are_read_at_every_call() -> None:
    target, _ = compiled(net("float32"))
    changed = tiny.model("llama", seed=1)
    target.model.load_state_dict(changed.state_dict())
    prompt = tiny.prompts(1)[0]
    text = tiny.plain(changed, prompt, 20)
    batch = tiny.batch_of([prompt], 20, temperature=0.0)
    assert tiny.decoded(target, tiny.Hinted([text], tiny.VOCAB), batch) == [text]


@pytest.mark.parametrize("value", ["yes", 3, None])
def test_values_of_the_option(value: Any) -> None:
    with pytest.raises(UsageError, match="compile must be True, False or 'auto'") as error:
        specdiff.load(compile=value)
    assert error.value.param == "compile"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graphs_score_as_eager_forwards_do() -> None:
    eager = CausalTarget(net("float32").cuda()).ragged
    target = CausalTarget(net("float32").cuda())
    graphs = target.compile(True)
    assert isinstance(graphs, Graphs)
    caches = RaggedCache(2, SLOTS), RaggedCache(2, SLOTS)
    generator = torch.Generator().manual_seed(2)
    length = 0
    for count in (40, *[1] * 4, *[5] * 4, *[3] * 4, 100, *[5] * 4):
        for _ in range(2):
            ids = torch.randint(tiny.VOCAB, (2, count), generator=generator).cuda()
            at = (length + torch.arange(count)).expand(2, -1).cuda()
            expected, states = eager.forward(caches[0], ids, at, taps=(0, 1))
            logits, own = target.ragged.forward(caches[1], ids, at, taps=(0, 1))
            assert states is not None and own is not None
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own, states, rtol=1e-4, atol=1e-4)
        length += count
    assert sum(isinstance(graph, Graph) for graph in caches[1].graphs.values()) == 4
    assert graphs.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_greedy_text_through_cuda_graphs_equals_plain_decoding() -> None:
    model = net("float32").cuda()
    target = CausalTarget(tiny.copy_of(model))
    target.compile(True)
    prompt = tiny.prompts(1)[0]
    text = tiny.plain(net("float32"), prompt, 40)
    lm = specdiff.SpeculativeLM(target, "ngram", None, 96)
    answer = lm.generate(prompt, max_tokens=40, temperature=0.0, ignore_eos=True)
    assert [*prompt, *answer.token_ids] == text


def test_env_says_what_is_on_disk(copied: list[Path]) -> None:
    size = sum((folder / store.PACKAGE).stat().st_size for folder in copied) / 2**20
    assert store.summary() == f"2 ({size:.0f} MiB) in {copied[0].parent}"
