"""
How Celery wakes its supervisor.

First a knock, a datagram, as soon as the bell has arrived: the supervisor claims while Celery still
hands the bell to its pool. Then the task's own ring, a line over a unix socket, which is told what
came of it, and waits until the supervisor is idle again.
"""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

WAKE_ENV = "GANQ_WAKE_SOCKET"


def wake(path: str) -> Iterator[str]:
    """
    Ring at a supervisor's socket.

    Yields:
        'claimed N', 'nothing' or 'busy', then 'idle' once it has nothing more to do.
        Ends at once if no supervisor listens.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(path)
            sock.sendall(b"ring\n")
            with sock.makefile("r", encoding="ascii") as lines:
                for line in lines:
                    yield line.strip()
    except OSError:
        return


def knock_path(wake_socket: str) -> str:
    """Where the supervisor behind this wake socket hears knocks; equally long, so it fits, too."""
    path = Path(wake_socket)
    return str(path.with_name(path.name.replace("wake-", "bell-", 1)))


def knock(path: str) -> None:
    """A bell has arrived, and its task will ring in a moment. Best effort: the task rings all the same."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(b"!", knock_path(path))
