"""The ragged cache under unmodified Hugging Face models: rows of any length, as a plain forward."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
from specdiff.errors import UnsupportedModelError
from specdiff.models import masks
from specdiff.models.cache import RaggedCache
from specdiff.models.ragged import Forward, RaggedModel, Runner
from specdiff.models.self_test import self_test
from specdiff.targets.causal import CausalTarget
from specdiff.types import Draft, Verification

ATTENTIONS = ("specdiff", "sdpa", "eager")


def ragged(net: PreTrainedModel, attention: str) -> RaggedModel:
    wrapped = RaggedModel(net)
    assert net.config._attn_implementation == "specdiff"  # the default
    net.set_attn_implementation(attention)
    return wrapped


def full(net: PreTrainedModel, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        out = net(ids, use_cache=False, output_hidden_states=True)
    return out.logits, out.hidden_states


def test_scoring_without_taps_leaves_no_hook_on_the_model() -> None:
    net = tiny.model("llama")
    model = RaggedModel(net)
    ids = torch.tensor([[1, 2, 3]])
    model.forward(RaggedCache(1, 8), ids, torch.arange(3)[None])
    assert not any(part._forward_hooks for part in net.modules())
    _, tapped = model.forward(RaggedCache(1, 8), ids, torch.arange(3)[None], taps=(0,))
    assert tapped is not None
    assert any(part._forward_hooks for part in net.modules())  # so the check above sees them


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ragged_scoring_equals_a_full_forward(family: str, attention: str) -> None:
    """Rows admitted one by one, advancing unevenly, rejected drafts, across a bucket's edge."""
    net, total, taps = tiny.model(family), 150, (0, 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(tiny.VOCAB, (4, total), generator=generator)
    want, hidden = full(tiny.copy_of(net), ids)
    features = torch.cat([hidden[t + 1] for t in taps], dim=-1)
    model, cache = ragged(net, attention), RaggedCache(4, total + 8)
    start = torch.tensor([1, 4, 119, 60])
    for row, size in enumerate(start.tolist()):
        model.forward(
            cache, ids[row : row + 1, :size], torch.arange(size)[None], selected=torch.tensor([row])
        )
    for size, advance in [
        (5, (1, 5, 3, 2)),
        (1, (1, 1, 1, 1)),
        (9, (9, 2, 4, 9)),
        (8, (3, 8, 8, 1)),
        (6, (6, 1, 6, 6)),
    ]:
        at = start[:, None] + torch.arange(size)
        wrong = torch.randint(tiny.VOCAB, (4, size), generator=generator)
        model.forward(cache, wrong, at)
        logits, tapped = model.forward(cache, ids.gather(1, at), at, taps=taps)
        rows = torch.arange(4)[:, None]
        torch.testing.assert_close(logits, want[rows, at], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(tapped, features[rows, at], rtol=1e-5, atol=1e-4)
        start = start + torch.tensor(advance)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_roles_view(family: str) -> None:
    """open, admit, score, keep, release: scores 0 and K, features of prompt[:-1], a reused row."""
    target = tiny.target(family)
    plain = tiny.model(family)
    prompts = tiny.prompts(3)
    batch = tiny.batch_of(prompts)
    cache = target.open(3, 40, taps=(1,))
    features = target.admit(
        cache, torch.arange(3), [torch.tensor(p) for p in prompts], torch.zeros(3, dtype=torch.long)
    )
    draft = Draft(torch.randint(tiny.VOCAB, (3, 4), generator=torch.Generator().manual_seed(2)))
    out = target.score(cache, batch, draft)
    for row, prompt in enumerate(prompts):
        logits, hidden = full(plain, torch.tensor([prompt + draft.tokens[row].tolist()]))
        torch.testing.assert_close(
            out.logits[row], logits[0, len(prompt) - 1 :], rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(
            out.features[row], hidden[2][0, len(prompt) - 1 :], rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(
            features[row, : len(prompt) - 1], hidden[2][0, : len(prompt) - 1], rtol=1e-5, atol=1e-4
        )
    nothing = torch.zeros(3, dtype=torch.long)
    target.keep(
        cache,
        batch,
        Verification(nothing, torch.zeros(3, 5, dtype=torch.long), torch.arange(5).expand(3, 5)),
    )
    target.release(cache, torch.tensor([1]))
    joined = [9, 8, 7, 6, 5, 4, 3]
    target.admit(cache, torch.tensor([1]), [torch.tensor(joined)], torch.tensor([0]))
    batch = batch.with_rows(torch.tensor([1]), tiny.batch_of([joined]))
    again = target.score(cache, batch, draft)
    logits, _ = full(plain, torch.tensor([joined + draft.tokens[1].tolist()]))
    torch.testing.assert_close(again.logits[1], logits[0, len(joined) - 1 :], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(again.logits[0], out.logits[0], rtol=1e-5, atol=1e-4)


def test_a_long_prompt_is_admitted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdiff.targets.causal.CHUNK", 5)
    target, prompts = tiny.target("llama"), [list(range(14)), [4, 4], [5]]
    cache = target.open(3, 40, taps=(0,))
    features = target.admit(
        cache, torch.arange(3), [torch.tensor(p) for p in prompts], torch.zeros(3, dtype=torch.long)
    )
    out = target.score(cache, tiny.batch_of(prompts), Draft(torch.zeros(3, 0, dtype=torch.long)))
    for row, prompt in enumerate(prompts):
        logits, hidden = full(tiny.model("llama"), torch.tensor([prompt]))
        torch.testing.assert_close(out.logits[row, 0], logits[0, -1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            features[row, : len(prompt) - 1], hidden[1][0, :-1], rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_continue_from_their_prefixes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row from another position, in chunks; one at the end of its slots, one fully read.

    A neighbor is untouched.
    """
    monkeypatch.setattr("specdiff.targets.causal.CHUNK", 5)
    target, plain = tiny.target(family), tiny.model(family)
    ids = torch.randint(tiny.VOCAB, (4, 40), generator=torch.Generator().manual_seed(4))
    sizes = [31, 24, 9, 12]
    prefix_lengths, rows = torch.tensor([30, 0, 4]), torch.tensor([0, 3, 2])
    cache = target.open(4, 33)
    target.admit(
        cache,
        torch.arange(4),
        [row[:n] for row, n in zip(ids, sizes, strict=True)],
        torch.zeros(4, dtype=torch.long),
    )
    # all rejected
    target.score(
        cache,
        tiny.batch_of([row[:n].tolist() for row, n in zip(ids, sizes, strict=True)]),
        Draft(ids[:, :3]),
    )
    joined = ids.clone()
    joined[0, 30:], joined[3], joined[2, 4:] = 7, 11, 5
    prompts = [joined[row, :n] for row, n in zip(rows, (31, 30, 20), strict=True)]
    target.admit(cache, rows, prompts, prefix_lengths)
    texts = [prompts[0], ids[1, :24], prompts[2], prompts[1]]
    out = target.score(
        cache,
        tiny.batch_of([t.tolist() for t in texts], max_tokens=2),
        Draft(torch.zeros(4, 0, dtype=torch.long)),
    )
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            out.logits[row, 0], full(plain, text[None])[0][0, -1], rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_a_drafter_may_know(family: str) -> None:
    target = tiny.target(family)
    info, net = target.info, target.model
    assert (info.name, info.vocab_size, info.hidden_size, info.layers, info.max_positions) == (
        f"tiny-{family}", tiny.VOCAB, tiny.WIDTH, 2, 256
    )  # fmt: skip
    assert info.dtype == torch.float32
    assert info.embedding.data_ptr() == net.get_input_embeddings().weight.data_ptr()
    assert info.head.data_ptr() == net.get_output_embeddings().weight.data_ptr()
    assert not info.embedding.requires_grad


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("shape", ["masked", "causal", "single"])
def test_grouped_attention_equals_repeated_keys(heads: tuple[int, int], shape: str) -> None:
    (Q, A), N, S, D = heads, 1 if shape == "single" else 5, 5 if shape == "causal" else 9, 8
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, D, generator=generator) for h, n in ((Q, N), (A, S), (A, S)))
    mask = None
    if shape == "masked":
        mask = masks.additive(
            masks.causal(torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]), S), torch.float32
        )
    layer = torch.nn.Identity()
    layer.num_key_value_groups = Q // A  # as every attention layer of transformers names it
    got, weights = masks.grouped_attention(layer, q, k, v, mask, scaling=0.3)
    assert weights is None
    k, v = k.repeat_interleave(Q // A, dim=1), v.repeat_interleave(Q // A, dim=1)
    want = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=shape == "causal", scale=0.3
    )
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=1e-5)


def attended(layer: torch.nn.Module, masked: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """What the target's attention gives, and the stock one, from the same random numbers."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 5, 8, generator=generator) for h in (4, 2, 2))
    mask = (
        masks.additive(masks.causal(torch.arange(5).expand(2, 5), 5), torch.float32)
        if masked
        else None
    )
    outs = []
    for attention in (masks.grouped_attention, sdpa_attention_forward):
        torch.manual_seed(0)
        outs.append(attention(layer, q, k, v, mask, **options)[0])
    return outs[0], outs[1]


def grouped() -> torch.nn.Module:
    layer = torch.nn.Identity()
    layer.num_key_value_groups = 2
    return layer


@pytest.mark.parametrize("masked", [True, False])
def test_dropout_is_obeyed(masked: bool) -> None:
    ours, stock = attended(grouped(), masked, dropout=0.4)
    assert torch.equal(ours, stock)
    assert not torch.allclose(ours, attended(grouped(), masked)[0])


def test_a_position_bias_is_obeyed() -> None:
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    ours, stock = attended(grouped(), position_bias=bias)
    assert torch.equal(ours, stock)
    assert not torch.allclose(ours, attended(grouped())[0])


def test_masks_of_single_heads_are_obeyed() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 5, 8, generator=generator) for h in (4, 2, 2))
    mask = torch.randn(2, 4, 5, 5, generator=generator)
    ours, _ = masks.grouped_attention(grouped(), q, k, v, mask)
    torch.testing.assert_close(ours, sdpa_attention_forward(grouped(), q, k, v, mask)[0])


@pytest.mark.parametrize(
    ("option", "message"),
    [("s_aux", r"sinks \(s_aux\)"), ("sinks", "sinks"), ("softcap", "softcap")],
)
def test_what_attention_cannot_do_is_refused(option: str, message: str) -> None:
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        attended(grouped(), **{option: torch.ones(4)})


def test_options_of_no_consequence_stay_on_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("keys and values are copied")

    monkeypatch.setattr(masks, "sdpa_attention_forward", refuses)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    mask = torch.zeros(2, 1, 5, 9)
    masks.grouped_attention(
        grouped(),
        q,
        k,
        k,
        mask,
        use_cache=True,
        position_ids=torch.arange(5)[None],
        sliding_window=5,
        softcap=None,
    )


def test_a_model_in_training_keeps_its_attention_dropout() -> None:
    """Attaching a target leaves the gradient noise of the user's own training as it was."""
    nets = [
        LlamaForCausalLM(
            LlamaConfig(**{**tiny.model("llama").config.to_dict(), "attention_dropout": 0.5})
        )
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    CausalTarget(nets[1])
    ids, mask = torch.arange(10)[None].expand(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    for attention in (None, mask):
        losses = []
        for net in nets:
            net.train()
            torch.manual_seed(5)
            losses.append(
                [
                    float(net(ids, attention_mask=attention, labels=ids).loss.detach())
                    for _ in range(3)
                ]
            )
        assert losses[0] == losses[1]
        assert len(set(losses[1])) == 3


def test_masks() -> None:
    visible = masks.causal(torch.tensor([[2, 3]]), 5)[0, 0]
    assert visible.long().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    banded = masks.causal(torch.tensor([[2, 3]]), 5, window=2)[0, 0]
    assert banded.long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    floats = masks.additive(visible[None, None], torch.bfloat16)[0, 0]
    assert floats.dtype == torch.bfloat16
    assert floats.isfinite().all()
    assert torch.equal(floats == 0, visible)


class Deaf(LlamaForCausalLM):
    """A Llama that ignores where its tokens stand."""

    def forward(self, *arguments: Any, position_ids: Tensor | None = None, **options: Any) -> Any:
        return super().forward(*arguments, **options)


class Blind(LlamaForCausalLM):
    """A Llama that ignores who may attend whom."""

    def forward(self, *arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        return super().forward(*arguments, **options)


class Forgetful(LlamaForCausalLM):
    """A Llama that never looks into its cache."""

    def forward(
        self, *arguments: Any, past_key_values: Any = None, use_cache: bool = False, **options: Any
    ) -> Any:
        return super().forward(*arguments, use_cache=False, **options)


class Noisy(LlamaForCausalLM):
    """A Llama whose logits are a hundredth off when it uses a cache."""

    def forward(self, *arguments: Any, past_key_values: Any = None, **options: Any) -> Any:
        out = super().forward(*arguments, past_key_values=past_key_values, **options)
        if past_key_values is not None:
            out.logits = out.logits + 0.01 * out.logits.abs().max()
        return out


class Broken(LlamaForCausalLM):
    """A Llama that says NaN when it uses a cache."""

    def forward(self, *arguments: Any, past_key_values: Any = None, **options: Any) -> Any:
        out = super().forward(*arguments, past_key_values=past_key_values, **options)
        if past_key_values is not None:
            out.logits = out.logits * torch.nan
        return out


class Stretched(LlamaForCausalLM):
    """A Llama that counts positions twice as fast once a row is longer than its trained 40."""

    def forward(self, *arguments: Any, position_ids: Tensor | None = None, **options: Any) -> Any:
        if (
            position_ids is not None
            and int(position_ids.max()) >= self.config.original_max_position_embeddings
        ):
            position_ids = position_ids * 2
        return super().forward(*arguments, position_ids=position_ids, **options)


class Sociable(LlamaForCausalLM):
    """A Llama whose logits lean towards those of the batch's other rows."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        out.logits = 0.9 * out.logits + 0.1 * out.logits.mean(0, keepdim=True)
        return out


class Tiring(LlamaForCausalLM):
    """A Llama whose logits fade with every forward pass."""

    passes = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        out.logits = out.logits * 0.99**self.passes
        self.passes += 1
        return out


class Roomy(LlamaForCausalLM):
    """A Llama whose logits shrink with the number of slots, if they are more than 100."""

    def forward(self, *arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        out = super().forward(*arguments, attention_mask=attention_mask, **options)
        if attention_mask is not None and attention_mask.shape[-1] > 100:
            out.logits = out.logits * 0.9
        return out


class Sticky(LlamaForCausalLM):
    """A Llama that serves every stream from the first one's cache."""

    first: Any = None

    def forward(self, *arguments: Any, past_key_values: Any = None, **options: Any) -> Any:
        self.first = past_key_values if self.first is None else self.first
        return super().forward(*arguments, past_key_values=self.first, **options)


@pytest.mark.parametrize("kind", [Stretched, Sociable, Tiring, Roomy])
def test_the_self_test_sees_length_neighbors_time_and_room(kind: type[PreTrainedModel]) -> None:
    net = kind(tiny.model("llama").config)
    net.config.original_max_position_embeddings = 40
    net.load_state_dict(tiny.model("llama").state_dict())
    with pytest.raises(UnsupportedModelError, match=r"self-test: .* differs from a plain forward"):
        CausalTarget(net)


def test_the_self_test_sees_one_cache_under_two_streams() -> None:
    net = Sticky(tiny.model("llama").config)
    net.load_state_dict(tiny.model("llama").state_dict())
    with pytest.raises(UnsupportedModelError, match="self-test"):
        CausalTarget(net)


def test_the_self_test_compares_with_the_untouched_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is wrong everywhere alike is compared with the model's own."""
    from transformers import AttentionInterface

    def halved(*arguments: Any, **options: Any) -> Any:
        out, weights = masks.grouped_attention(*arguments, **options)
        return out / 2, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, masks.ATTENTION, halved)
    with pytest.raises(UnsupportedModelError, match=r"self-test: .* differs from a plain forward"):
        CausalTarget(tiny.model("llama"))


@pytest.mark.parametrize("kind", [Deaf, Blind, Noisy, Broken])
def test_a_sabotaged_model_fails_the_self_test(kind: type[PreTrainedModel]) -> None:
    net = kind(tiny.model("llama").config)
    net.load_state_dict(tiny.model("llama").state_dict())
    with pytest.raises(UnsupportedModelError) as caught:
        CausalTarget(net)
    message = str(caught.value)
    pattern = r"llama model fails the self-test: .* differs from a plain forward by (\S+) of its"
    match = re.search(rf"{pattern} largest logit", message)
    assert match, message
    error = float(match.group(1))
    assert error != error if kind is Broken else error > 5e-3
    assert "allowed 1e-03 in torch.float32" in str(caught.value)


def test_a_model_without_the_cache_fails_the_self_test() -> None:
    net = Forgetful(tiny.model("llama").config)
    net.load_state_dict(tiny.model("llama").state_dict())
    with pytest.raises(UnsupportedModelError, match="self-test"):
        CausalTarget(net)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_self_test_passes_sound_models_closely(family: str) -> None:
    for attention in ATTENTIONS:
        assert self_test(ragged(tiny.model(family), attention)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_self_test(dtype: torch.dtype) -> None:
    target = CausalTarget(tiny.model("llama").to(dtype))
    assert target.info.dtype == dtype


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_model_still_generates_on_its_own(family: str) -> None:
    """A target's model stays the user's own: padded batches and plain generate are unchanged."""
    net = tiny.model(family)
    ids = torch.tensor([[0, 0, 0, 5, 9], [3, 1, 4, 1, 5]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    options: dict[str, Any] = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 8,
        "pad_token_id": 0,
    }
    before = net.generate(ids, **options)
    CausalTarget(net)
    assert torch.equal(net.generate(ids, **options), before)


def test_a_position_is_measured_over_as_many_slots_as_a_compiled_layer_takes() -> None:
    bounds: list[int] = []

    class Watched(Runner):
        def run(self, cache: RaggedCache, forward: Forward) -> Any:
            bounds.append(cache.bound)
            return ragged.eager(cache, forward)

        def refresh(self) -> None: ...

    target = CausalTarget(tiny.model("llama"))
    size = target.position_bytes
    ragged = target.ragged
    ragged.runner = Watched()
    del target.position_bytes
    assert target.position_bytes == size and bounds == [2]
