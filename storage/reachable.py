"""
Whether the file system of a folder answers at all.

A call on a hard NFS mount whose server is gone, or on FUSE whose daemon is stopped, returns when that is
back; a thread that waits there can keep its process from ending even when that is killed. So a child asks.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from jobs.errors import VolumeError

ANSWER_S = 10.0
"""An automounter may need some seconds."""
HINT = "is its server there? ls the folder; a hard mount waits until it is"


def require_answer(volume: Path, within_s: float = ANSWER_S) -> None:
    """
    Raises:
        VolumeError: no answer in time, not even that the folder is missing.
    """
    if not answers(volume, within_s):
        raise VolumeError(silence(volume, within_s), hint=HINT)


def silence(volume: Path, within_s: float = ANSWER_S) -> str:
    """Return the line about a volume that is silent."""
    return f"the volume {volume} does not answer (waited {within_s:.0f} s)"


def answers(folder: Path, within_s: float = ANSWER_S) -> bool:
    """
    Return whether the folder's file system says anything about it, an error included.

    The child is not waited for if it hangs: it ends by itself once the file system is back.
    """
    try:
        child = os.fork()
    except OSError:  # no process is free: whoever looks next will see
        return True
    if child == 0:
        _ask(os.fsencode(folder))
    deadline, pause_s = time.monotonic() + within_s, 0.0005
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() >= deadline:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    return True


def _ask(folder: bytes) -> None:
    """The child: only system calls, as after any fork of a program with libraries."""
    try:
        # Whoever reads what the command prints must not wait for this process, too.
        os.closerange(0, 3)
        # Not stat(2), which a cache of NFS may answer.
        os.statvfs(folder)
    finally:
        os._exit(0)
