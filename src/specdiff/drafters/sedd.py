"""The paper's drafter: SEDD, conditioned on committed tokens by projection, denoises K positions.

Canvas = the last `window` committed tokens, then K positions that are noise or already revealed.
Only those K need logits. A network with causal context reads each committed token once and caches
its keys and values; a bidirectional one (the authors' checkpoints) reads the window anew in every
pass. One with taps also reads its target's hidden states (`tapped`).

Shapes: B rows, K drafted positions, W context tokens fed this pass, V target vocabulary; of a score
also MASK.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.diffusion.process import Absorbing, Process, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear, Schedule
from specdiff.drafters.any_order import AnyOrderDrafter
from specdiff.drafters.denoising import ORDERS, Denoiser, DenoisingDrafter
from specdiff.drafters.tapped import TappedContext
from specdiff.drafters.tree import TreeDrafter, refuse_hot_trees
from specdiff.drafters.vocabulary import Agreement, demand_vocabulary, fitted, known_ids, never
from specdiff.errors import ConfigError, DrafterError, UsageError
from specdiff.models.cache import RaggedCache
from specdiff.models.masks import causal
from specdiff.nn.ddit import SEDD
from specdiff.nn.linear import stream_weights
from specdiff.nn.sedd_config import SEDDConfig
from specdiff.types import Context, TargetInfo
from specdiff.weights import locate, read_config

WINDOW = 128  # context of a bidirectional network, where the user names none
CHUNK = 512  # most context tokens read in one pass, so that a long prompt's attention stays small


@dataclass(slots=True)
class SEDDState:
    """Keys and values of the committed tokens (causal context only), and their count per row.

    tapped: those of a network that reads features.
    """

    cache: RaggedCache | None
    read: Int[Tensor, "B"]
    tapped: TappedContext | None = None


class SEDDDenoiser(Denoiser[SEDDState]):
    """A SEDD network over its target's vocabulary: a Scorer; if absorbing, also a Denoiser.

    padded: its ids mean what the target's do, though one vocabulary is larger. It can only denoise
        then.
    """

    def __init__(
        self,
        model: SEDD,
        target: TargetInfo,
        *,
        window: int | None = None,
        draft_len: int = 8,
        padded: bool = False,
    ) -> None:
        config = model.config
        demand_vocabulary(config.tokens, target, padded=padded and not config.borrow_embeddings)
        self.cached = config.attention == "causal-context"
        if window is not None and window < 1:
            raise UsageError(f"window must be at least 1, not {window}")
        if self.cached and window not in (None, config.context_window):
            raise UsageError(
                f"window={window}, but this drafter was trained with a fixed context of "
                f"{config.context_window}"
            )
        if self.cached and config.time_conditioning:
            raise DrafterError(
                "this drafter's context is cached, so it cannot depend on time: "
                "its config needs time_conditioning false"
            )
        if self.cached:
            self.longest = None
            self.window = config.context_window
        else:
            self.longest = config.length
            self.window = min(window or WINDOW, config.length - 1)
        if config.borrow_embeddings:
            if target.embedding is None or target.head is None:
                raise DrafterError(
                    f"this drafter borrows its target's embedding and head, "
                    f"which {target.name!r} does not offer"
                )
            model = model.borrow(target.embedding, target.head)
        if config.taps and max(config.taps) >= target.layers:
            raise DrafterError(
                f"this drafter reads layer {max(config.taps)} of its target, but {target.name!r} "
                f"has {target.layers} (0 is the first)"
            )
        self.taps = config.taps
        self.keeps_features = bool(config.taps)
        stream_weights(model)
        self.model = model.to(target.device).eval()
        self.device = target.device
        self.mask_id = config.mask_id
        self.draft_len = draft_len
        self.vocab_size = target.vocab_size
        self.columns = self.model.draft_ids
        self.process = _process(config)
        self.schedule = _schedule(config)

    def open(self, rows: int, slots: int) -> SEDDState:
        read = torch.zeros(rows, dtype=torch.long, device=self.device)
        if self.taps:
            width = self.model.config.hidden_size
            return SEDDState(None, read, TappedContext.open(rows, slots, width, self.device))
        return SEDDState(RaggedCache(rows, slots) if self.cached else None, read)

    def admit(self, state: SEDDState, context: Context, rows: Int[Tensor, "R"]) -> None:
        state.read[rows] = 0
        if state.tapped is not None:
            state.tapped.admit(context, rows)

    def denoise(
        self,
        context: Context,
        state: SEDDState,
        canvas: Int[Tensor, "B K"],
        revealed: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "B K C"]:
        """Logits of the clean tokens.

        The softmax of the network output without MASK is p(x0 | x_t) (the sigma offset cancels).
        """
        sigma = None
        if not self.cached:
            time = self._time(context, canvas.shape[1], (~revealed).sum(1))
            sigma = self.schedule.total(time)
        logits = self._logits(context, state, canvas, sigma)
        if self.columns is not None:
            return logits
        return fitted(logits[..., : self.model.config.tokens], self.vocab_size)

    def start(self, context: Context, draft_len: int) -> Float[Tensor, "B"]:
        """The time of a fresh canvas.

        With the uniform process, of one whose drafted positions are all replaced.
        """
        return self._time(context, draft_len, torch.full_like(context.batch.length, draft_len))

    def log_score(
        self,
        context: Context,
        state: SEDDState,
        canvas: Int[Tensor, "B K"],
        sigma: Float[Tensor, "B"],
    ) -> Float[Tensor, "B K V"]:
        """The log-score of the canvas, which has noise sigma while the context is clean."""
        return self.model.log_score(self._logits(context, state, canvas, sigma), canvas, sigma)

    def _logits(
        self,
        context: Context,
        state: SEDDState,
        canvas: Int[Tensor, "B K"],
        sigma: Float[Tensor, "B"] | None,
    ) -> Float[Tensor, "B K C"]:
        """Raw network output at the canvas; a cached context knows no time."""
        words = self.model.config.tokens
        if words < self.vocab_size:
            ids = known_ids(context.batch.ids, words, self.vocab_size)
            context = replace(context, batch=replace(context.batch, ids=ids))
            canvas = canvas.clamp(max=self.model.config.vocab_size - 1)
        if state.tapped is not None:
            hidden = state.tapped.hidden(self.model, context, canvas)
        elif state.cache is not None:
            hidden = self._cached(context, state, canvas)
        else:
            assert sigma is not None
            hidden = self._windowed(context, canvas, sigma)
        return self.model.logits(hidden[:, -canvas.shape[1] :])

    def _room(self, draft_len: int) -> int:
        """The most committed tokens in view together with a canvas of `draft_len`."""
        room = WINDOW if self.longest is None else self.longest - draft_len
        return min(self.window or room, room)

    def _time(
        self, context: Context, draft_len: int, noised: Int[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        """The time whose expected share of noise is that of the canvas, padding apart."""
        if self.longest is not None and self.longest <= draft_len:
            raise UsageError(
                f"draft_len {draft_len} does not fit this drafter's canvas of {self.longest} "
                f"positions"
            )
        share = noised / (context.batch.length.clamp(max=self._room(draft_len)) + draft_len)
        times = [self.schedule.time_of_masked_share(s) for s in share.tolist()]
        return torch.tensor(times, device=share.device)

    def _cached(
        self, context: Context, state: SEDDState, canvas: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B L H"]:
        """Feed the tokens committed since the last pass, and the canvas after them."""
        batch = context.batch
        cache = state.cache
        assert cache is not None
        length = batch.length[:, None]
        K = canvas.shape[1]
        # rows that lag less read some tokens again: same keys, same values
        lag = int((batch.length - state.read).max())
        while lag > CHUNK:
            at = (length - lag + torch.arange(CHUNK, device=canvas.device)).clamp(min=0)
            self._pass(cache, batch.ids.gather(1, at), at, causal(at, cache.slots, self.window))
            lag -= CHUNK
        old = (length - lag + torch.arange(lag, device=canvas.device)).clamp(min=0)
        new = (length + torch.arange(K, device=canvas.device)).clamp(max=cache.slots - 1)
        slot = torch.arange(cache.slots, device=canvas.device)
        first = length - (self.window or cache.slots)
        block = (slot >= first) & (slot < length + K)
        block = block[:, None, None].expand(-1, 1, K, -1)
        mask = torch.cat([causal(old, cache.slots, self.window), block], dim=2)
        state.read.copy_(batch.length)
        ids = torch.cat([batch.ids.gather(1, old), canvas], dim=1)
        return self._pass(cache, ids, torch.cat([old, new], dim=1), mask)

    def _pass(
        self,
        cache: RaggedCache,
        ids: Int[Tensor, "B L"],
        at: Int[Tensor, "B L"],
        mask: Bool[Tensor, "B 1 L S"],
    ) -> Float[Tensor, "B L H"]:
        cache.place(at)
        sigma = torch.zeros(len(ids), device=ids.device)
        return self.model.hidden(
            ids, sigma, mask=mask[..., : cache.bound], positions=at, cache=cache
        )

    def _windowed(
        self, context: Context, canvas: Int[Tensor, "B K"], sigma: Float[Tensor, "B"]
    ) -> Float[Tensor, "B L H"]:
        """The whole canvas and what it sees in one bidirectional pass."""
        batch = context.batch
        W = min(self._room(canvas.shape[1]), int(batch.length.max()))
        at = batch.length[:, None] - W + torch.arange(W, device=canvas.device)
        ids = torch.cat([batch.ids.gather(1, at.clamp(min=0)), canvas], dim=1)
        # short rows are padded on the left
        real = torch.cat([at >= 0, torch.ones_like(canvas, dtype=torch.bool)], dim=1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        return self.model.hidden(ids, sigma, mask=real[:, None, None], positions=positions)


def _process(config: SEDDConfig) -> Process:
    return Absorbing(config.tokens) if config.process == "absorb" else Uniform(config.tokens)


def _schedule(config: SEDDConfig) -> Schedule:
    if config.schedule == "loglinear":
        return Loglinear()
    return Geometric(config.sigma_min, config.sigma_max)


def sedd(
    target: TargetInfo,
    folder: str | Path,
    agrees: Agreement = never,
    *,
    steps: int = 1,
    order: str | None = None,
    sampler: str | None = None,
    window: int | None = None,
    draft_temperature: float = 1.0,
    hot_start: float | str = 0.0,
    tree: int = 0,
) -> DenoisingDrafter[SEDDState] | AnyOrderDrafter[SEDDState] | TreeDrafter[SEDDState]:
    """A SEDD drafter from a folder or hub id.

    Args:
        agrees: called if its vocabulary is of another size; order "any" needs the same size.
        order: "one-shot", "left-to-right" or "any". By default "any" where there is no MASK, else
            "one-shot" for one step and "left-to-right" for more.
        sampler: of order "any", "analytic" (the default) or "euler".
        hot_start: of the other orders; as in DenoisingDrafter.
        tree: draft the tree of the N most likely nodes of one pass (0: a chain).

    Raises ConfigError, WeightsError, DrafterError or UsageError naming what does not fit.
    """
    if order not in (None, *ORDERS, "any"):
        raise UsageError(f"unknown order {order!r}; known are {', '.join(ORDERS)}, any")
    if tree and (steps != 1 or order not in (None, "one-shot")):
        raise UsageError(
            f"a tree is drafted in one pass: tree={tree} goes with order 'one-shot' and steps=1 "
            f"alone, not with order {order!r} and steps={steps}",
            param="tree",
        )
    path = locate(folder)
    # q is what the network computes in any precision, and bfloat16 reads half as much memory
    half = target.dtype == torch.bfloat16
    model = SEDD.from_pretrained(path, dtype=torch.bfloat16 if half else torch.float32)
    draft_len = read_config(path).get("draft_len", 8)
    if not isinstance(draft_len, int) or draft_len < 1:
        raise ConfigError(f"{folder}: draft_len must be an integer >= 1, not {draft_len!r}")
    tokens = model.config.tokens
    padded = tokens != target.vocab_size and agrees(tokens)
    denoiser = SEDDDenoiser(model, target, window=window, draft_len=draft_len, padded=padded)
    if order == "any" or (order is None and denoiser.mask_id is None and not tree):
        # its process runs over all of its own tokens
        demand_vocabulary(tokens, target, padded=False)
        if hot_start:
            raise UsageError(
                f"hot_start={hot_start!r} needs order 'one-shot' or 'left-to-right': order 'any' "
                "starts from noise"
            )
        return AnyOrderDrafter(
            denoiser,
            steps=steps,
            sampler=sampler or "analytic",
            draft_temperature=draft_temperature,
        )
    if sampler is not None:
        raise UsageError(
            f"sampler {sampler!r} runs the reverse process, which only order 'any' does"
        )
    if tree:
        refuse_hot_trees(hot_start)
        return TreeDrafter(denoiser, tree, draft_temperature=draft_temperature)
    return DenoisingDrafter(
        denoiser,
        steps=steps,
        order=order,
        draft_temperature=draft_temperature,
        hot_start=hot_start,
    )
