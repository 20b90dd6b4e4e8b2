"""The target's features that a drafter with taps has yet to read, row by row.

They come from prompts and from rounds, and wait in the drafter's context until it proposes.

Shapes: B rows, R joining rows, N positions of a round, M of a prompt, W waiting, D width.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.types import Batch, Context, Round


def joined(
    context: Context,
    batch: Batch,
    rows: Int[Tensor, "R"],
    new: Float[Tensor, "R M D"] | None,
    prefix_lengths: Int[Tensor, "R"],
    read: Int[Tensor, "B"],
    held: tuple[Float[Tensor, "R W D"], Int[Tensor, "R"]] | None = None,
) -> Context:
    """The context of `batch`, whose `rows` hold new prompts with the features `new`.

    Where a row's earlier request left features that its drafter has not read yet, the ones inside
    the shared prefix come before the new ones. `read[b]`: of the tokens in the row's cache, the
    number whose features the drafter has read. `held`: features that come before the new ones
    instead, and their numbers.
    """
    size = batch.length[rows] - 1
    features = context.features
    if new is not None:
        if features is None:
            features = new.new_zeros(len(context.feature_size), 0, new.shape[2])
        waiting = torch.where(prefix_lengths > 0, prefix_lengths - read[rows], 0).clamp(min=0)
        earlier = features[rows]
        if held is not None:
            earlier, waiting = held
        fresh = size - prefix_lengths
        own = _appended(earlier, waiting, new, fresh)
        width = max(own.shape[1], features.shape[1])
        features = _widen(features, width).index_copy(0, rows, _widen(own, width))
        size = waiting + fresh
    sizes = context.feature_size.index_copy(0, rows, size)
    return replace(context, batch=batch, features=features, feature_size=sizes)


def following(
    context: Context, last: Round, features: Float[Tensor, "B N D"] | None, consumed: bool
) -> Context:
    """The context after a round.

    The round's features are appended to those that the drafter has not consumed.
    """
    size = torch.zeros_like(context.feature_size) if consumed else context.feature_size
    if features is None:
        return Context(last.batch, None, size, last)
    old = features[:, :0] if consumed or context.features is None else context.features
    # the anchor and all but the last of the emitted tokens are in the target's cache now
    if last.draft.parents is not None:
        path = last.verification.path[..., None].expand(-1, -1, features.shape[2])
        features = features.gather(1, path)
    merged = _appended(old, size, features, last.emitted)
    return Context(last.batch, merged, size + last.emitted, last)


def _appended(
    old: Float[Tensor, "B M D"],
    size: Int[Tensor, "B"],
    new: Float[Tensor, "B N D"],
    count: Int[Tensor, "B"],
) -> Float[Tensor, "B W D"]:
    """In each row the first `size` of `old`, then the first `count` of `new`."""
    merged = _widen(old, int((size + count).max()))
    if not new.shape[1]:
        return merged
    index = torch.arange(merged.shape[1], device=size.device)
    source = (index - size[:, None]).clamp(0, new.shape[1] - 1)
    fresh = new.gather(1, source[..., None].expand(-1, -1, new.shape[2]))
    return torch.where((index >= size[:, None])[..., None], fresh, merged)


def _widen(x: Float[Tensor, "B N D"], width: int) -> Float[Tensor, "B W D"]:
    return torch.nn.functional.pad(x, (0, 0, 0, max(0, width - x.shape[1])))
