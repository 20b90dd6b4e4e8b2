"""Model families: exact in logits and greedy text, beyond the window; or refused with a reason."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    ALPHA,
    LONG,
    REFUSED,
    REFUSED_ROPES,
    ROPES,
    SUPPORTED,
    TRAINED,
    VOCAB,
    WINDOW,
    Family,
    Rope,
    model,
    page,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from specdiff.errors import UnsupportedModelError
from specdiff.models import masks
from specdiff.models.cache import RaggedCache
from specdiff.models.refusals import SERVED_ROPE, refuse
from specdiff.models.self_test import LENGTH, self_test
from specdiff.targets.causal import CausalTarget

NEW = 16
SLIDING = [family for family in SUPPORTED if family.window is not None]
each = pytest.mark.parametrize("family", SUPPORTED, ids=lambda f: f.name)
sliding = pytest.mark.parametrize("family", SLIDING, ids=lambda f: f.name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@each
def test_a_supported_family_is_exact(family: Family) -> None:
    """Several windows of text, rows of different length, a rejection in nearly every round."""
    plain = model(family)
    target = CausalTarget(tiny.copy_of(plain))
    assert target.ragged.masks.window == family.window
    prompts = [p * 2 for p in tiny.prompts(2, VOCAB)] + [
        torch.randint(VOCAB, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    ]
    assert max(map(len, prompts)) > 3 * WINDOW
    texts = [tiny.plain(plain, prompt, NEW) for prompt in prompts]
    assert logits_error(target, plain, torch.tensor([text[:NEW] for text in texts])) < 1e-4
    batch = tiny.batch_of(prompts, NEW, temperature=0.0)
    assert tiny.decoded(target, tiny.Hinted(texts, VOCAB, flaw=5), batch, draft_len=4) == texts


@pytest.mark.parametrize(
    "family",
    [f for f in SUPPORTED if f.name in ("GPT-Neo", "OPT", "Mistral")],
    ids=lambda f: f.name,
)
def test_up_to_the_last_position(family: Family) -> None:
    """Drafts past the last position, where GPT-Neo's own band and the position tables end."""
    plain = model(family)
    target = CausalTarget(tiny.copy_of(plain))
    prompt = torch.randint(
        VOCAB, (target.info.max_positions - NEW,), generator=torch.Generator().manual_seed(7)
    ).tolist()
    texts = [tiny.plain(plain, p, NEW) for p in (prompt, prompt[:-5])]
    batch = tiny.batch_of([prompt, prompt[:-5]], NEW, temperature=0.0)
    assert tiny.decoded(target, tiny.Hinted(texts, VOCAB, flaw=4), batch, draft_len=16) == texts
    assert len(texts[0]) == target.info.max_positions


@torch.inference_mode()
def logits_error(target: CausalTarget, plain: PreTrainedModel, ids: torch.Tensor) -> float:
    """The largest difference of any logit after rejected drafts, rows advancing unevenly."""
    want = plain(ids, use_cache=False).logits
    cache, start, worst = RaggedCache(len(ids), ids.shape[1] + 8), torch.tensor([1, 4, 7]), 0.0
    for row, size in enumerate(start.tolist()):
        target.ragged.forward(
            cache, ids[row : row + 1, :size], torch.arange(size)[None], selected=torch.tensor([row])
        )
    for advance in ([2, 4, 3], [4, 1, 2], [4, 3, 0]):
        at = start[:, None] + torch.arange(4)
        target.ragged.forward(cache, (ids.gather(1, at) + 1) % VOCAB, at)
        got, _ = target.ragged.forward(cache, ids.gather(1, at), at)
        worst = max(worst, float((got - want[torch.arange(3)[:, None], at]).abs().max()))
        start = start + torch.tensor(advance)
    return worst


@pytest.mark.filterwarnings("ignore::UserWarning")
@sliding
def test_the_model_stays_the_users_own(family: Family) -> None:
    plain = model(family)
    text = tiny.plain(plain, [3, 1, 4], NEW)
    CausalTarget(plain)
    assert tiny.plain(plain, [3, 1, 4], NEW) == text


