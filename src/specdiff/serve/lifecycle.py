"""The life of a server process: connections that stall are closed, SIGTERM drains, death shows."""

import asyncio
import gc
import logging
import socket
import sys
import time
from math import ceil, inf
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from specdiff.errors import UsageError
from specdiff.serve.live import EngineStoppedError, LiveEngine

HEAD_SECONDS = 10.0  # in which the head of a request must arrive
STALLED_SECONDS = 60.0  # that a client may read nothing of an answer
MOST_CONNECTIONS = 1000  # at a time
NOTICE_SECONDS = 3.0  # that /health says 503 before a failed server exits
LAST_SECONDS = 1.0  # for the answers that a shutdown has canceled
SWITCH_SECONDS = 0.0005  # after which a thread that waits for the interpreter gets it

log = logging.getLogger("specdiff.server")


class TimedConnection(H11Protocol):
    """A connection that is closed if its client neither sends a request nor reads the answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.reading: asyncio.TimerHandle | None = self._close_in(HEAD_SECONDS)
        self.writing: asyncio.TimerHandle | None = None
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop(self.reading)  # a request is being answered
            self.reading = None
        elif self.reading is None:
            self.reading = self._close_in(HEAD_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.writing = self._close_in(STALLED_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self.writing)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self.reading)
        self._stop(self.writing)
        super().connection_lost(exc)

    def _close_in(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT, and exits once the engine has ended or failed.

    While it drains it still listens: /health and new requests get 503, running ones finish. After
    `timeout` seconds the rest is canceled. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, engine: LiveEngine, timeout: float) -> None:
        super().__init__(config)
        self.engine = engine
        self.timeout = timeout
        self.deadline: float | None = None
        self.reported = False  # that the engine has failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.deadline is not None:
            self.force_exit = True
            self.should_exit = True
            return
        self.deadline = time.monotonic() + self.timeout
        self.engine.drain()

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        failed = self.engine.error is not None
        if failed and not self.reported:
            log.error("the engine has failed (%s); exiting", type(self.engine.error).__name__)
            self.reported = True
            self.deadline = min(now + NOTICE_SECONDS, self.deadline or inf)
        late = self.deadline is not None and now >= self.deadline
        if late:
            await asyncio.to_thread(self.engine.close, 0)
        if late or (not failed and not self.engine.alive):
            remaining = LAST_SECONDS if self.deadline is None else self.deadline - now
            self.config.timeout_graceful_shutdown = ceil(max(LAST_SECONDS, remaining))
            return True
        return await super().on_tick(counter)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet. Raises UsageError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once only for sockets that name their protocol; on others the
    # second piece of an answer waits 40 ms for the client's acknowledgment of the first
    address = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except (OSError, OverflowError) as error:
        address.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
        ) from None
    return address


def log_to_stderr() -> None:
    """Write the access log, and the faults of server and engine, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    parent = logging.getLogger("specdiff")
    parent.addHandler(handler)
    parent.setLevel(logging.INFO)


def make_responsive() -> None:
    """Let nothing keep this process's interpreter for long: every connection waits meanwhile.

    The engine's rounds take it again and again between two products, and after each byte that is
    sent the server's thread waits its turn. The objects that exist now, nearly all of torch and
    transformers, live to the end: a collection that visits them takes as long as many rounds, and
    another one delays the exit.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


def run(app: ASGIApp, engine: LiveEngine, address: socket.socket, *, timeout: float) -> None:
    """Serve at `address` until a signal; requests that run then have `timeout` seconds to end.

    Raises EngineStoppedError if the engine fails.
    """
    make_responsive()
    config = uvicorn.Config(
        app,
        http=TimedConnection,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
    )
    Server(config, engine, timeout).run([address])
    if engine.error is not None:
        raise EngineStoppedError(f"the engine has failed: {engine.error}") from engine.error
