"""The SEDD network against a second, slow implementation written from its description alone."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from specdiff.errors import ConfigError
from specdiff.models.cache import RaggedCache
from specdiff.nn.ddit import SEDD, SEDDConfig

SMALL = {"hidden_size": 768, "n_blocks": 12, "n_heads": 12, "cond_dim": 128}
MEDIUM = {"hidden_size": 1024, "n_blocks": 24, "n_heads": 16, "cond_dim": 128}


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return weight * (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()


def turn(vector: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head's vector at one position, pair by pair (i, i + d/2)."""
    d, out = len(vector), vector.clone()
    for i in range(d // 2):
        angle = position * 1e4 ** (-2 * i / d)
        a, b = vector[i], vector[i + d // 2]
        out[i], out[i + d // 2] = (
            a * math.cos(angle) - b * math.sin(angle),
            b * math.cos(angle) + a * math.sin(angle),
        )
    return out


def conditioning(s: dict[str, Tensor], sigma: float) -> Tensor:
    frequencies = [math.exp(-math.log(1e4) * k / 128) for k in range(128)]
    features = torch.tensor(
        [math.cos(sigma * f) for f in frequencies] + [math.sin(sigma * f) for f in frequencies],
        dtype=torch.float64,
    )
    inner = silu(s["sigma_map.mlp.0.weight"] @ features + s["sigma_map.mlp.0.bias"])
    return silu(s["sigma_map.mlp.2.weight"] @ inner + s["sigma_map.mlp.2.bias"])


def attention(s: dict[str, Tensor], name: str, h: Tensor, heads: int) -> Tensor:
    length, width = h.shape
    d = width // heads
    qkv = h @ s[name + "attn_qkv.weight"].T
    out = torch.zeros_like(h)
    for a in range(heads):
        q, k, v = (qkv[:, part * width + a * d : part * width + (a + 1) * d] for part in range(3))
        q = torch.stack([turn(q[i], i) for i in range(length)])
        k = torch.stack([turn(k[i], i) for i in range(length)])
        weight = (q @ k.T / math.sqrt(d)).exp()
        out[:, a * d : (a + 1) * d] = weight / weight.sum(-1, keepdim=True) @ v
    return out @ s[name + "attn_out.weight"].T


def reference(
    state: dict[str, Tensor],
    ids: list[int],
    sigma: float,
    *,
    blocks: int,
    heads: int,
    scale_by_sigma: bool,
) -> Tensor:
    """The log-score [L, V] of one row, in float64."""
    s = {key: value.double() for key, value in state.items()}
    c = conditioning(s, sigma)
    x = s["vocab_embed.embedding"][ids]
    for i in range(blocks):
        name = f"blocks.{i}."
        modulation = s[name + "adaLN_modulation.weight"] @ c + s[name + "adaLN_modulation.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
        h = norm(x, s[name + "norm1.weight"]) * (1 + scale1) + shift1
        x = x + gate1 * attention(s, name, h, heads)
        h = norm(x, s[name + "norm2.weight"]) * (1 + scale2) + shift2
        h = gelu(h @ s[name + "mlp.0.weight"].T + s[name + "mlp.0.bias"])
        x = x + gate2 * (h @ s[name + "mlp.2.weight"].T + s[name + "mlp.2.bias"])
    shift, scale = (
        s["output_layer.adaLN_modulation.weight"] @ c + s["output_layer.adaLN_modulation.bias"]
    ).chunk(2)
    h = norm(x, s["output_layer.norm_final.weight"]) * (1 + scale) + shift
    y = h @ s["output_layer.linear.weight"].T + s["output_layer.linear.bias"]
    if scale_by_sigma:
        y = y - math.log(math.expm1(sigma)) - math.log(y.shape[1] - 1)
    y[range(len(ids)), ids] = 0
    return y


@pytest.mark.parametrize("process", ["absorb", "uniform"])
def test_agrees_with_the_reference(process: str) -> None:
    absorb = process == "absorb"
    config = tiny.sedd_config(tokens=23, process=process, scale_by_sigma=absorb)
    network = tiny.sedd(config)
    assert config.vocab_size == 23 + absorb
    ids = torch.randint(config.vocab_size, (4, 11), generator=torch.Generator().manual_seed(1))
    if absorb:
        ids[:, ::3] = config.mask_id
    # both sides of expm1's 0.5; the last is t = 1
    sigma = torch.tensor([1e-3, 0.3, 2.0, -math.log(1e-3)])
    with torch.no_grad():
        got = network(ids, sigma)
    assert got.dtype == torch.float32
    for row in range(4):
        want = reference(
            dict(network.state_dict()),
            ids[row].tolist(),
            sigma[row].item(),
            blocks=2,
            heads=4,
            scale_by_sigma=absorb,
        )
        assert want.std() > 0.3  # not a network that says nothing
        torch.testing.assert_close(got[row].double(), want, rtol=0, atol=1e-4)


def test_every_parameter_matters() -> None:
    """The comparison above would miss a parameter without effect: changing each has one."""
    network = tiny.sedd(tiny.sedd_config(tokens=23))
    ids, sigma = torch.arange(8)[None], torch.tensor([0.7])
    ids[0, 3] = 23
    with torch.no_grad():
        before = network(ids, sigma)
        for name, parameter in network.named_parameters():
            original = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            assert (network(ids, sigma) - before).abs().max() > 1e-3, name
            parameter.copy_(original)


def test_bf16_keeps_the_offset_exact() -> None:
    """Blocks may run in bf16, but the offset (17.7 at t = 1) is subtracted in fp32."""
    config = tiny.sedd_config(tokens=23)
    network = tiny.sedd(config).to(torch.bfloat16)
    ids, sigma = torch.full((1, 6), 23), torch.tensor([6.9])
    with torch.no_grad():
        score = network(ids, sigma)
        raw = network.logits(network.hidden(ids, sigma))
    offset = math.log(math.expm1(6.9)) + math.log(23)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score[..., :23], raw[..., :23] - offset, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "total", "in_blocks"),
    [(SMALL, 169_627_218, 92_132_352), (MEDIUM, 424_477_010, 321_183_744)],
    ids=["small", "medium"],
)
def test_parameter_counts_of_the_paper(sizes: dict[str, int], total: int, in_blocks: int) -> None:
    with torch.device("meta"):
        network = SEDD(SEDDConfig(tokens=50257, **sizes))
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(p.numel() for p in network.blocks.parameters()) == in_blocks


def test_state_dict_keys_are_the_authors() -> None:
    block = [
        "norm1.weight",
        "attn_qkv.weight",
        "attn_out.weight",
        "norm2.weight",
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
    ]
    block += ["mlp.2.bias", "adaLN_modulation.weight", "adaLN_modulation.bias"]
    expected = {
        "vocab_embed.embedding",
        *(f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in block}
    expected |= {
        f"output_layer.{name}" for name in ("norm_final.weight", "linear.weight", "linear.bias")
    }
    expected |= {f"output_layer.adaLN_modulation.{kind}" for kind in ("weight", "bias")}
    assert set(tiny.sedd(tiny.sedd_config()).state_dict()) == expected


def test_untrained_network_is_all_zero() -> None:
    """adaLN and the read-out start at zero: only the offset is left, and 0 at the current token."""
    config = tiny.sedd_config(tokens=23)
    score = SEDD(config).eval()(torch.full((1, 4), 23), torch.tensor([1.0]))
    torch.testing.assert_close(
        score[..., :23], torch.full((1, 4, 23), -math.log(math.expm1(1.0)) - math.log(23))
    )
    assert (score[..., 23] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"process": "uniform", "scale_by_sigma": False, "schedule": "geometric", "sigma_max": 9.0},
        {**tiny.CACHED, "context_window": 7},
    ],
    ids=["authors", "uniform", "borrowed"],
)
def test_save_and_load_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = tiny.sedd(tiny.sedd_config(**changes))
    network.save_pretrained(tmp_path / "saved", target="someone", draft_len=5)
    again = SEDD.from_pretrained(tmp_path / "saved")
    assert again.config == network.config
    assert not again.training
    state = again.state_dict()
    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor), name
    data = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (data["target"], data["draft_len"], data["model_type"]) == ("someone", 5, "sedd")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_saved_in_half_precision(tmp_path: Path) -> None:
    network = tiny.sedd(tiny.sedd_config(**tiny.CACHED))
    network.save_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["blocks.0.attn_qkv.weight"].dtype == torch.bfloat16
    assert tensors["draft_vocab"].dtype == torch.long  # ids are not numbers to round
    again = SEDD.from_pretrained(tmp_path)
    assert again.blocks[0].attn_qkv.weight.dtype == torch.float32
    assert torch.equal(again.draft_vocab, network.draft_vocab)


