"""Targets follow changes of their model: its window, layers, RoPE, attention and weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SUPPORTED, VOCAB, model
from transformers import PreTrainedModel

import specdiff
import tiny
from specdiff.drafters.autoregressive import AutoregressiveDrafter
from specdiff.errors import UnsupportedModelError
from specdiff.hf.custom_generate import CACHED_DRAFTERS
from specdiff.nn.small_lm import SmallLM
from specdiff.targets.causal import CausalTarget, attached

NEW = 14


def family(name: str) -> PreTrainedModel:
    return model(next(f for f in SUPPORTED if f.name == name))


def ours(net: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    defaults = {
        "custom_generate": specdiff.custom_generate,
        "trust_remote_code": True,
        "drafter": "ngram",
    }
    return tiny.plain(net, prompt, NEW, **(defaults | options))


def narrow(net: PreTrainedModel) -> None:
    net.config.sliding_window = 2


def widen(net: PreTrainedModel) -> None:
    net.config.sliding_window = 11


def turn_layers(net: PreTrainedModel) -> None:
    net.config.layer_types = net.config.layer_types[::-1]


def slow_rope(net: PreTrainedModel) -> None:
    for name, buffer in net.model.rotary_emb.named_buffers():
        buffer.mul_(0.3 if "inv_freq" in name else 1)


def new_rope(net: PreTrainedModel) -> None:
    """Another rotary embedding in the place of the old."""
    config = type(net.config)(**net.config.to_dict())
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 5.0}
    net.model.rotary_emb = type(net.model.rotary_emb)(config)


def step(net: PreTrainedModel) -> None:
    """In place, as an optimizer does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)


def replace_head(net: PreTrainedModel) -> None:
    torch.manual_seed(4)
    net.lm_head = torch.nn.Linear(net.lm_head.in_features, net.lm_head.out_features, bias=False)


def data(net: PreTrainedModel) -> None:
    """New tensors in the old parameters."""
    for parameter in net.parameters():
        parameter.data = parameter.data.flip(0).clone()


CHANGES: list[tuple[str, Callable[[PreTrainedModel], None]]] = [
    ("Mistral", narrow),
    ("Mistral", widen),
    ("Gemma 3", narrow),
    ("Ministral", turn_layers),
    ("Llama, SmolLM2", slow_rope),
    ("Llama, SmolLM2", new_rope),
    ("Llama, SmolLM2", step),
    ("Llama, SmolLM2", replace_head),
    ("Llama, SmolLM2", data),
]


@pytest.mark.parametrize(
    ("name", "change"), CHANGES, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_a_model_changed_after_its_first_use(
    name: str, change: Callable[[PreTrainedModel], None]
) -> None:
    net = family(name)
    prompts = [
        torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (3, 17, 30)
    ]
    before = [ours(net, prompt) for prompt in prompts]
    first = attached(net)
    change(net)
    texts = [tiny.plain(net, prompt, NEW) for prompt in prompts]
    assert texts != before
    assert [ours(net, prompt) for prompt in prompts] == texts
    assert attached(net) is not first
    assert attached(net) is attached(net)
    embedding, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
    assert attached(net).info.embedding.data_ptr() == embedding.data_ptr()
    assert attached(net).info.head.data_ptr() == head.data_ptr()


def test_a_window_that_changes_under_a_loaded_target() -> None:
    """Masks follow the config as the model itself does, whichever door is used."""
    net = family("Mistral")
    lm = specdiff.SpeculativeLM(CausalTarget(net), "ngram", None, 96)
    options: dict[str, Any] = {"max_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
    prompt = torch.randint(VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    before = lm.generate(prompt, **options).token_ids
    narrow(net)
    assert list(lm.generate(prompt, **options).token_ids) == tiny.plain(net, prompt, NEW)[30:]
    assert lm.generate(prompt, **options).token_ids != before


def test_gpt_neo_keeps_the_window_it_was_built_with() -> None:
    """Its bands are made once: a later change of the config changes neither the model nor this."""
    net = family("GPT-Neo")
    prompt = torch.randint(VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    text = tiny.plain(net, prompt, NEW)
    net.config.window_size = 2
    assert tiny.plain(net, prompt, NEW) == text
    assert ours(net, prompt) == text


def test_a_rope_that_cannot_be_served_any_more() -> None:
    """In the config it is refused by name; in the module alone, by the self-test."""
    net = family("Llama, SmolLM2")
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ours(net, [3, 1, 4])
    config = type(net.config)(**{**net.config.to_dict(), "rope_parameters": parameters})
    net.model.rotary_emb = type(net.model.rotary_emb)(config)
    with pytest.raises(UnsupportedModelError, match="self-test"):
        ours(net, [3, 1, 4])
    net.config.rope_parameters = parameters
    with pytest.raises(UnsupportedModelError, match="rotary embeddings of type dynamic"):
        ours(net, [3, 1, 4])


@pytest.mark.parametrize(
    "name", ["Llama, SmolLM2", "GPT-Neo", "GPT-2", "Gemma 3", "Mixtral", "DeepSeek-V3"]
)
def test_an_unchanged_model_is_tested_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = family(name)
    ours(net, [3, 1, 4])
    target = attached(net)

    def refuses(*arguments: Any) -> Any:
        raise AssertionError("tested again")

    monkeypatch.setattr("specdiff.targets.causal.self_test", refuses)
    tiny.plain(net, [3, 1, 4], NEW)
    net.train()
    net.eval()
    ours(net, [1, 5, 9])
    assert attached(net) is target


def test_the_attention_may_change() -> None:
    net = family("Llama, SmolLM2")
    text = ours(net, [3, 1, 4])
    first = attached(net)
    net.set_attn_implementation("eager")
    assert attached(net) is not first
    assert net.config._attn_implementation == "eager"
    assert ours(net, [3, 1, 4]) == text


@pytest.mark.parametrize("change", [step, data])
def test_a_borrowing_drafter_follows_its_target(
    change: Callable[[PreTrainedModel], None], tmp_path: Path
) -> None:
    """A drafter of a folder uses the tables as they are now, also a draft vocabulary's rows."""
    net = family("Llama, SmolLM2")
    config = type(net.config)(
        **{**net.config.to_dict(), "borrow_embeddings": True, "draft_vocab_size": 20}
    )
    small = SmallLM(config)
    small.draft_vocab.copy_(torch.arange(20) * 2)
    small.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours(net, [3, 1, 4], drafter=str(tmp_path))
        change(net)
        text = tiny.plain(net, [3, 1, 4], NEW)
        assert ours(net, [3, 1, 4], drafter=str(tmp_path)) == text
    (drafter,) = CACHED_DRAFTERS[attached(net)].values()
    assert isinstance(drafter, AutoregressiveDrafter)
    assert torch.equal(
        drafter.model.net.get_input_embeddings().weight, net.get_input_embeddings().weight
    )
    assert torch.equal(
        drafter.model.net.get_output_embeddings().weight,
        net.get_output_embeddings().weight[::2][:20],
    )
