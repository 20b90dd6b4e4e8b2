"""Corruptions of corpus rows: MASK canvases after clean text, as in drafting, and uniform t.

A causal network reads many canvases per row in one pass, each with its own context.

Shapes: B rows, L clean tokens, N canvases a row, G tokens a canvas, T = L + N G positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Schedule
from specdiff.training.batches import Corrupted, HiddenEnd

# share of anchors drawn from the whole row; the others lie in the answer, where drafting happens
EVERYWHERE = 0.1


@dataclass(frozen=True, slots=True)
class Canvases:
    """Rows followed by their canvases, ready for one pass."""

    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B 1 T T"]
    slot: Int[Tensor, "B N G"]  # absolute positions; those beyond a row's length are padding
    hidden: Bool[Tensor, "B N G"]  # MASK, not revealed
    inside: Bool[Tensor, "B N G"]  # not padding


def pick_draft_len(draft_lens: Sequence[int], generator: torch.Generator) -> int:
    """One of the draft lengths, each entry as often."""
    return draft_lens[int(torch.randint(len(draft_lens), (1,), generator=generator))]


def pick_anchors(
    lengths: Int[Tensor, "B"], prompts: Int[Tensor, "B"], count: int, generator: torch.Generator
) -> Int[Tensor, "B N"]:
    """The last clean token each canvas sees: uniform over the answer, never its last token."""
    u = torch.rand(len(lengths), count, generator=generator)
    anywhere = torch.rand(len(lengths), count, generator=generator) < EVERYWHERE
    first = torch.where(anywhere, 0, (prompts - 1).clamp(min=0)[:, None])
    first = torch.minimum(first, (lengths - 2).clamp(min=0)[:, None])
    return (first + u * (lengths[:, None] - 1 - first)).long()


def pick_revealed(
    shape: torch.Size, draft_len: int, share: float, generator: torch.Generator
) -> Int[Tensor, "B N"]:
    """How many leading tokens of each canvas are revealed, as between left-to-right passes.

    None, or for that share of the canvases from one token up to half of them.
    """
    partly = torch.rand(shape, generator=generator) < share
    count = torch.randint(1, max(2, draft_len // 2 + 1), shape, generator=generator)
    return count * partly * (draft_len > 1)


def lay_out(
    ids: Int[Tensor, "B L"],
    lengths: Int[Tensor, "B"],
    anchors: Int[Tensor, "B N"],
    revealed: Int[Tensor, "B N"],
    draft_len: int,
    window: int | None,
    mask_id: int,
) -> Canvases:
    """Rows and canvases of one pass.

    A clean token sees at most `window` tokens of its past, itself included; a canvas sees that
    past of its anchor, and itself.
    """
    B, L = ids.shape
    N = anchors.shape[1]
    device = ids.device
    index = torch.arange(draft_len, device=device)
    slot = anchors[..., None] + 1 + index
    truth = ids.gather(1, slot.clamp(max=L - 1).flatten(1)).view(B, N, draft_len)
    hidden = (index >= revealed[..., None]).expand_as(slot)
    clean = torch.arange(L, device=device).expand(B, L)
    # the last clean token each position sees
    newest = torch.cat([clean, anchors.repeat_interleave(draft_len, 1)], 1)[..., None]
    key = torch.arange(L, device=device)
    past = (key <= newest) & (key > newest - (window or L + 1))
    canvas = torch.arange(N, device=device).repeat_interleave(draft_len)
    owner = torch.cat([torch.full((L,), -1, device=device), canvas])
    own = (owner[:, None] == canvas).expand(B, -1, -1)
    return Canvases(
        ids=torch.cat([ids, torch.where(hidden, mask_id, truth).flatten(1)], 1),
        positions=torch.cat([clean, slot.flatten(1)], 1),
        mask=torch.cat([past, own], -1)[:, None],
        slot=slot,
        hidden=hidden,
        inside=slot < lengths[:, None, None],
    )


def crop(
    ids: Int[Tensor, "B S"],
    lengths: Int[Tensor, "B"],
    width: int,
    start: Int[Tensor, "B"],
    end: Int[Tensor, "B"],
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Tokens start..end-1 of each row, at the left of [B, width]; and which of them are real."""
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
    """Random crops of up to `length` tokens at t ~ U(1e-3, 1): pre-training (SEDD, Algorithm 1)."""
    B = len(ids)
    width = min(length, ids.shape[1])
    start = (torch.rand(B, generator=generator) * ((lengths - width).clamp(min=0) + 1)).long()
    x0, real = crop(ids, lengths, width, start, start + width)
    t = 1e-3 + (1 - 1e-3) * torch.rand(B, generator=generator)
    uniform = torch.rand(x0.shape, generator=generator, dtype=torch.float64)
    x = process.corrupt(x0, schedule.total(t)[:, None], uniform)
    return Corrupted(x0, torch.where(real, x, x0), t, real, start)


def as_drafted(
    ids: Int[Tensor, "B S"],
    lengths: Int[Tensor, "B"],
    anchors: Int[Tensor, "B"],
    draft_len: int,
    window: int,
    mask_id: int,
    schedule: Schedule,
) -> tuple[Corrupted, HiddenEnd]:
    """The drafter's own input: the last `window` tokens up to the anchor, then `draft_len` MASK."""
    start = (anchors + 1 - window).clamp(min=0)
    width = int((anchors + 1 - start).max()) + draft_len
    x0, _ = crop(ids, lengths, width, start, lengths)
    at = start[:, None] + torch.arange(width)
    index = at - anchors[:, None] - 1
    real = index < draft_len
    canvas = (index >= 0) & real
    share = draft_len / real.sum(1)
    t = torch.tensor([schedule.time_of_masked_share(s) for s in share.tolist()])
    inside = canvas & (at < lengths[:, None])
    end = HiddenEnd(torch.where(inside, index, -1), draft_len)
    return Corrupted(x0, torch.where(canvas, mask_id, x0), t, real, start), end
