"""A receiver of webhooks: a real HTTP server that verifies signatures with the library of the standard."""

import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from standardwebhooks import Webhook


class Server(ThreadingHTTPServer):
    """Takes a whole batch of connections at once: one that waits for a place does so for a second."""

    request_queue_size = 128


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    id: str
    host: str
    message: dict[str, Any]
    status: int
    """What the receiver answered."""

    @property
    def taken(self) -> bool:
        return 200 <= self.status < 300

    @property
    def job(self) -> int:
        return int(self.message["data"]["job"]["id"])

    @property
    def event(self) -> int:
        return int(self.message["data"]["event"])


class Receiver:
    """
    Listens on the loopback interface while the block runs.

    Args:
        answer: returns the status for the n-th request, beginning with 1; and a header of the answer.
        address: of the loopback network.
        certificate: of the server and its key, for TLS.
    """

    def __init__(
        self,
        answer: Callable[[int], int | tuple[int, tuple[str, str]]] = lambda number: 204,
        address: str = "127.0.0.1",
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.answer = answer
        self.secret = ""
        """Requests whose signature it does not fit are answered with 401."""
        self.received: list[Received] = []
        self.lock = threading.Lock()
        self.requests = 0
        self.released = threading.Event()
        """Requests to /hang wait for it."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Server((address, 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.port = int(self.server.server_address[1])
        self.url = f"http://{address}:{self.port}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers["content-length"])
        body = request.rfile.read(length)
        if len(body) < length:  # the sender was killed
            return
        if request.path.startswith("/hang"):
            self.released.wait(60)
        with self.lock:
            self.requests += 1
            said = self.answer(self.requests)
        status, header = said if isinstance(said, tuple) else (said, None)
        try:
            message = json.loads(body)
            if self.secret:
                message = Webhook(self.secret).verify(body, dict(request.headers.items()))
        except Exception as exc:
            status, message = 401, {"error": repr(exc)}
        with self.lock:
            self.received.append(
                Received(
                    request.path,
                    str(request.headers.get("webhook-id")),
                    str(request.headers["host"]),
                    message,
                    status,
                )
            )
        request.send_response(status)
        if header is not None:
            request.send_header(*header)
        request.send_header("content-length", "0")
        request.end_headers()

    def taken(self, path: str = "") -> list[Received]:
        """What was taken, in the order of arrival."""
        with self.lock:
            return [one for one in self.received if one.taken and one.path.startswith(path)]

    def __enter__(self) -> Self:
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, name="receiver", daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def wait_until(true: Callable[[], Any], within_s: float = 20.0) -> None:
    """Wait for what another thread or process brings about."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s"
        time.sleep(0.02)
