"""SEDD's score network: a diffusion transformer over tokens (Lou, Meng, Ermon 2024).

Paper: arXiv 2310.16834. It reads and writes the authors' checkpoint layout
(`louaaron/sedd-small`), without flash-attn and on any device. Additions: an attention mask, so that
rows of different length share a batch; a key/value cache, for networks whose context is causal; and
`borrow_embeddings`, where a drafter reads and writes through its target's own embedding and head.

Shapes: B rows, L positions of this call, S attended positions, H width, A heads, V output words
(MASK last when absorbing), C output columns (V, or the draft vocabulary).
"""

import math
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from specdiff import weights
from specdiff.errors import WeightsError
from specdiff.nn import mdlm
from specdiff.nn.borrowed import BorrowedEmbedding, check_tables, head_rows, scatter
from specdiff.nn.linear import linear
from specdiff.nn.sedd_config import SEDDConfig

FREQUENCIES = 256  # width of the sinusoidal embedding of sigma


class KeyValueStore(Protocol):
    """A key/value cache: stores this call's keys and values, returns all that may be attended."""

    def update(
        self, keys: Float[Tensor, "B A L D"], values: Float[Tensor, "B A L D"], layer_idx: int
    ) -> tuple[Float[Tensor, "B A S D"], Float[Tensor, "B A S D"]]: ...


class Embedding(nn.Module):
    """The checkpoint's own table [V, H]."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(size, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
        return F.embedding(ids, self.embedding)


class SigmaEmbedding(nn.Module):
    """Noise level -> conditioning vector: a sinusoid through an MLP (sigma is not rescaled)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, sigma: Float[Tensor, "B"]) -> Float[Tensor, "B C"]:
        half = FREQUENCIES // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32)
        frequency = torch.exp(-math.log(1e4) * steps / half)
        angle = sigma[:, None].float() * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        conditioning: Tensor = F.silu(self.mlp(features.to(next(self.mlp.parameters()).dtype)))
        return conditioning


