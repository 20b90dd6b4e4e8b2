"""The block drafter: one pass over K slots, given the target's hidden states, and a Markov head.

Token k is drawn from head(slot k) plus the Markov head's correction for token k - 1, so `probs`
follow the chain rule. Keys and values of the context are computed once; the anchor's own feature
does not exist yet when its block is drafted, and is never used.

Shapes: B rows, N new context positions, K slots, S cache slots, H width, V target vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter
from specdiff.drafters.denoising import checked_temperature, tempered
from specdiff.errors import DrafterError
from specdiff.models.cache import RaggedCache
from specdiff.nn.block import BlockNetwork
from specdiff.nn.borrowed import scatter
from specdiff.noise import Noise, Purpose
from specdiff.sampling import distribution, draw
from specdiff.types import Context, Draft, TargetInfo


@dataclass(slots=True)
class BlockState:
    """Keys and values of the context, and the context state just before each row's anchor."""

    cache: RaggedCache
    last: Float[Tensor, "B H"]


class BlockDrafter(Drafter[BlockState]):
    """At most `config.block_size` tokens a round; a longer `draft_len` is cut to it.

    `draft_temperature` as in DenoisingDrafter. Raises DrafterError or UsageError.
    """

    def __init__(
        self, network: BlockNetwork, target: TargetInfo, *, draft_temperature: float = 1.0
    ) -> None:
        config = network.config
        if target.embedding is None or target.head is None:
            raise DrafterError(
                f"this drafter borrows its target's embedding and head, "
                f"which {target.name!r} does not offer"
            )
        expected = (config.tokens, config.hidden_size)
        if expected != (target.vocab_size, target.hidden_size) or max(config.taps) >= target.layers:
            raise DrafterError(
                f"this drafter needs a target of {config.tokens} words, width "
                f"{config.hidden_size} and over {max(config.taps)} layers, unlike {target.name!r}"
            )
        self.draft_temperature = checked_temperature(draft_temperature)
        self.network = network.to(target.device, target.dtype).eval()
        self.network.borrow(target.embedding, target.head)
        self.taps = config.taps
        self.draft_len = config.block_size
        self.vocab_size = target.vocab_size

    def open(self, rows: int, slots: int) -> BlockState:
        weight = self.network.fc.weight
        # room for slots past the end, and one place more for the padding of shorter rows
        cache = RaggedCache(rows, slots + self.network.config.block_size + 1)
        return BlockState(cache, weight.new_zeros(rows, weight.shape[0]))

    def admit(self, state: BlockState, context: Context, rows: Int[Tensor, "R"]) -> None:
        state.last[rows] = 0

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        """One pass for all slots; then each token is drawn from exactly its row of `probs`."""
        K = min(draft_len, self.network.config.block_size)
        params = tempered(context.batch.params, self.draft_temperature)
        batch = replace(context.batch, params=params)
        logits = self.network.logits(self._states(context, state, K))
        uniform = noise.uniform(Purpose.DRAFT, K)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        previous = batch.anchor[:, None]
        for k in range(K):
            row = logits[:, k : k + 1]
            bias = self.network.markov(previous)
            row = row if bias is None else row + bias
            drawn = torch.cat([batch.ids[:, :0], *tokens], dim=1)
            q = distribution(self._spread(row), batch, drawn)
            previous = draw(q, uniform[:, k : k + 1])
            tokens.append(previous)
            probs.append(q)
        return Draft(torch.cat(tokens, dim=1), torch.cat(probs, dim=1))

    def _states(self, context: Context, state: BlockState, K: int) -> Float[Tensor, "B K H"]:
        """Add the new features to the cached context, and run the slots over it."""
        assert context.features is not None  # the drafter has taps
        size = context.feature_size[:, None]
        anchor = context.batch.length[:, None] - 1
        fresh = self.network.context(context.features.to(state.last.dtype))
        if fresh.shape[1]:
            newest = (size - 1).clamp(min=0)[..., None].expand(-1, -1, fresh.shape[2])
            state.last = torch.where(size > 0, fresh.gather(1, newest)[:, 0], state.last)
        index = torch.arange(fresh.shape[1], device=size.device)
        at = (anchor - size + index).masked_fill(index >= size, state.cache.slots - 1)
        block = anchor + torch.arange(K, device=size.device)
        at = torch.cat([at, block], dim=1)
        # a batch is as wide as its longest row can grow: no need to read lengths from the device
        state.cache.place(at, length=context.batch.ids.shape[1] + K)
        slots = self.network.slots(context.batch.anchor[:, None], state.last[:, None], K)[:, 0]
        mask = self._mask(anchor, block, state.cache.bound)
        states: Tensor = self.network(slots, fresh, at, mask, state.cache)
        return states

    def _mask(
        self, anchor: Int[Tensor, "B 1"], block: Int[Tensor, "B K"], bound: int
    ) -> Bool[Tensor, "B 1 K S"]:
        """Each slot sees its whole block, and the context within its window."""
        key = torch.arange(bound, device=anchor.device)
        visible = (key < anchor[..., None]).expand(-1, block.shape[1], -1)
        if self.network.config.window is not None:
            visible = visible & (key >= block[..., None] - self.network.config.window)
        own = (key >= anchor[..., None]) & (key < anchor[..., None] + block.shape[1])
        return (visible | own)[:, None]

    def _spread(self, logits: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B 1 V"]:
        if self.network.config.draft_vocab_size is None:
            return logits
        return scatter(logits, self.network.draft_vocab, self.vocab_size)
