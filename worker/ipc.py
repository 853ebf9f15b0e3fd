"""
How the supervisor and its runner talk: one JSON object a line over a socket pair.

supervisor → runner   run {order} · stop {reason} · ack {ok} · forgotten {paths}
runner → supervisor   ready · progress · inputs · event · checkpoint (waits for its ack)
                      done {result} · stopped {reason} · failed {code, message, hint}
"""

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end of the pair. Sending is safe from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._pending = b""

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, op: str, **facts: Any) -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        line = json.dumps({"op": op, **facts}, allow_nan=False).encode() + b"\n"
        with self._lock:
            self.sock.sendall(line)

    def receive(self) -> list[Message] | None:
        """Whole messages that have arrived, after at least one read; None: the other end is gone."""
        try:
            data = self.sock.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def close(self) -> None:
        self.sock.close()
