"""
Messages between the supervisor and its runner or volume process: one JSON object per line.

    supervisor → runner   run {order: the assignment} · stop {reason} · ack {ok} · forgotten {paths}
    runner → supervisor   ready · progress · quiet · inputs · event · checkpoint (waits for its ack)
                          done {result} · stopped {reason} · failed {code, message, hint} · crashed {message}

Keys and values of "op" do not change: after an upgrade in place, a supervisor of the old version starts
runners of the new one.
"""

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end of a socket pair. Several threads may send."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._pending = b""

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, op: str, **fields: Any) -> None:
        """
        Send one message.

        Raises:
            OSError: the other end is closed.
        """
        line = json.dumps({"op": op, **fields}, allow_nan=False).encode() + b"\n"
        with self._lock:
            self.sock.sendall(line)

    def receive(self) -> list[Message] | None:
        """Read once and return the complete messages that have arrived; None: the other end is closed."""
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
