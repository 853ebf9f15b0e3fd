"""
Check whether the file system of a folder answers.

A call on a hard NFS mount without its server, or on FUSE without its daemon, blocks until that is back, and
even SIGKILL may not end a process that waits there. So a child process makes the call.
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
    Check that the volume answers, even if only with an error.

    Raises:
        VolumeError: there is no answer in time.
    """
    if not is_reachable(volume, within_s):
        raise VolumeError(timeout_message(volume, within_s), hint=HINT)


def timeout_message(volume: Path, within_s: float = ANSWER_S) -> str:
    """Return the message about a volume that does not answer."""
    return f"the volume {volume} does not answer (waited {within_s:.0f} s)"


def is_reachable(folder: Path, within_s: float = ANSWER_S) -> bool:
    """
    Return whether the folder's file system answers, even if with an error.

    A child that hangs is not waited for; it exits when the file system is back.
    """
    try:
        child = os.fork()
    except OSError:  # no process can be started; the next call will find out
        return True
    if child == 0:
        _call_statvfs(os.fsencode(folder))
    deadline, pause_s = time.monotonic() + within_s, 0.0005
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() >= deadline:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    return True


def _call_statvfs(folder: bytes) -> None:
    """Make the call in the child process; only system calls are safe after fork."""
    try:
        # A reader of the command's output must not wait for this process.
        os.closerange(0, 3)
        # Not stat(2), which the cache of NFS may answer.
        os.statvfs(folder)
    finally:
        os._exit(0)
