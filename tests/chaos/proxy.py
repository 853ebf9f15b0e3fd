"""
A TCP proxy that breaks connections as networks do: for Postgres, Redis, or anything that speaks TCP.

    cut                every connection is reset; new ones too, until heal()
    hole               connections stay open, and nothing passes any more: half-open
    delay              each piece waits before it passes
    lose_reply_to      a request is delivered and carried out; the connection breaks before its answer
"""

import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Self

TICK_S = 0.02
PIECE_BYTES = 65_536


class Proxy:
    """
    Listens on a loopback port and forwards everything to another.

    Args:
        port: of the real server, on the loopback interface.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.delay_s = 0.0
        self.lost = 0
        """Answers that were lost because of lose_reply_to()."""
        self.asked = 0
        """Pieces that came from clients: trips, of a protocol in which each is answered before the next."""
        self._cutting = False
        self._holed = False
        self._losing: list[bytes] = []
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._closed = False
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    # --- what a test does -------------------------------------------------------------------

    def cut(self) -> None:
        """Reset all connections, and every new one."""
        self._cutting = True
        self.reset()

    def reset(self) -> None:
        """Reset the existing connections; new ones work."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _reset(*pair)

    def hole(self) -> None:
        """Discard all data: the peers see connections that stay open and transmit nothing."""
        self._holed = True

    def heal(self) -> None:
        """End the fault; data held back by a hole is delivered now, as TCP retransmits it."""
        self._cutting = self._holed = False
        self.delay_s = 0.0

    def lose_reply_to(self, request: bytes, *, times: int = 1) -> None:
        """Cut when the server has answered the next request with these bytes, before its answer passes."""
        self._losing += [request] * times

    # --- inside -----------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self._cutting:
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.upstream), timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._pairs.append((client, server))
            link = _Link(self, client, server)
            for target in (link.up, link.down):
                thread = threading.Thread(target=target, daemon=True)
                thread.start()
                self.threads.append(thread)

    def _held(self) -> None:
        while self._holed and not self._closed:
            time.sleep(TICK_S)
        if self.delay_s:
            time.sleep(self.delay_s)

    def _loses(self, piece: bytes) -> bool:
        with self._lock:
            for wanted in self._losing:
                if wanted in piece:
                    self._losing.remove(wanted)
                    return True
        return False

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.reset()
        for thread in self.threads:
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.losing = False

    def up(self) -> None:
        self._pass_on(self.client, self.server)

    def down(self) -> None:
        self._pass_on(self.server, self.client)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                self.proxy._held()
                if source is self.client:
                    self.proxy.asked += 1
                    self.losing = self.losing or self.proxy._loses(piece)
                if source is self.server and self.losing:
                    self.proxy.lost += 1
                    break
                target.sendall(piece)
        _reset(self.client, self.server)


def _reset(*sockets: socket.socket) -> None:
    """Close with RST, as a firewall or a crashed host does."""
    for one in sockets:
        with suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads from it
        with suppress(OSError):
            one.close()
