"""
The wake-up socket: how the Celery processes of a worker wake its supervisor.

Celery's main process sends "received" as soon as a notification has arrived, so that the supervisor claims
while Celery still hands the message to its pool process. The task in the pool process then connects, gets
the outcome of that claim, and waits until the supervisor is idle. Celery fetches no further notification
meanwhile, so that later ones go to other, idle workers.

    main process → supervisor   received
    task → supervisor           wait
    supervisor → task           claimed N, nothing or busy; then idle
"""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

WAKE_ENV = "GANQ_WAKE_SOCKET"
REQUEST_S = 0.1
"""A client sends its request right after it has connected."""


# --- Celery's side ------------------------------------------------------------------------


def send_received(path: str) -> None:
    """Report that a notification has arrived. Best effort: its task wakes the supervisor in any case."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect(path)
        sock.sendall(b"received\n")


def wait_until_idle(path: str) -> Iterator[str]:
    """
    Wake a supervisor and wait for it.

    Yields:
        'claimed N', 'nothing' or 'busy', then 'idle' once there is nothing more to do. Ends at once if no
        supervisor listens.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(path)
            sock.sendall(b"wait\n")
            with sock.makefile("r", encoding="ascii") as lines:
                for line in lines:
                    yield line.strip()
    except OSError:
        return


# --- the supervisor's side ----------------------------------------------------------------


class WakeSocket:
    """The supervisor's end: answers each task at once, and releases it when there is nothing more to do."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(16)
        self.waiting: list[socket.socket] = []

    def accept(self) -> socket.socket | None:
        """
        Accept one connection and read its request.

        Returns:
            The connection of a task, which gets an answer; None: a notification has arrived, and its task
            follows.
        """
        sock, _ = self.listener.accept()
        sock.settimeout(REQUEST_S)
        request = b""
        with suppress(OSError):
            request = sock.recv(16)
        sock.settimeout(None)
        if request == b"received\n":
            sock.close()
            return None
        return sock

    def hold(self, sock: socket.socket, reply: str) -> None:
        """Answer a task and keep it waiting until release()."""
        _send(sock, reply)
        self.waiting.append(sock)

    def answer(self, sock: socket.socket, reply: str) -> None:
        """Answer a task and let it end."""
        _send(sock, reply)
        sock.close()

    def release(self) -> None:
        """End all waiting tasks, so that Celery fetches the next notification."""
        for sock in self.waiting:
            self.answer(sock, "idle")
        self.waiting.clear()

    def close(self) -> None:
        self.release()
        self.listener.close()


def _send(sock: socket.socket, reply: str) -> None:
    with suppress(OSError):
        sock.sendall(reply.encode() + b"\n")
