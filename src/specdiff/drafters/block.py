"""The block drafter: one pass over K slots, given the target's hidden states, and a Markov head.

Token k is drawn from head(slot k) plus the Markov head's correction for token k - 1, so `probs`
follow the chain rule. Keys and values of the context are computed once; the anchor's own feature
does not exist yet when its block is drafted, and is never used.

Shapes: B rows, N new context positions, G slots of a block, K drafted positions, S cache slots,
H width.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter, temperatures
from specdiff.drafters.denoising import checked_temperature, drafted
from specdiff.drafters.hot_start import DraftHistory, HotStart
from specdiff.drafters.tree import best_first, checked_budget, refuse_hot_trees, soft
from specdiff.errors import DrafterError, UsageError
from specdiff.models.cache import RaggedCache
from specdiff.models.packed import Int8Linear, large, pack_large, packs_drafters
from specdiff.nn.block import BlockNetwork
from specdiff.nn.block_masks import layer_masks
from specdiff.noise import Noise, Purpose
from specdiff.sampling import distribution, draw_tokens
from specdiff.types import Context, Draft, TargetInfo, tempered
from specdiff.weights import locate


@dataclass(slots=True)
class BlockState:
    """Keys and values of the context, the context state just before each row's anchor, and the
    last drafts (None: every draft starts cold)."""

    cache: RaggedCache
    last: Float[Tensor, "B H"]
    history: DraftHistory | None = None


class BlockDrafter(Drafter[BlockState]):
    """At most `config.draft_len` tokens a round; a longer `draft_len` is cut to it.

    All slots of a block are computed whatever the draft length: they attend to each other, as in
    training. A confidence head is not used. `draft_temperature` as in DenoisingDrafter, and so is
    the weight of a `hot_start`; "canvas" is refused, since no slot of a block takes a token.

    The context's keys and values stay when a request leaves: a position's depend on its feature
    alone, so a prompt that begins with the same tokens reuses them.

    Raises DrafterError, ConfigError or UsageError.
    """

    keeps_features = True

    def __init__(
        self,
        network: BlockNetwork,
        target: TargetInfo,
        *,
        draft_temperature: float = 1.0,
        hot_start: float | str = 0.0,
    ) -> None:
        config = network.config
        self.draft_temperature = checked_temperature(draft_temperature)
        self.temperatures = temperatures(draft_temperature)
        self.hot_start = HotStart.of(hot_start)
        if self.hot_start.canvas:
            raise UsageError(
                f"hot_start={hot_start!r} needs a canvas, and a block drafter has none; "
                "give a weight in [0, 1)"
            )
        sizes = (target.vocab_size, target.hidden_size)
        if (config.tokens, config.hidden_size) != sizes or max(config.taps) >= target.layers:
            raise DrafterError(
                f"this drafter needs a target of {config.tokens} words, width "
                f"{config.hidden_size} and over {max(config.taps)} layers, unlike {target.name!r}"
            )
        self.network = network.to(target.device, target.dtype).eval()
        if not (config.own_embedding and config.own_head):
            if target.embedding is None or target.head is None:
                raise DrafterError(
                    f"this drafter borrows its target's embedding and head, "
                    f"which {target.name!r} does not offer"
                )
            self.network.borrow(target.embedding, target.head)
        if packs_drafters(target.device, target.dtype):
            pack_large(self.network)
            if large(self.network.head):
                self.network.read_out = Int8Linear(self.network.head)
        self.config = config
        self.taps = config.taps
        self.draft_len = config.draft_len
        self.dtype = target.dtype
        self.device = target.device

    def open(self, rows: int, slots: int) -> BlockState:
        # room for slots past the end; the last place is for the padding of shorter rows
        cache = RaggedCache(rows, slots + self.config.block_size)
        last = torch.zeros(rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        return BlockState(cache, last, self.hot_start.history(rows))

    def admit(self, state: BlockState, context: Context, rows: Int[Tensor, "R"]) -> None:
        state.last[rows] = 0
        if state.history is not None:
            state.history.forget(rows)

    def resume(
        self,
        state: BlockState,
        earlier: BlockState,
        rows: Int[Tensor, "R"],
        sources: Int[Tensor, "R"],
    ) -> None:
        if state.history is not None and earlier.history is not None:
            state.history.resume(earlier.history, rows, sources)

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        """One pass for all slots; then each token is drawn from exactly its row of `probs`.

        Where all rows are greedy, the tokens are point masses.
        """
        K = min(draft_len, self.draft_len)
        params = tempered(context.batch.params, self.draft_temperature)
        batch = replace(context.batch, params=params)
        logits = self._logits(context, state, K)
        uniform = noise.uniform(Purpose.DRAFT, K)
        columns = self.network.draft_ids
        tokens: list[Tensor] = []
        probs: list[Tensor | None] = []
        predictions: list[Tensor] = []
        tail = None if state.history is None else state.history.tail(context, K)
        previous = batch.anchor[:, None]
        for k in range(K):
            row = logits[:, k : k + 1]
            bias = self.network.markov(previous)
            row = row if bias is None else row + bias
            if tail is not None:
                row = tail.mixed(row, slice(k, k + 1))
            predictions.append(row)
            drawn = torch.cat([batch.ids[:, :0], *tokens], dim=1)
            previous, q = draw_tokens(row, batch, drawn, uniform[:, k : k + 1], columns)
            tokens.append(previous)
            probs.append(q)
        draft = torch.cat(tokens, dim=1)
        if state.history is not None:
            state.history.store(batch, draft, torch.cat(predictions, dim=1), columns, tail)
        return drafted(draft, probs, params, columns)

    def _logits(self, context: Context, state: BlockState, K: int) -> Float[Tensor, "B K C"]:
        """Of the first K drafted positions, without the Markov head."""
        first = self.config.first_slot
        return self.network.logits(self._states(context, state)[:, first : first + K])

    def _states(self, context: Context, state: BlockState) -> Float[Tensor, "B G H"]:
        """Add the new features to the cached context, and run the slots over it."""
        assert context.features is not None  # the drafter has taps
        G = self.config.block_size
        size = context.feature_size[:, None]
        anchor = context.batch.length[:, None] - 1
        fresh = self.network.context(context.features.to(state.last.dtype))
        if fresh.shape[1]:
            newest = (size - 1).clamp(min=0)[..., None].expand(-1, -1, fresh.shape[2])
            state.last = torch.where(size > 0, fresh.gather(1, newest)[:, 0], state.last)
        index = torch.arange(fresh.shape[1], device=size.device)
        # a batch is as wide as its longest row can grow: no need to read lengths from the device
        reach = min(context.batch.ids.shape[1] + G, state.cache.slots)
        at = (anchor - size + index).masked_fill(index >= size, reach - 1)
        block = anchor + torch.arange(G, device=size.device)
        at = torch.cat([at, block], dim=1)
        state.cache.place(at, length=reach)
        slots = self.network.slots(context.batch.anchor[:, None], state.last[:, None], G)[:, 0]
        masks = self._masks(anchor, block, state.cache.bound)
        states: Tensor = self.network(slots, fresh, at, masks, state.cache)
        return states

    def _masks(
        self, anchor: Int[Tensor, "B 1"], block: Int[Tensor, "B G"], bound: int
    ) -> list[Bool[Tensor, "B 1 G S"]]:
        """Per layer: each slot sees the context before its anchor and its own block."""
        key = torch.arange(bound, device=anchor.device).expand(len(anchor), -1)
        own = (key >= anchor) & (key < anchor + block.shape[1])
        visible = ((key < anchor) | own)[:, None, None].expand(-1, 1, block.shape[1], -1)
        return layer_masks(self.config, visible, block, anchor.expand_as(block), key, own)


class BlockTreeDrafter(BlockDrafter):
    """The `tree` most likely nodes of one pass; the Markov head reads each node's own parent.

    Greedy rows rank their nodes at temperature 1. Raises as BlockDrafter does.
    """

    trees = True

    def __init__(
        self,
        network: BlockNetwork,
        target: TargetInfo,
        tree: int,
        *,
        draft_temperature: float = 1.0,
    ) -> None:
        super().__init__(network, target, draft_temperature=draft_temperature)
        self.draft_len = checked_budget(tree)

    def propose(self, context: Context, state: BlockState, noise: Noise, draft_len: int) -> Draft:
        """At most `draft_len` nodes, of depth `config.draft_len` at most."""
        params = soft(context.batch.params, self.draft_temperature)
        batch = replace(context.batch, params=params)
        depth = min(draft_len, self.config.draft_len)
        logits = self._logits(context, state, depth)
        columns = self.network.draft_ids

        def following(level: int, tokens: Int[Tensor, "B W"]) -> Float[Tensor, "B W C"]:
            row = logits[:, level, None]
            bias = self.network.markov(tokens)
            row = row if bias is None else row + bias
            # a grammar's mask is that of the first position
            rows = batch if level == 0 else replace(batch, next_mask=None)
            return distribution(row, rows, batch.ids[:, :0], columns)

        return best_first(following, batch.anchor, depth, draft_len, columns)


def block(
    target: TargetInfo,
    folder: str | Path,
    *,
    draft_temperature: float = 1.0,
    hot_start: float | str = 0.0,
    tree: int = 0,
) -> BlockDrafter:
    """A block drafter from a folder or hub id, in any format of `nn.block_formats`.

    tree: draft the tree of the N most likely nodes of one pass (0: a chain).

    Raises ConfigError, WeightsError, DrafterError or UsageError naming what does not fit.
    """
    network = BlockNetwork.from_pretrained(locate(folder))
    if tree:
        refuse_hot_trees(hot_start)
        return BlockTreeDrafter(network, target, tree, draft_temperature=draft_temperature)
    return BlockDrafter(network, target, draft_temperature=draft_temperature, hot_start=hot_start)
