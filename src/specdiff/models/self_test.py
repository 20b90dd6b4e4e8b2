"""Self-test of a target at load: ragged scoring equals a plain full forward, or it is refused.

The plain forwards are those of the untouched model, each row alone. They are compared with rows of
one batch that differ in length, a rejected draft, and a second stream in a cache of another size,
their forwards interleaved: any dependence on neighbors, on the cache, or on earlier computation
shows.

A dependence on the length itself would not show in such a short text. If the config names positions
(how many the model was trained for, how many it has), rows lie across each of them: few tokens, but
large position ids. If the model has a sliding window, the test runs again with the window narrowed
to a few positions, in the model and in the masks alike: every load thus shows that the right layers
slide, and by exactly the window. That both sides read the number from the same config field is left
to the tests of the masks.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.errors import UnsupportedModelError
from specdiff.models.cache import BUCKET, RaggedCache
from specdiff.models.loading import home
from specdiff.models.ragged import RaggedModel
from specdiff.tree import related
from specdiff.types import Draft

LENGTH = 12  # tokens of a row
SHORT = 4  # tokens read before the first draft, of the first row
LONG = 6  # ... and of the others
DRAFT = 4
NARROW = 3  # a window that the rows slide out of even before the first draft
# relative to the largest logit; 16-bit dtypes round far more coarsely
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE = 0.08
POSITIONS = re.compile("position|seq_|sequence|ctx|chunk")  # config fields that count positions


@torch.inference_mode()
def self_test(model: RaggedModel) -> float:
    """Rows of different length, a rejected draft, two streams.

    Returns the error relative to the largest logit. Raises UnsupportedModelError if it is out of
    tolerance, or if the model raised an exception.
    """
    return _largest(model, _errors, "scoring over the ragged cache")


@torch.inference_mode()
def tree_test(model: RaggedModel) -> float:
    """A tree with a wrong branch, and a chain after its right one was kept. As `self_test`."""
    return _largest(model, _tree_errors, "scoring trees over the ragged cache")


def _largest(
    model: RaggedModel, errors_of: Callable[[RaggedModel], list[Tensor]], task: str
) -> float:
    net = model.model
    try:
        with model.lock:
            errors = errors_of(model)
            if model.masks.window is not None and model.masks.window > NARROW:
                with model.masks.narrowed(NARROW):
                    errors += errors_of(model)
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as exception:
        message = f"{type(exception).__name__}: {' '.join(str(exception).split())[:200]}"
        raise UnsupportedModelError(
            f"this {net.config.model_type} model fails the self-test, {task}: {message}"
        ) from exception
    error = float(torch.stack(errors).max())  # a NaN stays one
    allowed = TOLERANCE.get(net.dtype, COARSE)
    if not error <= allowed:
        raise UnsupportedModelError(
            f"this {net.config.model_type} model fails the self-test: {task} "
            f"differs from a plain forward by {error:.1e} of its largest logit "
            f"(allowed {allowed:.0e} in {net.dtype}), so its output could not be exact"
        )
    return error


@dataclass(frozen=True, slots=True)
class _Text:
    """The rows under test, and the untouched model's logits of each row alone.

    The first row begins at position 0.

    Shapes: R rows, L = LENGTH tokens of each, V vocabulary, T rows and N tokens of one forward.
    """

    model: RaggedModel
    ids: Int[Tensor, "R L"]
    positions: Int[Tensor, "R L"]
    logits: Float[Tensor, "R L V"]

    def error(self, cache: RaggedCache, rows: Int[Tensor, "T"], at: Int[Tensor, "T N"]) -> Tensor:
        """Score these tokens of these rows of the cache, and compare."""
        selected = None if len(rows) == cache.rows else rows
        ids = self.ids[rows].gather(1, at)
        logits, _ = self.model.forward(
            cache, ids, at, selected=selected, positions=self.positions[rows].gather(1, at)
        )
        expected = self.logits[rows].gather(1, at[..., None].expand(-1, -1, self.logits.shape[-1]))
        return (logits.float() - expected).abs().max() / self.logits.abs().max().clamp(min=1e-9)

    def reject(self, cache: RaggedCache, rows: Int[Tensor, "T"], at: Int[Tensor, "T N"]) -> None:
        """Score other tokens in their place."""
        wrong = (self.ids[rows].gather(1, at) + 1) % self.logits.shape[-1]
        self.model.forward(cache, wrong, at, positions=self.positions[rows].gather(1, at))


def _errors(model: RaggedModel) -> list[Tensor]:
    """The error of each forward."""
    text = _text(model)
    device = text.ids.device
    rows = torch.arange(len(text.ids), device=device)
    first = rows[:1]
    others = rows[1:]

    def span(starts: Int[Tensor, "T"], size: int) -> Int[Tensor, "T N"]:
        return starts[:, None] + torch.arange(size, device=device)

    batch = RaggedCache(len(rows), LENGTH + 2)
    alone = RaggedCache(1, LENGTH + BUCKET)
    start = torch.where(rows == 0, SHORT, LONG)
    errors = [
        text.error(batch, others, span(0 * others, LONG)),
        text.error(alone, first, span(first, SHORT)),
        text.error(batch, first, span(first, SHORT)),
    ]
    text.reject(batch, rows, span(start, DRAFT))
    return [
        *errors,
        text.error(alone, first, span(start[:1], DRAFT + 1)),
        text.error(batch, rows, span(start, 1)),
        text.error(batch, rows, span(start + 1, DRAFT)),
    ]


def _tree_errors(model: RaggedModel) -> list[Tensor]:
    """The error at the right nodes of a tree, and at the tokens after them.

    Nodes by slot: the anchor, a wrong token, the right one, and one more after each of these.
    """
    text = _text(model)
    device = text.ids.device
    rows = torch.arange(len(text.ids), device=device)
    parents = torch.tensor([[-1, -1, 0, 1]], device=device)
    right = torch.tensor([0, 2, 4], device=device)
    depth = torch.tensor([0, 1, 1, 2, 2], device=device)
    cache = RaggedCache(len(rows), LENGTH + BUCKET)
    start = torch.full_like(rows, LONG)[:, None]
    prompt = torch.arange(LONG, device=device).expand(len(rows), -1)
    errors = [text.error(cache, rows, prompt)]
    ids = text.ids.gather(1, start + depth)
    ids[:, [1, 3]] = (ids[:, [1, 3]] + 1) % text.logits.shape[-1]
    logits, _ = model.forward(
        cache,
        ids,
        start + torch.arange(len(depth), device=device),
        positions=text.positions.gather(1, start + depth),
        related=related(Draft(parents, parents=parents)),
    )
    index = (start + depth[right])[..., None].expand(-1, -1, logits.shape[-1])
    difference = (logits[:, right].float() - text.logits.gather(1, index)).abs().max()
    errors.append(difference / text.logits.abs().max().clamp(min=1e-9))
    cache.move(start + right, start + depth[right])
    following = start + torch.arange(len(right), len(right) + 2, device=device)
    return [*errors, text.error(cache, rows, following)]


def _text(model: RaggedModel) -> _Text:
    net = model.model
    device = home(net)
    starts = torch.tensor([0, *(list(_starts(model)) or [0])], device=device)
    vocab = net.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (len(starts), LENGTH), generator=generator).to(device)
    positions = starts[:, None] + torch.arange(LENGTH, device=device)
    logits = []
    with model.untouched():
        for row, place in zip(ids, positions, strict=True):
            options = {"position_ids": place[None]} if int(place[0]) else {}
            out = net(row[None], use_cache=False, **options)
            logits.append(out.logits.float().to(device))
    return _Text(model, ids, positions, torch.cat(logits))


def _starts(model: RaggedModel) -> Iterator[int]:
    """The starts of rows that lie across each number of positions that the config names.

    None goes beyond the positions that the model has.
    """
    net = model.model
    # transformers' mark of a rotary embedding that computes any position; a table has a last one
    endless = any("original_max_seq_len" in vars(module) for module in net.modules())
    last = model.max_positions - LENGTH
    starts = {number - LONG for number in _numbers(net.config.get_text_config().to_dict())}
    yield from sorted(
        {start if endless else min(start, last) for start in starts if min(start, last) > 0}
    )


def _numbers(config: Mapping[str, Any]) -> Iterator[int]:
    """Every number under a field that counts positions."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool) and POSITIONS.search(name):
            yield value
