"""How the Celery task wakes its supervisor: a line over a unix socket, answers until it is idle again."""

import socket
from collections.abc import Iterator

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