def wide(family: Family) -> PreTrainedModel:
    """With a window no self-test can reach the end of, as real models have."""
    config = family.config()
    field = "window_size" if config.model_type == "gpt_neo" else "sliding_window"
    setattr(config, field, 4 * LENGTH)
    auto: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    net: PreTrainedModel = auto.from_config(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return net.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@sliding
def test_the_self_test_sees_a_wrong_window_of_any_size(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = CausalTarget(wide(family))
    assert target.error < 1e-5
    assert target.ragged.masks.window == 4 * LENGTH  # the narrow one is gone again
    for wrong in (lambda window: None, lambda window: window + 1, lambda window: window - 1):
        with monkeypatch.context() as patch:
            right = masks.causal
            patch.setattr(
                masks,
                "causal",
                lambda at, n, w=None, f=wrong, r=right: r(at, n, w if w is None else f(w)),
            )
            with pytest.raises(UnsupportedModelError, match="self-test"):
                self_test(target.ragged)


def test_the_self_test_sees_windows_in_the_wrong_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(f for f in SLIDING if f.name == "Gemma 3")
    target = CausalTarget(wide(family))
    builder = target.ragged.masks
    real = builder.applied

    def turned(*arguments: Any) -> AbstractContextManager[Any]:
        context = real(*arguments)

        class Swapped:
            def __enter__(self) -> Any:
                mask = context.__enter__()
                return {
                    "full_attention": mask["sliding_attention"],
                    "sliding_attention": mask["full_attention"],
                }

            def __exit__(self, *error: Any) -> Any:
                return context.__exit__(*error)

        return Swapped()

    monkeypatch.setattr(builder, "applied", turned)
    with pytest.raises(UnsupportedModelError, match="self-test"):
        self_test(target.ragged)


@pytest.mark.parametrize(
    ("family", "why"), REFUSED, ids=lambda x: x.name if isinstance(x, Family) else ""
)
def test_a_family_that_cannot_be_exact_is_refused(family: Family, why: str) -> None:
    config = family.config()
    with pytest.raises(
        UnsupportedModelError,
        match=rf"a {config.model_type} target cannot be scored exactly.*{why}.*supported-models",
    ):
        refuse(config)


ropes = pytest.mark.parametrize("rope", ROPES, ids=lambda r: r.type)
refused_ropes = pytest.mark.parametrize("rope", REFUSED_ROPES, ids=lambda r: r.type)


@ropes
def test_a_served_rope_type_is_exact(rope: Rope) -> None:
    """Rows on both sides of the positions the model was first trained for, and across them."""
    plain = model(rope)
    target = CausalTarget(tiny.copy_of(plain))
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(VOCAB, (n,), generator=generator).tolist()
        for n in (3, TRAINED - 6, TRAINED + 20)
    ]
    texts = [tiny.plain(plain, prompt, NEW) for prompt in prompts]
    ids = torch.randint(VOCAB, (3, 2 * TRAINED), generator=generator)
    assert logits_error(target, plain, ids) < 1e-4
    batch = tiny.batch_of(prompts, NEW, temperature=0.0)
    assert tiny.decoded(target, tiny.Hinted(texts, VOCAB, flaw=5), batch, draft_len=4) == texts


@refused_ropes
def test_a_rope_type_that_follows_the_length_is_refused(rope: Rope) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=rf"rotary embeddings of type {rope.type}, .*served are {', '.join(SERVED_ROPE)}",
    ):
        CausalTarget(model(rope))


@refused_ropes
def test_the_self_test_sees_frequencies_that_follow_the_length(
    rope: Rope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at the config, with thousands of positions before anything changes."""
    monkeypatch.setattr("specdiff.models.ragged.refuse", lambda config: None)
    far = rope.config()
    far.max_position_embeddings = 131072
    if rope.type == "longrope":
        far.original_max_position_embeddings = far.rope_parameters[
            "original_max_position_embeddings"
        ] = 4096
    for config in (rope.config(), far):
        with pytest.raises(
            UnsupportedModelError, match=r"self-test.* differs from a plain forward"
        ):
            CausalTarget(model(Rope(rope.type, "", lambda config=config: config)))


def test_every_rope_type_of_transformers_is_in_the_table() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    served, refused = {r.type for r in ROPES}, {r.type for r in REFUSED_ROPES}
    assert served == set(SERVED_ROPE)
    assert served | refused == {"default", *ROPE_INIT_FUNCTIONS}


def test_rope_types_wherever_a_config_names_them() -> None:
    """In its text part, in one layer type, under the old name; and what no one knows."""
    from transformers import AutoConfig, Gemma3Config

    layers = {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": LONG,
    }
    kinds = [
        ("longrope", AutoConfig.for_model("gemma3_text", rope_parameters=nested, **layers)),
        ("longrope", Gemma3Config(text_config={"rope_parameters": nested, **layers})),
        ("dynamic", AutoConfig.for_model("llama", rope_scaling={"type": "dynamic", "factor": 2.0})),
        (
            "dynamic",
            AutoConfig.for_model(
                "hunyuan_v1_dense", rope_parameters={k: v for k, v in ALPHA.items() if k != "alpha"}
            ),
        ),
        ("dynamic", AutoConfig.for_model("llama", rope_parameters=ALPHA)),
        (
            "spiral",
            AutoConfig.for_model(
                "llama", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}
            ),
        ),
    ]
    for name, config in kinds:
        with pytest.raises(UnsupportedModelError, match=f"rotary embeddings of type {name},"):
            refuse(config)
    refuse(AutoConfig.for_model("gemma3_text", **layers))
    refuse(AutoConfig.for_model("hunyuan_v1_dense", rope_parameters=ALPHA))


def test_an_encoder_fails_the_self_test() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    net = BertLMHeadModel(BertConfig(**sizes))
    for parameter in net.parameters():
        parameter.data *= 10  # as it is built, its tokens hardly look at each other
    with pytest.raises(UnsupportedModelError, match="bert model fails the self-test"):
        CausalTarget(net)


def test_the_table_in_the_docs_is_this_list() -> None:
    written = Path(__file__).parents[2] / "docs" / "supported-models.md"
    assert written.read_text() == page(), (
        "write it anew: python tests/models/families.py > docs/supported-models.md"
    )
