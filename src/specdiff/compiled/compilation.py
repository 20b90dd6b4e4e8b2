"""The compiled decoder layers of a target.

A forward of one row and up to 16 positions runs through compiled layers once there are some, and
they have scored a text as the eager ones do; every other forward is eager.
"""

import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specdiff.compiled import store
from specdiff.compiled.layer import CompiledLayer, CompiledLayerError, first_line
from specdiff.compiled.layers import (
    LayerKind,
    decoder_layers,
    hooked,
    kinds,
    recorded,
)
from specdiff.errors import SpecdiffError, UnsupportedModelError
from specdiff.models.cache import BUCKET, RaggedCache
from specdiff.models.ragged import Forward, RaggedModel, Runner
from specdiff.models.self_test import COARSE, TOLERANCE

ABSENT, COMPILING, COMPILED = "not compiled", "compiling", "compiled"
KINDS = 4  # of layers, at most: each takes a minute of compiling
LENGTH = 24  # tokens of the test text: more than one compiled forward takes
PROMPT = 6
TEST = {"1": (1, 1, 1), "2 to 16": (2, 5, 9)}  # positions of the forwards that are compared


class Compilation(Runner):
    """The compiled layers of one target.

    `states` says of each range of positions what has become of it. Raises UnsupportedModelError if
    the model's layers cannot be compiled.
    """

    def __init__(self, ragged: RaggedModel) -> None:
        self.ragged = ragged
        self.layers = decoder_layers(ragged)
        self.kinds = _kinds(ragged, self.layers)
        calls = {index: kind.description["call"] for kind in self.kinds for index in kind.layers}
        self.compiled = [
            CompiledLayer(layer, index, calls[index]) for index, layer in enumerate(self.layers)
        ]
        self.modules = _modules(self.layers)
        self.ready: frozenset[int] = frozenset()  # numbers of positions
        self.states = dict.fromkeys(store.POSITIONS, ABSENT)
        self.finished = threading.Event()

    def run(
        self, cache: RaggedCache, forward: Forward
    ) -> tuple[Float[Tensor, "R N V"], list[Float[Tensor, "R N D"]]]:
        if forward.ids.shape[1] in self.ready and cache.rows == 1:
            try:
                return self._run(cache, forward)
            except CompiledLayerError as error:
                self.ready = frozenset()
                self.fail(str(error))
        return self.ragged.eager(cache, forward)

    def refresh(self) -> None:
        """Be eager from now on if the model has other modules than those that were compiled."""
        if self.ready and self.modules != _modules(self.layers):
            self.ready = frozenset()
            self.fail("the model's layers have been changed since")

    def load(self) -> list[str]:
        """Switch on what is on disk and scores as the eager layers do; the ranges that are not."""
        for positions, state in self.states.items():
            if state in (ABSENT, COMPILING):
                self._load(positions)
        return [name for name, state in self.states.items() if state == ABSENT]

    def finish(self, reason: str) -> None:
        """The background has ended; what is still not compiled stays eager for this reason."""
        try:
            for positions, state in self.states.items():
                if state == COMPILING:
                    self.fail(reason, positions)
        finally:
            self.finished.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the background. Returns whether all ranges of positions are compiled."""
        self.finished.wait(timeout)
        return all(state == COMPILED for state in self.states.values())

    def _load(self, positions: str) -> None:
        try:
            packages = [store.package(store.entry(k.description, positions)) for k in self.kinds]
            paths = [path for path in packages if path is not None]
            if len(paths) < len(packages):
                return
            loaders = [_loader(path) for path in paths]
            least, most = store.POSITIONS[positions]
            for kind, loader in zip(self.kinds, loaders, strict=True):
                for index in kind.layers:
                    self.compiled[index].loaders |= dict.fromkeys(range(least, most + 1), loader)
            error = self._error(positions)
        except (SpecdiffError, OSError, RuntimeError) as exception:
            self.fail(first_line(exception), positions)
            return
        allowed = TOLERANCE.get(self.ragged.model.dtype, COARSE)
        if not error <= allowed:
            reason = f"they differ from the eager ones by {error:.1e} (allowed {allowed:.0e})"
            self.fail(reason, positions)
            return
        self.states[positions] = COMPILED
        self.ready |= frozenset(range(least, most + 1))

    @torch.inference_mode()
    def _error(self, positions: str) -> float:
        """The largest difference of logits from one eager forward, relative to the largest logit.

        Before the first forward there is one of other tokens, as if a draft had been rejected.
        """
        net = self.ragged.model
        vocab = net.config.get_text_config().vocab_size
        ids = torch.randint(vocab, (1, LENGTH), generator=torch.Generator().manual_seed(1))
        at = torch.arange(LENGTH)[None]

        def scored(cache: RaggedCache, tokens: Tensor, places: Tensor, run: Any) -> Tensor:
            cache.place(places)
            with self.ragged.lock:
                logits: Tensor = run(cache, Forward(tokens, places, places, (), 0))[0]
            return logits.float()

        expected = scored(RaggedCache(1, LENGTH), ids, at, self.ragged.eager)
        cache = RaggedCache(1, LENGTH + BUCKET)
        scored(cache, ids[:, :PROMPT], at[:, :PROMPT], self.ragged.eager)
        begin = PROMPT
        errors = []
        first = slice(PROMPT, PROMPT + TEST[positions][0])
        scored(cache, (ids[:, first] + 1) % vocab, at[:, first], self._run)
        for count in TEST[positions]:
            part = slice(begin, begin + count)
            logits = scored(cache, ids[:, part], at[:, part], self._run)
            errors.append((logits - expected[:, part]).abs().max())
            begin += count
        return float(torch.stack(errors).max() / expected.abs().max().clamp(min=1e-9))

    def _run(
        self, cache: RaggedCache, forward: Forward
    ) -> tuple[Float[Tensor, "R N V"], list[Float[Tensor, "R N D"]]]:
        if not cache.reserved:
            self._reserve(cache)
        for layer in self.compiled:
            vars(layer.layer)["forward"] = layer
        try:
            return self.ragged.eager(cache, forward)
        finally:
            for layer in self.compiled:
                del vars(layer.layer)["forward"]

    def _reserve(self, cache: RaggedCache) -> None:
        """Room for the keys and values of every layer, which an eager write would make."""
        for kind in self.kinds:
            like = [
                torch.empty(1, heads, 1, width, dtype=getattr(torch, dtype))
                for heads, width, dtype in kind.description["stores"]
            ]
            for index in kind.layers:
                cache.reserve(index, *like)

    def fail(self, reason: str, positions: str | None = None) -> None:
        """One range of positions stays eager (None: all of them)."""
        for name in self.states if positions is None else [positions]:
            self.states[name] = f"eager: {reason}"
        warn(reason)


def warn(reason: str) -> None:
    """One line that says why layers are not compiled."""
    warnings.warn(f"layers are not compiled: {reason}; decoding stays eager", stacklevel=3)


def _loader(path: Path) -> Any:
    """A compiled layer; its forwards take turns. Raises RuntimeError if it cannot be loaded."""
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)


def _kinds(ragged: RaggedModel, layers: list[nn.Module]) -> list[LayerKind]:
    """The kinds of layers, by one short forward."""
    cache = RaggedCache(1, BUCKET)
    ids = torch.zeros(1, 3, dtype=torch.long, device=next(ragged.model.parameters()).device)
    at = torch.arange(3, device=ids.device)[None]
    recordings = recorded(ragged, layers, lambda: ragged.forward(cache, ids, at))
    groups = kinds(ragged, layers, recordings, cache)
    if len(groups) > KINDS:
        raise UnsupportedModelError(f"they are of {len(groups)} kinds (at most {KINDS})")
    return groups


def _modules(layers: list[nn.Module]) -> list[int]:
    """What must not change: the modules of the layers, and their hooks."""
    return [
        -1 if hooked(module) else id(module)
        for layer in layers
        for module in layer.modules()
        if module is not layer
    ]
