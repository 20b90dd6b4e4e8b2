"""CUDA graphs of a target's forwards: the launches of a whole forward, replayed in one call.

A graph reads and writes fixed places, so that it belongs to one cache and to one shape: rows,
positions, attended slots. The first forward of a shape is eager, the second is captured and
compared with the eager one, later ones are replayed. A cache's graphs are freed with it.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdiff.compiled.compilation import warn
from specdiff.errors import UnsupportedModelError
from specdiff.models.cache import RaggedCache
from specdiff.models.masks import ConfigMasks
from specdiff.models.ragged import Forward, RaggedModel, Runner
from specdiff.models.self_test import COARSE, TOLERANCE

POSITIONS = 16  # of a forward, at most: longer ones keep the device busy anyway
GRAPHS = 32  # of a cache, at most; the oldest is dropped
Result = tuple[Float[Tensor, "R N V"], list[Float[Tensor, "R N D"]]]


@dataclass(frozen=True)
class Graph:
    """A captured forward, and the places of its arguments and results."""

    graph: Any
    arguments: Forward
    rows: Int[Tensor, "R 1"]  # of the cache; the graph reads them too
    result: Result

    def replay(self, forward: Forward) -> Result:
        self.arguments.ids.copy_(forward.ids)
        self.arguments.at.copy_(forward.at)
        self.arguments.positions.copy_(forward.positions)
        self.graph.replay()
        logits, states = self.result
        # the next replay overwrites them
        return logits.clone(), [state.clone() for state in states]


class Graphs(Runner):
    """Forwards of one target on one CUDA device.

    Raises UnsupportedModelError for a model on several devices, or one that is changed at every
    call.
    """

    def __init__(self, ragged: RaggedModel) -> None:
        tensors = [*ragged.model.parameters(), *ragged.model.buffers()]
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or any("_hf_hook" in vars(part) for part in ragged.model.modules()):
            raise UnsupportedModelError(f"they lie on {len(devices)} devices, or are offloaded")
        if type(ragged.masks) is not ConfigMasks:
            raise UnsupportedModelError("its layers are changed at every call")
        self.ragged = ragged
        self.device = devices.pop()
        self.pool = torch.cuda.graph_pool_handle()
        self.states = {"CUDA graphs": "captured as shapes come up"}
        self.problem = ""
        self.finished = threading.Event()
        self.finished.set()

    def run(self, cache: RaggedCache, forward: Forward) -> Result:
        shape = (*forward.ids.shape, cache.bound, forward.taps, forward.last)
        eager = self.problem or forward.related is not None or not cache.whole
        if eager or not cache.keys or shape[1] > POSITIONS:
            return self.ragged.eager(cache, forward)
        graph = cache.graphs.get(shape)
        if isinstance(graph, Graph):
            return graph.replay(forward)
        result = self.ragged.eager(cache, forward)
        if shape not in cache.graphs:
            cache.graphs[shape] = None
            if len(cache.graphs) > GRAPHS:
                del cache.graphs[next(iter(cache.graphs))]
            return result
        try:
            captured = self._captured(cache, forward)
            self._compare(captured.replay(forward), result)
            cache.graphs[shape] = captured
        except (RuntimeError, UnsupportedModelError) as error:
            self.problem = " ".join(str(error).split())[:200]
            self.states = {"CUDA graphs": f"eager: {self.problem}"}
            warn(self.problem)
            return self.ragged.eager(cache, forward)  # the slots may hold anything now
        return result

    def refresh(self) -> None:
        """Nothing: a new cache has no graphs yet."""

    def wait(self, timeout: float | None = None) -> bool:
        """Nothing runs in the background. Returns whether graphs can be captured."""
        return not self.problem

    def _captured(self, cache: RaggedCache, forward: Forward) -> Graph:
        copies = Forward(
            forward.ids.clone(),
            forward.at.clone(),
            forward.positions.clone(),
            forward.taps,
            forward.last,
        )
        own = cache.index
        assert own is not None, "place comes first"
        rows = own[0].clone()
        graph = torch.cuda.CUDAGraph()
        cache.index = rows, copies.at
        try:
            # other threads may use the device meanwhile
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode=mode):
                result = self.ragged.eager(cache, copies)
        finally:
            cache.index = own
        return Graph(graph, copies, rows, result)

    def _compare(self, result: Result, expected: Result) -> None:
        largest = expected[0].float().abs().max().clamp(min=1e-9)
        error = float((result[0].float() - expected[0].float()).abs().max() / largest)
        allowed = TOLERANCE.get(self.ragged.model.dtype, COARSE)
        if not error <= allowed:
            raise UnsupportedModelError(
                f"a graph differs from the eager forward by {error:.1e} (allowed {allowed:.0e})"
            )
