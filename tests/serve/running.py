"""A server on a socket of its own, and a line to it that can be cut."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The server's address, while it runs."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def relay(url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """An address that forwards to the server at `url`, and what cuts all of its connections."""
    port = urlsplit(url).port
    pairs: list[tuple[socket.socket, socket.socket]] = []
    pumps: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):  # the listener has been shut down
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                pairs.append((client, server))
                for ends in ((client, server), (server, client)):
                    pumps.append(threading.Thread(target=_pump, args=ends))
                    pumps[-1].start()

    def cut() -> None:
        for ends in pairs:
            for end in ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", cut
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(60)
        cut()
        for pump in pumps:
            pump.join(60)
        for end in (listener, *(end for ends in pairs for end in ends)):
            end.close()
