"""The self-test a target passes at load: ragged scoring equals a plain full forward, or the model is refused.

A sliding window of thousands of positions would never slide in so short a test. Where a model has one, the test runs once
more with that window narrowed to a few positions, in the model and in the masks alike: that the right layers slide, and by
exactly the window, is thus shown at every load. That the number itself is read from the same config field on both sides is
what remains for the masks' own tests.
"""

import torch

from specdiff.errors import UnsupportedModelError
from specdiff.models.cache import RaggedCache
from specdiff.models.causal import RaggedModel, home

LENGTH, PREFILL, ROWS = 14, (4, 6), 2
NARROW = 3  # a window that the rows slide out of even before the first draft
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; 16-bit dtypes round far more coarsely
COARSE = 0.08


@torch.inference_mode()
def self_test(model: RaggedModel) -> float:
    """Two rows at different lengths, one rejected draft. Returns the error relative to the largest logit.

    Raises UnsupportedModelError naming it where it is out of tolerance, or what the model raised.
    """
    net = model.model
    try:
        errors = _errors(model)
        if model.sight.window is not None and model.sight.window > NARROW:
            with model.sight.narrowed(NARROW):
                errors += _errors(model)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as raised:
        told = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
        raise UnsupportedModelError(
            f"this {net.config.model_type} model fails the self-test, scoring over the ragged cache: {told}"
        ) from raised
    error = float(torch.stack(errors).max())  # a NaN stays one
    allowed = TOLERANCE.get(net.dtype, COARSE)
    if not error <= allowed:
        raise UnsupportedModelError(
            f"this {net.config.model_type} model fails the self-test: scoring over the ragged cache differs from a plain forward by "
            f"{error:.1e} of its largest logit (allowed {allowed:.0e} in {net.dtype}), so its output could not be exact"
        )
    return error


def _errors(model: RaggedModel) -> list[torch.Tensor]:
    """The error of each forward behind a rejected draft."""
    net = model.model
    vocab = net.config.get_text_config().vocab_size
    device = home(net)
    ids = torch.randint(vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    full = net(ids, use_cache=False).logits.float().to(device)
    cache = RaggedCache(ROWS, LENGTH + 2)
    for row, size in enumerate(PREFILL):
        at = torch.arange(size, device=device)[None]
        model.forward(cache, ids[row : row + 1, :size], at, selected=torch.tensor([row], device=device))
    start = torch.tensor(PREFILL, device=device)[:, None]
    rejected = (ids[:, :4] + 1) % vocab
    model.forward(cache, rejected, start + torch.arange(4, device=device))
    errors = []
    for size in (3, 1, 4):
        at = start + torch.arange(size, device=device)
        logits, _ = model.forward(cache, ids.gather(1, at), at)
        expected = full.gather(1, at[..., None].expand(-1, -1, full.shape[-1]))
        errors.append((logits.float() - expected).abs().max() / full.abs().max().clamp(min=1e-9))
        start = start + size
    return errors
