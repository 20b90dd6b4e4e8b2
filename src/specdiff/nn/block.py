"""Block denoiser: one parallel pass over K slots, conditioned on hidden states of target layers.

The backbone is that of DFlash and DSpark: Qwen3-style layers whose keys and values come from target
features and from the slots, and whose queries come from the slots alone. Slot 0 holds the anchor's
embedding, the others that of the mask token. Two additions are our own and optional: `direct`, a
path from the last context feature into every slot, and a Markov head whose first factor reads the
target's embedding. Their formats are read too: see `block_formats`.

Shapes: B rows, L context positions, Q slots of this call (all blocks of a row), S attended
positions, H width, T tapped layers, C columns of the logits (draft vocabulary), R Markov rank.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from specdiff import weights
from specdiff.errors import WeightsError
from specdiff.nn import block_formats
from specdiff.nn.block_config import BlockConfig as BlockConfig
from specdiff.nn.borrowed import check_tables, head_rows
from specdiff.nn.ddit import KeyValueStore, rotate
from specdiff.nn.linear import linear


class Attention(nn.Module):
    """Grouped attention of slots over [context, slots].

    Keys and queries are normed per head before RoPE.
    """

    def __init__(self, layer: int, config: BlockConfig) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, keys = config.heads * config.head_dim, config.key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        slots: Float[Tensor, "B Q H"],
        context: Float[Tensor, "B L H"],
        angle: Float[Tensor, "B L+Q P"],
        mask: Bool[Tensor, "B 1 Q S"],
        cache: KeyValueStore | None,
    ) -> Float[Tensor, "B Q H"]:
        both = torch.cat([context, slots], dim=1)
        query = self._split(self.q_proj(slots))
        key = self._split(self.k_proj(both))
        value = self._split(self.v_proj(both))
        query = rotate(self.q_norm(query), angle[:, -slots.shape[1] :])
        key = rotate(self.k_norm(key), angle)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        )
        attended: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return attended

    def _split(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B A L D"]:
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP; context features enter attention unnormed by the layer."""

    def __init__(self, layer: int, config: BlockConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(layer, config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "B Q H"],
        context: Float[Tensor, "B L H"],
        angle: Float[Tensor, "B L+Q P"],
        mask: Bool[Tensor, "B 1 Q S"],
        cache: KeyValueStore | None,
    ) -> Float[Tensor, "B Q H"]:
        x = x + self.self_attn(self.input_layernorm(x), context, angle, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class MarkovHead(nn.Module):
    """logits_k += W2 W1[x_{k-1}], DSpark's head.

    W1 is a table, or is read through the target's embedding E as W1 E[x_{k-1}].
    """

    def __init__(self, config: BlockConfig, columns: int) -> None:
        super().__init__()
        rank = config.markov_rank
        self.w1: nn.Embedding | nn.Linear
        if config.markov_table:
            self.w1 = nn.Embedding(config.tokens, rank)
        else:
            self.w1 = nn.Linear(config.hidden_size, rank, bias=False)
        self.w2 = nn.Linear(rank, columns, bias=False)
        nn.init.zeros_(self.w2.weight)

    def vector(
        self, previous: Int[Tensor, "*B"], embedding: Float[Tensor, "V H"]
    ) -> Float[Tensor, "*B R"]:
        """What the head knows of the tokens `previous`."""
        if isinstance(self.w1, nn.Embedding):
            vector: Tensor = self.w1(previous)
        else:
            embedded = F.embedding(previous, embedding)
            plain = isinstance(self.w1, nn.Linear)
            vector = self.w1(embedded.to(self.w1.weight.dtype) if plain else embedded)
        return vector


class ConfidenceHead(nn.Module):
    """DSpark's estimate of each slot's acceptance, from its state (and Markov vector)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_head == "states+markov"
        rank = config.markov_rank if self.with_markov else 0
        self.proj = nn.Linear(config.hidden_size + rank, 1)


class BlockNetwork(nn.Module):
    """Slots in, states out.

    `logits` reads them out through the target's head. Call `borrow` before anything else.
    """

    draft_vocab: Tensor
    embedding: Tensor
    head: Tensor
    read_out: nn.Module | None  # in place of the head, if it is set

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.read_out = None
        H = config.hidden_size
        columns = config.draft_vocab_size or config.tokens
        self.fc = nn.Linear(len(config.taps) * H, H, bias=False)
        self.hidden_norm = nn.RMSNorm(H, config.norm_eps)
        self.layers = nn.ModuleList([Layer(i, config) for i in range(config.layers)])
        self.norm = nn.RMSNorm(H, config.norm_eps)
        self.markov_head = MarkovHead(config, columns) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.confidence_head else None
        self.direct: nn.Linear | None = None
        if config.direct:
            self.direct = nn.Linear(H, H, bias=False)
            self.slot_embedding = nn.Parameter(torch.zeros(config.block_size, H))
            nn.init.zeros_(self.direct.weight)
        if config.draft_vocab_size is not None:
            self.register_buffer("draft_vocab", torch.full((config.draft_vocab_size,), -1))
        if config.own_embedding:
            self.register_buffer("embedding", torch.zeros(config.tokens, H))
        if config.own_head:
            self.register_buffer("head", torch.zeros(columns, H))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Load a checkpoint folder or hub id; then call `borrow`.

        It may be in specdiff's own layout or one of `block_formats`. Raises ConfigError or
        WeightsError, naming the file and the field or tensor.
        """
        path = weights.locate(folder)
        checkpoint = block_formats.read(path)
        config = checkpoint.config
        network = cls(config)
        weights.fill(network, checkpoint.tensors, path)
        ids = network.draft_ids
        if ids is not None and not (
            bool(((ids >= 0) & (ids < config.tokens)).all()) and bool((ids.diff() > 0).all())
        ):
            raise WeightsError(
                f"{path / weights.TENSORS}: draft_vocab must hold ascending ids of the "
                f"{config.tokens} words"
            )
        return network.to(dtype).eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, **about: Any
    ) -> None:
        """Write `config.json` (with the keys `about`) and `model.safetensors` atomically.

        Borrowed tables are not written. Raises StorageError.
        """
        weights.save(self, Path(folder), {**self.config.to_json(), **about}, dtype)

    @property
    def draft_ids(self) -> Int[Tensor, "C"] | None:
        """The draft vocabulary, ids of the borrowed head's rows; None for the whole vocabulary."""
        return None if self.config.draft_vocab_size is None else self.draft_vocab

    def borrow(self, embedding: Float[Tensor, "V H"], head: Float[Tensor, "V H"]) -> Self:
        """Read and write through the target's embedding and the `draft_vocab` rows of its head.

        A table that the checkpoint holds itself is not replaced. Raises ConfigError if the target's
        sizes are not those this network was trained for.
        """
        check_tables(embedding, head, self.config.tokens, self.config.hidden_size)
        if not self.config.own_embedding:
            self.register_buffer("embedding", embedding.detach(), persistent=False)
        if not self.config.own_head:
            self.register_buffer("head", head_rows(head, self.draft_ids), persistent=False)
        return self

    def context(self, features: Float[Tensor, "B L T*H"]) -> Float[Tensor, "B L H"]:
        """Target features -> what attention and the direct path read."""
        states: Tensor = self.hidden_norm(self.fc(features))
        return states

    def slots(
        self, anchors: Int[Tensor, "B N"], last: Float[Tensor, "B N H"], count: int
    ) -> Float[Tensor, "B N G H"]:
        """Inputs of `count` slots after each anchor token.

        `last` is the context state just before the anchor.
        """
        ids = anchors.new_full((*anchors.shape, count), self.config.mask_token_id)
        ids[..., 0] = anchors
        return self.entered(F.embedding(ids, self.embedding).to(last.dtype), last)

    def entered(
        self, embedded: Float[Tensor, "B N G H"], last: Float[Tensor, "B N H"]
    ) -> Float[Tensor, "B N G H"]:
        """The inputs of slots from their embeddings: the direct path's part, if any, is added."""
        if self.direct is None:
            return embedded
        own = self.slot_embedding[: embedded.shape[-2]]
        entered: Tensor = embedded + own + self.direct(last)[..., None, :]
        return entered

    def forward(
        self,
        slots: Float[Tensor, "B Q H"],
        context: Float[Tensor, "B L H"],
        positions: Int[Tensor, "B L+Q"],
        mask: Bool[Tensor, "B 1 Q S"] | Sequence[Bool[Tensor, "B 1 Q S"]],
        cache: KeyValueStore | None = None,
    ) -> Float[Tensor, "B Q H"]:
        """Normed final states of the slots. `positions` are those of context and slots together.

        `mask` is one for all layers, or one for each (`block_masks.layer_masks`).
        """
        half = torch.arange(0, self.config.head_dim, 2, device=slots.device, dtype=torch.float32)
        frequency = self.config.rope_theta ** (-half / self.config.head_dim)
        angle = positions[..., None].float() * frequency
        masks = [mask] * self.config.layers if isinstance(mask, Tensor) else mask
        x = slots
        for layer, visible in zip(self.layers, masks, strict=True):
            x = layer(x, context, angle, visible, cache)
        states: Tensor = self.norm(x)
        return states

    def logits(self, states: Float[Tensor, "*B H"]) -> Float[Tensor, "*B C"]:
        """Read-out without the Markov head, at least float32."""
        logits: Tensor
        if self.read_out is not None:
            logits = self.read_out(states)
        else:
            logits = linear(states.to(self.head.dtype), self.head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def markov(self, previous: Int[Tensor, "*B"]) -> Float[Tensor, "*B C"] | None:
        """The Markov head's addition to the logits after the tokens `previous`.

        None without one.
        """
        if self.markov_head is None:
            return None
        bias: Tensor = self.markov_head.w2(self.markov_head.vector(previous, self.embedding))
        return bias

    def confidence(
        self, states: Float[Tensor, "*B H"], previous: Int[Tensor, "*B"]
    ) -> Float[Tensor, "*B"] | None:
        """The confidence head's estimate that a slot's token is accepted, given the one before.

        It does not depend on the slot's own token, so a draft may end at the first low value
        (DSpark). None without such a head.
        """
        if self.confidence_head is None:
            return None
        inputs = states
        if self.confidence_head.with_markov and self.markov_head is not None:
            vector = self.markov_head.vector(previous, self.embedding)
            inputs = torch.cat([states, vector.to(states.dtype)], dim=-1)
        logit: Tensor = self.confidence_head.proj(inputs.to(self.confidence_head.proj.weight.dtype))
        return logit[..., 0].float().sigmoid()
