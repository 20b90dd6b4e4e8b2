"""The guard in front of the endpoints: who may ask, how much is read, and what is logged.

Everything here is decided before a body is parsed: a burst of requests that the queue cannot hold
is refused at the price of their heads. The access log has method, path, status and time; bodies,
queries and keys are never logged.
"""

import asyncio
import hmac
import logging
import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdiff.serve import playground
from specdiff.serve.error_answers import answer, status
from specdiff.serve.live import EngineStoppedError, LiveEngine, QueueFullError

MAX_BODY = 4 * 2**20  # bytes
BODY_SECONDS = 10.0  # in which a body must arrive
OPEN_PATHS = ("/health",)  # without a key
GENERATION_PATHS = ("/v1/completions", "/v1/chat/completions")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOGGED_PATH = 100  # characters

access = logging.getLogger("specdiff.access")
faults = logging.getLogger("specdiff.faults")


class RefusedError(Exception):
    """A request that reaches no endpoint."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Guard:
    """ASGI middleware around `app`.

    Args:
        api_key: what clients must send as a bearer token, compared in constant time.
        hosts: the names in the Host header that are answered (None: any). A page that lets its
            own name point to this machine could otherwise read answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        engine: LiveEngine,
        api_key: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app = app
        self.engine = engine
        self.api_key = api_key
        self.hosts = hosts
        self.arriving = 0  # requests that have a place in the queue and are not submitted yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        try:
            self._check(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = _replay(await _body(scope, receive), receive)
            with self._arrival(scope):
                await self.app(scope, receive, exchange.send)
        except RefusedError as refusal:
            await answer(refusal.code, str(refusal))(scope, receive, exchange.send)
        except Exception as error:  # a fault of the server: its message may quote a prompt
            faults.error("%s: %s at %s", exchange.id, type(error).__name__, _place(error))
            if not exchange.status:
                message = f"internal error; the server's log names it by {exchange.id}"
                await answer(500, message)(scope, receive, exchange.send)
        finally:
            exchange.log()

    def _check(self, scope: Scope) -> None:
        """Raise RefusedError for a request that needs no reading."""
        headers = dict(scope["headers"])
        if self.hosts is not None and _host(headers) not in self.hosts:
            raise RefusedError(
                421, "unknown Host header; a server without --api-key answers local names only"
            )
        public = scope["path"] in OPEN_PATHS or playground.is_open(scope["path"])
        if self.api_key is not None and not public:
            scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(sent.strip(), self.api_key.encode())
            if scheme.lower() != b"bearer" or not right:
                raise RefusedError(
                    401, "wrong or missing API key; send 'Authorization: Bearer KEY'"
                )
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > MAX_BODY:
            raise RefusedError(413, f"the body has {int(size)} bytes; at most {MAX_BODY} are read")
        if _generates(scope):
            self._check_room()

    @contextmanager
    def _arrival(self, scope: Scope) -> Iterator[None]:
        """Hold a place in the queue for a request until it calls `scope["arrived"]`, or ends.

        All requests of a burst would see the same empty queue while they are parsed and tokenized.
        """
        if not _generates(scope):
            yield
            return
        self._check_room()  # again: the body may have taken a while
        pending = True

        def arrived() -> None:
            nonlocal pending
            self.arriving -= pending
            pending = False

        self.arriving += 1
        scope["arrived"] = arrived
        try:
            yield
        finally:
            arrived()

    def _check_room(self) -> None:
        try:
            self.engine.check_room(self.arriving + 1)
        except (QueueFullError, EngineStoppedError) as error:
            raise RefusedError(status(error), str(error)) from None


class Exchange:
    """One request and its answer, for the log; the answer carries the id of the log."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.forward = send
        self.id = f"req-{random.getrandbits(64):016x}"  # no secret
        self.began = time.monotonic()
        self.status = 0  # no answer has begun

    async def send(self, message: Message) -> None:
        """Pass on a message of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.id.encode())]
        await self.forward(message)

    def log(self) -> None:
        """Log the request, once it has ended. `499`: the client hung up first."""
        client = self.scope.get("client") or ("-",)
        path = self.scope.get("raw_path") or self.scope["path"].encode()
        access.info(
            "%s %s %s %d %.0fms id=%s",
            client[0],
            self.scope["method"],
            ascii(path[:LOGGED_PATH].decode("ascii", "replace"))[1:-1],
            self.status or 499,
            1000 * (time.monotonic() - self.began),
            self.id,
        )


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises RefusedError if it is too long, too slow, or breaks off."""
    body = b""
    more = True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(499, "the client has hung up")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY:
                    raise RefusedError(413, f"the body is longer than {MAX_BODY} bytes")
    except TimeoutError:
        raise RefusedError(
            408, f"the body did not arrive within {BODY_SECONDS:g} seconds"
        ) from None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, then what follows it: the disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _generates(scope: Scope) -> bool:
    return scope["path"] in GENERATION_PATHS and scope["method"] == "POST"


def _host(headers: dict[bytes, bytes]) -> str:
    """The name in the Host header, without the port."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host


def _place(error: Exception) -> str:
    """The file and line that raised."""
    trace: Any = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        "-"
        if trace is None
        else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    )
