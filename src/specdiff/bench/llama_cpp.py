"""The baseline `llama.cpp`: its own server on the target's GGUF file, through `xllamacpp`.

It runs with as many threads as torch in a process of its own, as in torch's process it would halve
the speed of everything else measured there, and answers over its loopback address. Its weights stay
quantized and its activations are rounded to 8 bits, so that its distribution is not that of the
target as loaded here: only speeds are compared.
"""

import http.client
import json
import multiprocessing
import time
from contextlib import suppress
from importlib import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from specdiff import catalog
from specdiff.bench.baselines import Decoder
from specdiff.bench.settings import Cell
from specdiff.bench.timing import Measurement, Workload
from specdiff.errors import MissingExtraError, UnsupportedModelError, UsageError

SEEDS = 1 << 32  # number of seeds of llama.cpp


def gguf_file(model: str) -> Path:
    """The GGUF file of a target. Raises UsageError if it has none."""
    from specdiff.models import gguf

    if model in catalog.PACKAGED_MODELS:
        return gguf.packaged(*catalog.PACKAGED_MODELS[model])
    if not model.endswith(".gguf"):
        raise UsageError(
            f"--baselines llama.cpp needs a target that is a GGUF file, not {model!r}; "
            "give --model FILE.gguf"
        )
    return Path(model).expanduser()


def check(model: str) -> None:
    """Raises MissingExtraError without `xllamacpp`, and UsageError for a target without a GGUF."""
    gguf_file(model)
    if util.find_spec("xllamacpp") is None:
        raise MissingExtraError(
            "the baseline llama.cpp needs xllamacpp:  pip install 'specdiff[peers]'"
        )


class LlamaCppDecoder(Decoder):
    """llama.cpp's plain decoding, one prompt at a time, on torch's number of CPU threads.

    slots: positions of prompt and answer. Raises what `check` raises, and UnsupportedModelError if
    llama.cpp cannot load the file.
    """

    def __init__(self, model: str, slots: int) -> None:
        check(model)
        path = str(gguf_file(model))
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        arguments = (theirs, path, slots, torch.get_num_threads())
        self.process = spawn.Process(target=_server, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.pipe = ours  # the server stays as long as this is open
        try:
            error, address = ours.recv()
        except EOFError:
            error, address = "its process died", ""
        if error:
            raise UnsupportedModelError(f"llama.cpp cannot load {path}: {error}")
        self.address = urlsplit(address)

    def run(self, cell: Cell, work: Workload) -> Measurement:
        """Raises UsageError for a batch, and HTTPException if llama.cpp refuses the request."""
        if len(work.prompts) > 1:
            raise UsageError("llama.cpp is measured at batch 1 only")
        body = json.dumps(_request(work))
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(self.address.hostname or "", self.address.port)
        try:
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                reason = response.read()[:300]
                raise http.client.HTTPException(f"llama.cpp refused the request: {reason!r}")
            tokens: list[int] = []
            first = 0.0
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                tokens += json.loads(line.removeprefix(b"data: ")).get("tokens", [])
                if tokens and not first:
                    first = time.perf_counter() - begin
            seconds = time.perf_counter() - begin
        finally:
            connection.close()
        return Measurement([tokens], seconds, first or seconds, min(1, len(tokens)))


def _server(pipe: Connection, path: str, slots: int, threads: int) -> None:
    """Send (error, address), and serve until the other end of the pipe is closed."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = slots
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    try:
        server: Any = xllamacpp.Server(params)
    except RuntimeError as error:
        pipe.send((str(error), ""))
        return
    pipe.send(("", server.listening_address))
    with suppress(EOFError, OSError):
        pipe.recv()


def _request(work: Workload) -> dict[str, Any]:
    """The whole distribution at the workload's temperature, and nothing read from a cache."""
    return {
        "prompt": list(work.prompts[0]),
        "n_predict": work.limits[0],
        "temperature": work.temperature,
        "seed": work.seeds[0] % SEEDS,
        "samplers": ["temperature"],
        "ignore_eos": not work.stop_ids,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": True,
    }
