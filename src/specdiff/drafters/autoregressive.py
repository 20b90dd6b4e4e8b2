"""Standard speculative decoding: a smaller causal LM drafts one token a pass.

The paper's baseline (Leviathan et al. 2023, Chen et al. 2023). Each token is drawn from its
distribution given all tokens before it, so the probabilities are valid whatever the network
computes.

Shapes: B rows, K drafted positions, S slots, N positions of one pass, V target vocabulary, C
columns of the network's head.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.drafters.base import Drafter, temperatures
from specdiff.drafters.denoising import checked_temperature, drafted
from specdiff.drafters.vocabulary import Agreement, demand_vocabulary, fitted, known_ids, never
from specdiff.errors import DrafterError, UnsupportedModelError
from specdiff.models.cache import RaggedCache
from specdiff.models.packed import Int8Linear, large, pack_large, packs_drafters
from specdiff.models.ragged import RaggedModel
from specdiff.models.self_test import self_test
from specdiff.nn.borrowed import BorrowedHead
from specdiff.nn.linear import stream_weights
from specdiff.nn.small_lm import SmallLM
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw_tokens
from specdiff.types import Batch, Context, Draft, TargetInfo, tempered
from specdiff.weights import CONFIG, locate, positive, read_config

CHUNK = 512  # most tokens read in one pass, so that a long prompt's attention stays small
DRAFT_LEN = 4  # where config.json names none
NOTHING = -1  # no token has this id


@dataclass(slots=True)
class AutoregressiveState:
    """Keys and values, and which token each slot's were computed from.

    A slot is only valid if all slots before it are.
    """

    cache: RaggedCache
    read: Int[Tensor, "B S"]


class AutoregressiveDrafter(Drafter[AutoregressiveState]):
    """K sequential passes of `model`.

    The self-test runs here: a network that cannot be cached exactly is refused. Past the network's
    own last position its drafts are poor, but still exact. `draft_temperature` as in
    DenoisingDrafter. `padded`: its ids mean what the target's do, though one vocabulary is larger.

    Raises DrafterError, ConfigError or UsageError.
    """

    def __init__(
        self,
        model: SmallLM,
        target: TargetInfo,
        *,
        draft_len: int = DRAFT_LEN,
        draft_temperature: float = 1.0,
        padded: bool = False,
    ) -> None:
        demand_vocabulary(model.vocab_size, target, padded=padded and not model.borrows)
        self.draft_len = draft_len
        self.draft_temperature = checked_temperature(draft_temperature)
        self.temperatures = temperatures(draft_temperature)
        if model.borrows:
            if target.embedding is None or target.head is None:
                raise DrafterError(
                    f"this drafter borrows its target's embedding and head, "
                    f"which {target.name!r} does not offer"
                )
            model.borrow(target.embedding, target.head)
        stream_weights(model)
        self.model = model.to(target.device).eval()
        if packs_drafters(target.device, target.dtype):
            pack_large(model.net)
            head = model.net.get_output_embeddings()
            if isinstance(head, BorrowedHead) and large(head.weight):
                model.net.set_output_embeddings(Int8Linear(head.weight))
        self.device = target.device
        self.vocab_size = target.vocab_size
        try:
            self.ragged = RaggedModel(model.net)
            self.error = self_test(self.ragged)
        except UnsupportedModelError as error:
            raise DrafterError(
                f"the drafter's network cannot draft from cached keys and values: {error}"
            ) from error

    def open(self, rows: int, slots: int) -> AutoregressiveState:
        return AutoregressiveState(
            RaggedCache(rows, slots), torch.full((rows, slots), NOTHING, device=self.device)
        )

    def admit(self, state: AutoregressiveState, context: Context, rows: Int[Tensor, "R"]) -> None:
        state.read[rows] = NOTHING

    def propose(
        self, context: Context, state: AutoregressiveState, noise: Noise, draft_len: int
    ) -> Draft:
        """The tokens committed since the last round in one pass, then one pass a token.

        Each token is drawn from exactly its row of `probs`. Where all rows are greedy, the tokens
        are point masses.
        """
        params = tempered(context.batch.params, self.draft_temperature)
        batch = replace(context.batch, params=params)
        uniform = noise.uniform(Purpose.DRAFT, draft_len)
        columns = self.model.draft_ids
        logits = self._catch_up(context.batch, state)
        tokens: list[Tensor] = []
        probs: list[Tensor | None] = []
        for k in range(draft_len):
            if k:
                at = (context.batch.length[:, None] + k - 1).clamp(max=state.cache.slots - 1)
                logits = self._pass(state, tokens[-1], at)
            drawn = torch.cat([batch.ids[:, :0], *tokens], dim=1)
            logits = self._fitted(logits)
            token, q = draw_tokens(logits, batch, drawn, uniform[:, k : k + 1], columns)
            tokens.append(token)
            probs.append(q)
        return drafted(torch.cat(tokens, dim=1), probs, params, columns)

    def _catch_up(self, batch: Batch, state: AutoregressiveState) -> Float[Tensor, "B 1 C"]:
        """Feed the committed tokens whose keys are missing, at least the anchor.

        Accepted draft tokens have theirs. The entries after the first slot of another token were
        computed from a rejected draft: they are dropped here, or a later token that happens to be
        the same would use them.
        """
        # a batch may be wider than its rows can grow
        width = min(batch.ids.shape[1], state.cache.slots)
        before_anchor = torch.arange(width, device=self.device) < batch.length[:, None] - 1
        same = (state.read[:, :width] == batch.ids[:, :width]) & before_anchor
        prefix = same.long().cumprod(1).sum(1)
        slot = torch.arange(state.cache.slots, device=self.device)
        state.read[slot >= prefix[:, None]] = NOTHING
        # rows that lag less read some tokens again: same keys, same values
        lag = int((batch.length - prefix).max())
        at = batch.length[:, None] - lag + torch.arange(lag, device=self.device)
        at = at.clamp(min=0)
        for start in range(0, lag, CHUNK):
            part = at[:, start : start + CHUNK]
            logits = self._pass(state, batch.ids.gather(1, part), part)
        return logits  # of the anchor, which ends every row

    def _pass(
        self, state: AutoregressiveState, ids: Int[Tensor, "B N"], at: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B 1 C"]:
        state.read.scatter_(1, at, ids)
        ids = known_ids(ids, self.model.vocab_size, self.vocab_size)
        return self.ragged.forward(state.cache, ids, at, last=1)[0]

    def _fitted(self, logits: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B 1 C"]:
        """Over the draft vocabulary, or over the target's."""
        return logits if self.model.borrows else fitted(logits, self.vocab_size)


def autoregressive(
    target: TargetInfo,
    folder: str | Path,
    agrees: Agreement = never,
    *,
    draft_temperature: float = 1.0,
) -> AutoregressiveDrafter:
    """A drafter from a causal LM's folder or hub id.

    `agrees` is called if its vocabulary is of another size. Raises ConfigError, WeightsError or
    DrafterError naming what does not fit.
    """
    path = locate(folder)
    model = SmallLM.from_pretrained(path, dtype=target.dtype)
    config = {"draft_len": DRAFT_LEN, **read_config(path)}
    draft_len = positive(config, "draft_len", str(path / CONFIG))
    padded = model.vocab_size != target.vocab_size and agrees(model.vocab_size)
    return AutoregressiveDrafter(
        model, target, draft_len=draft_len, draft_temperature=draft_temperature, padded=padded
    )
