"""The self-test a target passes at load: ragged scoring equals a plain full forward, or the model is refused.

The plain forwards are those of the untouched model, each row alone. Against them stand rows of one batch that differ in
length, a rejected draft, and a second stream in a cache of another size, their forwards interleaved: what depends on
neighbors, on the cache, or on what was computed before shows.

What depends on the length itself would not show in so short a text. Where the config names positions (how many the model
was trained for, how many it has), rows lie across each of them: the tokens are few, their position ids are not. Where the
model has a sliding window, the test runs once more with the window narrowed to a few positions, in the model and in the
masks alike: that the right layers slide, and by exactly the window, is thus shown at every load. That the number itself is
read from the same config field on both sides is what remains for the masks' own tests.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.errors import UnsupportedModelError
from specdiff.models.cache import BUCKET, RaggedCache
from specdiff.models.ragged import RaggedModel, home

LENGTH, SHORT, LONG, DRAFT = 12, 4, 6, 4  # of a row; of what is read before the first draft
NARROW = 3  # a window that the rows slide out of even before the first draft
TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-6,
}  # of the largest logit; 16-bit dtypes round far more coarsely
COARSE = 0.08
POSITIONS = re.compile("position|seq_|sequence|ctx|chunk")  # config fields that count positions


@torch.inference_mode()
def self_test(model: RaggedModel) -> float:
    """Rows at different lengths, a rejected draft, two streams. Returns the error relative to the largest logit.

    Raises UnsupportedModelError naming it where it is out of tolerance, or what the model raised.
    """
    net = model.model
    try:
        with model.lock:
            errors = _errors(model)
            if model.sight.window is not None and model.sight.window > NARROW:
                with model.sight.narrowed(NARROW):
                    errors += _errors(model)
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
    ) as raised:
        message = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
        raise UnsupportedModelError(
            f"this {net.config.model_type} model fails the self-test, scoring over the ragged cache: {message}"
        ) from raised
    error = float(torch.stack(errors).max())  # a NaN stays one
    allowed = TOLERANCE.get(net.dtype, COARSE)
    if not error <= allowed:
        raise UnsupportedModelError(
            f"this {net.config.model_type} model fails the self-test: scoring over the ragged cache differs from a plain forward by "
            f"{error:.1e} of its largest logit (allowed {allowed:.0e} in {net.dtype}), so its output could not be exact"
        )
    return error


@dataclass(frozen=True, slots=True)
class _Text:
    """The rows under test, and what the untouched model says of each of them alone. The first begins at position 0.

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
    first, others = rows[:1], rows[1:]

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


def _text(model: RaggedModel) -> _Text:
    net = model.model
    device = home(net)
    starts = torch.tensor([0, *(list(_starts(model)) or [0])], device=device)
    vocab = net.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (len(starts), LENGTH), generator=generator).to(device)
    positions = starts[:, None] + torch.arange(LENGTH, device=device)
    with model.untouched():
        logits = [
            net(
                row[None],
                use_cache=False,
                **({"position_ids": where[None]} if int(where[0]) else {}),
            )
            .logits.float()
            .to(device)
            for row, where in zip(ids, positions, strict=True)
        ]
    return _Text(model, ids, positions, torch.cat(logits))


def _starts(model: RaggedModel) -> Iterator[int]:
    """Where rows must start to lie across each number of positions that the config names, as far as the model has positions."""
    net = model.model
    # transformers' mark of a rotary embedding that computes any position; a table ends with the last one
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