class LayerNorm(nn.Module):
    """Layer norm in fp32 with a weight and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        return F.layer_norm(x.float(), x.shape[-1:]) * self.weight.float()


def rotate(x: Float[Tensor, "B A L D"], angle: Float[Tensor, "B L P"]) -> Float[Tensor, "B A L D"]:
    """Rotary position embedding, rotate-half convention (Su et al. 2021)."""
    cos = angle.cos()[:, None].to(x.dtype)
    sin = angle.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """Attention and MLP under adaLN (Peebles & Xie 2023).

    Each is shifted, scaled and gated by the conditioning vector.
    """

    def __init__(self, layer: int, config: SEDDConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.layer = layer
        self.heads = config.n_heads
        self.dropout = config.dropout
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * dim)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(
        self,
        x: Float[Tensor, "B L H"],
        conditioning: Float[Tensor, "B C"],
        angle: Float[Tensor, "B L P"],
        mask: Bool[Tensor, "B 1 L S"] | None,
        cache: KeyValueStore | None,
    ) -> Float[Tensor, "B L H"]:
        modulation = self.adaLN_modulation(conditioning)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = (self.norm1(x) * (1 + scale1) + shift1).to(self.attn_qkv.weight.dtype)
        h = self.attn_out(self.attend(h, angle, mask, cache))
        x = x + gate1 * F.dropout(h, self.dropout, self.training)
        h = (self.norm2(x) * (1 + scale2) + shift2).to(self.attn_qkv.weight.dtype)
        out: Tensor = x + gate2 * F.dropout(self.mlp(h), self.dropout, self.training)
        return out

    def attend(
        self,
        h: Float[Tensor, "B L H"],
        angle: Float[Tensor, "B L P"],
        mask: Bool[Tensor, "B 1 L S"] | None,
        cache: KeyValueStore | None,
    ) -> Float[Tensor, "B L H"]:
        split = self.attn_qkv(h).unflatten(-1, (3, self.heads, -1))  # layout (three, head, dim)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        q = rotate(q, angle)
        k = rotate(k, angle)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attended: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)


class OutputLayer(nn.Module):
    """Final adaLN norm, then the checkpoint's own read-out; none if the target's is borrowed."""

    def __init__(self, config: SEDDConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = LayerNorm(dim)
        self.linear: nn.Linear | None = None
        if not config.borrow_embeddings:
            self.linear = nn.Linear(dim, config.vocab_size)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * dim)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(
        self, x: Float[Tensor, "B L H"], conditioning: Float[Tensor, "B C"]
    ) -> Float[Tensor, "B L H"]:
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
        normed: Tensor = self.norm_final(x) * (1 + scale) + shift
        return normed


class SEDD(nn.Module):
    """SEDD's network. `model(ids, sigma)` gives the log-score.

    Drafting calls `hidden` and `logits`, the latter on the canvas alone.
    """

    draft_vocab: Tensor
    head: Tensor

    def __init__(self, config: SEDDConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed: BorrowedEmbedding | Embedding
        if config.borrow_embeddings:
            self.vocab_embed = BorrowedEmbedding(config.tokens, config.hidden_size)
        else:
            self.vocab_embed = Embedding(config.vocab_size, config.hidden_size)
        self.sigma_map = SigmaEmbedding(config.cond_dim)
        self.blocks = nn.ModuleList([Block(i, config) for i in range(config.n_blocks)])
        self.output_layer = OutputLayer(config)
        if config.taps:
            width = config.hidden_size
            self.fc = nn.Linear(len(config.taps) * width, width, bias=False)
            self.tap_norm = LayerNorm(width)
            self.direct = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.direct.weight)
        if config.draft_vocab_size is not None:
            self.register_buffer("draft_vocab", torch.full((config.draft_vocab_size,), -1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Load a checkpoint folder or hub id, in the authors' layout or MDLM's.

        Call `borrow` on a network with `borrow_embeddings` before use. Raises ConfigError or
        WeightsError, naming the file and the field or tensor.
        """
        path = weights.locate(folder)
        data = weights.read_config(path)
        where = str(path / weights.CONFIG)
        foreign = mdlm.recognized(data)
        config = mdlm.config(data, where) if foreign else SEDDConfig.from_json(data, where)
        model = cls(config)
        prefix = mdlm.PREFIX if foreign else ""
        weights.load_into(model, path, ignore=("rotary_emb.inv_freq",), prefix=prefix)
        ids = model.draft_ids
        if ids is not None and not (
            bool(((ids >= 0) & (ids < config.tokens)).all()) and bool((ids.diff() > 0).all())
        ):
            raise WeightsError(
                f"{path / weights.TENSORS}: draft_vocab must hold ascending ids of the "
                f"{config.tokens} words"
            )
        return model.to(dtype).eval()

    @property
    def draft_ids(self) -> Int[Tensor, "C"] | None:
        """The draft vocabulary, ids of the borrowed head's rows; None for the whole vocabulary."""
        return None if self.config.draft_vocab_size is None else self.draft_vocab

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, **extra: Any
    ) -> None:
        """Write `config.json` (with `extra` keys) and `model.safetensors` atomically."""
        weights.save(self, Path(folder), {**self.config.to_json(), **extra}, dtype)

    def borrow(self, embedding: Float[Tensor, "V H"], head: Float[Tensor, "V H"]) -> Self:
        """Read and write through the target's embedding and the `draft_vocab` rows of its head.

        Raises ConfigError if the target's sizes are not those this network was trained for.
        """
        check_tables(embedding, head, self.config.tokens, self.config.hidden_size)
        assert isinstance(self.vocab_embed, BorrowedEmbedding)
        self.vocab_embed.weight = embedding.detach()
        self.register_buffer("head", head_rows(head, self.draft_ids), persistent=False)
        return self

    def context(self, features: Float[Tensor, "B L T*H"]) -> Float[Tensor, "B L H"]:
        """What a network with taps adds to the embeddings of tokens with these target features."""
        states: Tensor = self.tap_norm(self.fc(features.to(self.fc.weight.dtype)))
        return states.to(self.fc.weight.dtype)

    def hidden(
        self,
        ids: Int[Tensor, "B L"],
        sigma: Float[Tensor, "B"],
        *,
        mask: Bool[Tensor, "B 1 L S"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        cache: KeyValueStore | None = None,
        extra: Float[Tensor, "B L H"] | None = None,
    ) -> Float[Tensor, "B L H"]:
        """The normed final states.

        Without a `mask` every position attends to all; `positions` default to 0..L-1. `extra` is
        added to the embeddings (of a network with taps: `context`, and `direct` of its last one).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        size = self.config.hidden_size // self.config.n_heads
        exponent = torch.arange(0, size, 2, device=ids.device, dtype=torch.float32) / size
        angle = positions[..., None].float() * 1e-4**exponent
        if not self.config.time_conditioning:
            sigma = torch.zeros_like(sigma)
        conditioning = self.sigma_map(sigma)
        x = self.vocab_embed(ids).float()  # the residual stream stays in fp32
        if extra is not None:
            x = x + extra.float()
        for block in self.blocks:
            x = block(x, conditioning, angle, mask, cache)
        states: Tensor = self.output_layer(x, conditioning)
        return states

    def logits(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B C"]:
        """Raw network output, before any sigma offset. A borrowed head has no MASK column."""
        if self.output_layer.linear is not None:
            read_out = self.output_layer.linear
            return linear(hidden.to(read_out.weight.dtype), read_out.weight, read_out.bias).float()
        return linear(hidden.to(self.head.dtype), self.head).float()

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        sigma: Float[Tensor, "B"],
        mask: Bool[Tensor, "B 1 L L"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """The log-score log s_theta(x, sigma)_y (SEDD section 3), 0 at each position's token."""
        return self.log_score(self.logits(self.hidden(ids, sigma, mask=mask)), ids, sigma)

    def log_score(
        self, logits: Float[Tensor, "B L C"], ids: Int[Tensor, "B L"], sigma: Float[Tensor, "B"]
    ) -> Float[Tensor, "B L V"]:
        """The log-score at positions that hold `ids`, from their raw output.

        A denoiser's follows from its distribution: s = p / (e^sigma - 1) at MASK (Ou et al. 2024),
        whatever the scale of its logits.
        """
        score = logits
        if self.draft_ids is not None:
            score = scatter(score, self.draft_ids, self.config.vocab_size)
        elif self.config.borrow_embeddings and self.config.mask_id is not None:
            score = F.pad(score, (0, 1), value=-torch.inf)
        # fp32 on purpose: the offset reaches 17.7 at t = 1, where bf16 numbers are 0.125 apart
        s = sigma.float()[:, None, None]
        if self.config.output == "denoiser":
            clean = score[..., : self.config.tokens].log_softmax(-1) - torch.expm1(s).log()
            score = F.pad(clean, (0, 1))
        elif self.config.scale_by_sigma:
            offset = torch.where(s < 0.5, torch.expm1(s), s.exp() - 1).log()
            score = score - offset - math.log(self.config.vocab_size - 1)
        return score.scatter(-1, ids[..., None], 0.0)
