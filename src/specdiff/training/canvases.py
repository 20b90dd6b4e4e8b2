"""Corruption shaped like drafting: MASK canvases behind clean text, many per row in one causal pass; and plain uniform t.

Shapes: B rows, L clean tokens, N canvases a row, G tokens a canvas, T = L + N G positions of one pass.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Schedule

EVERYWHERE = 0.1  # share of anchors that may also fall into the prompt; the others lie in the answer, where drafting happens


@dataclass(frozen=True, slots=True)
class Canvases:
    """Rows followed by their canvases, ready for one pass: who stands where, who sees whom, and what was hidden."""

    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B 1 T T"]
    slot: Int[
        Tensor, "B N G"
    ]  # absolute positions of the canvas tokens; those at or beyond a row's length are padding
    hidden: Bool[Tensor, "B N G"]  # MASK, not revealed
    inside: Bool[Tensor, "B N G"]


def pick_anchors(
    lengths: Int[Tensor, "B"], prompts: Int[Tensor, "B"], count: int, generator: torch.Generator
) -> Int[Tensor, "B N"]:
    """Anchors (the last clean token a canvas sees), uniform over the answer, with at least one token left behind each."""
    u = torch.rand(len(lengths), count, generator=generator)
    anywhere = torch.rand(len(lengths), count, generator=generator) < EVERYWHERE
    first = torch.where(anywhere, 0, (prompts - 1).clamp(min=0)[:, None])
    first = torch.minimum(first, (lengths - 2).clamp(min=0)[:, None])
    return (first + u * (lengths[:, None] - 1 - first)).long()


def pick_revealed(
    shape: torch.Size, draft_len: int, share: float, generator: torch.Generator
) -> Int[Tensor, "B N"]:
    """How many leading tokens of each canvas are revealed: none, or for that share up to half, as between left-to-right passes."""
    partly = torch.rand(shape, generator=generator) < share
    return (
        torch.randint(1, max(2, draft_len // 2 + 1), shape, generator=generator)
        * partly
        * (draft_len > 1)
    )


def lay_out(
    ids: Int[Tensor, "B L"],
    lengths: Int[Tensor, "B"],
    anchors: Int[Tensor, "B N"],
    revealed: Int[Tensor, "B N"],
    draft_len: int,
    window: int | None,
    mask_id: int,
) -> Canvases:
    """Clean tokens see at most `window` of their past, themselves included; a canvas sees that past of its anchor, and itself."""
    B, L = ids.shape
    N, device = anchors.shape[1], ids.device
    index = torch.arange(draft_len, device=device)
    slot = anchors[..., None] + 1 + index
    true = ids.gather(1, slot.clamp(max=L - 1).flatten(1)).view(B, N, draft_len)
    hidden = (index >= revealed[..., None]).expand_as(slot)
    clean = torch.arange(L, device=device).expand(B, L)
    newest = torch.cat([clean, anchors.repeat_interleave(draft_len, 1)], 1)[
        ..., None
    ]  # the last clean token each position sees
    key = torch.arange(L, device=device)
    past = (key <= newest) & (key > newest - (window or L + 1))
    canvas = torch.arange(N, device=device).repeat_interleave(draft_len)
    owner = torch.cat([torch.full((L,), -1, device=device), canvas])
    own = (owner[:, None] == canvas).expand(B, -1, -1)
    return Canvases(
        ids=torch.cat([ids, torch.where(hidden, mask_id, true).flatten(1)], 1),
        positions=torch.cat([clean, slot.flatten(1)], 1),
        mask=torch.cat([past, own], -1)[:, None],
        slot=slot,
        hidden=hidden,
        inside=slot < lengths[:, None, None],
    )


@dataclass(frozen=True, slots=True)
class Corrupted:
    """Cropped rows, part of them hidden at noise level t: what a bidirectional network sees."""

    x0: Int[Tensor, "B L"]
    x: Int[Tensor, "B L"]
    t: Float[Tensor, "B"]
    real: Bool[Tensor, "B L"]  # not padding
    start: Int[Tensor, "B"]  # where the crop begins in its row
    drafted: Int[
        Tensor, "B L"
    ]  # 0, 1, ... along the hidden end of a drafting-shaped row; -1 elsewhere


def crop(
    ids: Int[Tensor, "B S"],
    lengths: Int[Tensor, "B"],
    width: int,
    start: Int[Tensor, "B"],
    end: Int[Tensor, "B"],
) -> tuple[Tensor, Tensor]:
    """Tokens start..end-1 of each row at the left of a [B, width] canvas, and which of it is real."""
    at = start[:, None] + torch.arange(width, device=ids.device)
    real = at < torch.minimum(end, lengths)[:, None]
    return ids.gather(1, at.clamp(max=ids.shape[1] - 1)) * real, real


def at_uniform_time(
    ids: Int[Tensor, "B S"],
    lengths: Int[Tensor, "B"],
    length: int,
    process: Absorbing | Uniform,
    schedule: Schedule,
    generator: torch.Generator,
) -> Corrupted:
    """Random crops of up to `length` tokens at t ~ U(1e-3, 1): pre-training's corruption (SEDD, Algorithm 1)."""
    B = len(ids)
    width = min(length, ids.shape[1])
    start = (torch.rand(B, generator=generator) * ((lengths - width).clamp(min=0) + 1)).long()
    x0, real = crop(ids, lengths, width, start, start + width)
    t = 1e-3 + (1 - 1e-3) * torch.rand(B, generator=generator)
    uniform = torch.rand(x0.shape, generator=generator, dtype=torch.float64)
    x = process.corrupt(x0, schedule.total(t)[:, None], uniform)
    return Corrupted(x0, torch.where(real, x, x0), t, real, start, torch.full_like(x0, -1))


def as_drafted(
    ids: Int[Tensor, "B S"],
    lengths: Int[Tensor, "B"],
    anchors: Int[Tensor, "B"],
    draft_len: int,
    window: int,
    mask_id: int,
    schedule: Schedule,
) -> Corrupted:
    """Exactly what the drafter will meet: the last `window` tokens up to the anchor, and `draft_len` MASK behind them."""
    start = (anchors + 1 - window).clamp(min=0)
    width = int((anchors + 1 - start).max()) + draft_len
    x0, _ = crop(ids, lengths, width, start, lengths)
    at = start[:, None] + torch.arange(width)
    behind = at - anchors[:, None] - 1
    canvas = (behind >= 0) & (behind < draft_len)
    real = behind < draft_len
    known = canvas & (at < lengths[:, None])
    share = draft_len / real.sum(1)
    t = torch.tensor([schedule.time_of_masked_share(s) for s in share.tolist()])
    return Corrupted(
        x0, torch.where(canvas, mask_id, x0), t, real, start, torch.where(known, behind, -1)
    )
