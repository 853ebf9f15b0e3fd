"""The supervisor's doorbell: a socket on which Celery's task rings, and waits while there is work."""

import socket
from contextlib import suppress
from pathlib import Path

from worker.celery_bridge.wakeup import knock_path


class WakeSocket:
    """Who rings is told at once what came of it, and dismissed when there is nothing more to do."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(16)
        self.knocks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        Path(knock_path(str(path))).unlink(missing_ok=True)
        self.knocks.bind(knock_path(str(path)))
        self.knocks.setblocking(False)
        self.waiting: list[socket.socket] = []

    def knocked(self) -> bool:
        """Whether somebody has knocked since the last look."""
        found = False
        with suppress(BlockingIOError):
            while self.knocks.recv(16):
                found = True
        return found

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        return sock

    def keep(self, sock: socket.socket, word: str) -> None:
        """Say what came of it; it waits until dismiss()."""
        _say(sock, word)
        self.waiting.append(sock)

    def send_away(self, sock: socket.socket, word: str) -> None:
        """Say what came of it, and good-bye."""
        _say(sock, word)
        sock.close()

    def dismiss(self) -> None:
        """Nothing more to do: Celery may fetch the next bell."""
        for sock in self.waiting:
            self.send_away(sock, "idle")
        self.waiting.clear()

    def close(self) -> None:
        self.dismiss()
        self.listener.close()
        self.knocks.close()


def _say(sock: socket.socket, word: str) -> None:
    with suppress(OSError):
        sock.sendall(word.encode() + b"\n")