def test_loads_the_authors_layout(tmp_path: Path) -> None:
    """rotary_emb.inv_freq in the file, training keys in the config, and optional ones absent."""
    network = tiny.sedd(tiny.sedd_config(tokens=23))
    tensors = {**network.state_dict(), "rotary_emb.inv_freq": torch.rand(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "tokens": 23,
        "ngpus": 8,
        "graph": {"type": "absorb", "report_all": False, "file": "data"},
        "noise": {"type": "loglinear"},
        "model": {
            "name": "small",
            "type": "ddit",
            "hidden_size": 32,
            "cond_dim": 16,
            "n_blocks": 2,
            "n_heads": 4,
        },
        "training": {"batch_size": 512},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = SEDD.from_pretrained(tmp_path)
    assert (again.config.length, again.config.scale_by_sigma, again.config.borrow_embeddings) == (
        1024,
        True,
        False,
    )
    ids, sigma = torch.arange(6)[None], torch.tensor([0.4])
    with torch.no_grad():
        assert torch.equal(again(ids, sigma), network(ids, sigma))


def test_a_left_padded_row_equals_the_row_alone() -> None:
    network, pad, length = tiny.sedd(tiny.sedd_config()), 5, 9
    ids = torch.randint(tiny.VOCAB, (2, pad + length), generator=torch.Generator().manual_seed(3))
    ids[:, -3:] = tiny.VOCAB
    real = torch.ones(2, pad + length, dtype=torch.bool)
    real[0, :pad] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    sigma = torch.tensor([0.9, 0.9])
    with torch.no_grad():
        got = network.hidden(ids, sigma, mask=real[:, None, None], positions=positions)
        alone = network.hidden(ids[:1, pad:], sigma[:1])
        full = network.hidden(ids[1:], sigma[1:])
    torch.testing.assert_close(got[:1, pad:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1:], full, rtol=0, atol=1e-5)


def test_passes_over_a_cache_equal_one_banded_pass() -> None:
    """Rows of different length in uneven chunks through a RaggedCache: as under one causal mask."""
    network, window, total = tiny.sedd(tiny.sedd_config(time_conditioning=False)), 4, 12
    ids = torch.randint(tiny.VOCAB, (2, total), generator=torch.Generator().manual_seed(4))
    i = torch.arange(total)
    band = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
    sigma = torch.zeros(2)
    cache, read = RaggedCache(2, total + 3), torch.tensor([0, 0])
    with torch.no_grad():
        full = network.hidden(ids, sigma, mask=band[None, None].expand(2, 1, -1, -1))
        for size, advance in [(3, (3, 2)), (4, (1, 4)), (2, (2, 2)), (4, (4, 1))]:
            at = read[:, None] + torch.arange(size)
            cache.place(at)
            slot = torch.arange(cache.bound)
            mask = ((slot <= at[..., None]) & (slot > at[..., None] - window))[:, None]
            states = network.hidden(ids.gather(1, at), sigma, mask=mask, positions=at, cache=cache)
            torch.testing.assert_close(
                states, full.gather(1, at[..., None].expand(-1, -1, tiny.WIDTH)), rtol=0, atol=1e-5
            )
            # not all that was written is kept: the rest is overwritten
            read = read + torch.tensor(advance)


def borrowed(**changes: Any) -> tuple[SEDD, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    embedding, head = torch.randn(2, tiny.VOCAB, tiny.WIDTH, generator=generator)
    config = tiny.sedd_config(borrow_embeddings=True, **changes)
    return tiny.sedd(config).borrow(embedding, head), embedding, head


def test_borrowing_shares_the_targets_memory() -> None:
    network, embedding, head = borrowed()
    assert network.vocab_embed.weight.data_ptr() == embedding.data_ptr()
    assert network.head.data_ptr() == head.data_ptr()
    assert not {"vocab_embed.weight", "head", "output_layer.linear.weight"} & set(
        network.state_dict()
    )
    assert all(
        p.data_ptr() not in (embedding.data_ptr(), head.data_ptr()) for p in network.parameters()
    )


def test_borrowing_equals_owning_the_same_numbers() -> None:
    network, embedding, head = borrowed()
    state = {k: v for k, v in network.state_dict().items() if k != "vocab_embed.mask_embedding"}
    state["vocab_embed.embedding"] = torch.cat(
        [embedding, network.vocab_embed.mask_embedding.detach()[None]]
    )
    state["output_layer.linear.weight"] = torch.cat([head, torch.zeros(1, tiny.WIDTH)])
    state["output_layer.linear.bias"] = torch.zeros(tiny.VOCAB + 1)
    own = SEDD(tiny.sedd_config()).eval()
    own.load_state_dict(state)
    ids, sigma = torch.tensor([[3, 1, tiny.VOCAB, 7, tiny.VOCAB]]), torch.tensor([0.8])
    with torch.no_grad():
        torch.testing.assert_close(
            network(ids, sigma)[..., : tiny.VOCAB], own(ids, sigma)[..., : tiny.VOCAB]
        )


def test_draft_vocab_reads_some_columns_of_the_head() -> None:
    network, _, _ = borrowed(draft_vocab_size=10)
    whole, _, _ = borrowed()
    whole.load_state_dict({k: v for k, v in network.state_dict().items() if k != "draft_vocab"})
    ids, sigma = torch.tensor([[3, tiny.VOCAB, 7, tiny.VOCAB]]), torch.tensor([0.8])
    with torch.no_grad():
        few, all_ = (
            network.logits(network.hidden(ids, sigma)),
            whole.logits(whole.hidden(ids, sigma)),
        )
        score = network(ids, sigma)
    assert few.shape == (1, 4, 10)
    assert all_.shape == (1, 4, tiny.VOCAB)
    torch.testing.assert_close(few, all_[..., network.draft_vocab])
    outside = torch.ones(tiny.VOCAB + 1, dtype=torch.bool)
    outside[network.draft_vocab] = outside[tiny.VOCAB] = False
    assert (score[0, 1, outside] == -math.inf).all()
    assert score[0, 1, network.draft_vocab].isfinite().all()


def test_the_mask_embedding_is_read_at_mask_alone() -> None:
    network, _, _ = borrowed()
    clear, masked, sigma = (
        torch.tensor([[3, 1, 7]]),
        torch.tensor([[3, tiny.VOCAB, 7]]),
        torch.tensor([0.8]),
    )
    with torch.no_grad():
        before = network.hidden(clear, sigma), network.hidden(masked, sigma)
        network.vocab_embed.mask_embedding.add_(1.0 + torch.arange(tiny.WIDTH) / 8)
        after = network.hidden(clear, sigma), network.hidden(masked, sigma)
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-2


def test_borrowing_before_the_target_is_there_is_loud() -> None:
    """The borrowed table is NaN until `borrow` is called, never zeros."""
    network = tiny.sedd(tiny.sedd_config(borrow_embeddings=True))
    with torch.no_grad():
        assert network.hidden(torch.tensor([[1, 2]]), torch.zeros(1)).isnan().all()


@pytest.mark.parametrize("shape", [(tiny.VOCAB + 1, tiny.WIDTH), (tiny.VOCAB, tiny.WIDTH // 2)])
def test_borrowing_from_another_size_is_refused(shape: tuple[int, int]) -> None:
    network = tiny.sedd(tiny.sedd_config(borrow_embeddings=True))
    with pytest.raises(
        ConfigError, match=rf"{tiny.VOCAB} words x {tiny.WIDTH}.*{shape[0]} x {shape[1]}"
    ):
        network.borrow(torch.zeros(shape), torch.zeros(shape))


def test_without_time_conditioning_sigma_is_ignored() -> None:
    ids = torch.tensor([[3, tiny.VOCAB, 7]])
    for conditioned in (True, False):
        network = tiny.sedd(tiny.sedd_config(time_conditioning=conditioned))
        with torch.no_grad():
            one, other = (
                network.hidden(ids, torch.tensor([0.1])),
                network.hidden(ids, torch.tensor([5.0])),
            )
            zero = network.hidden(ids, torch.tensor([0.0]))
        assert torch.equal(one, other) is not conditioned
        assert torch.equal(one, zero) is not conditioned
