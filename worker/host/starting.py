"""
Start processes and threads on a machine whose limit of processes may be reached for some time.

A limit on processes (RLIMIT_NPROC, or the pids limit of a container or service) counts threads, too, and is
shared with other programs, so a shortage passes. Nothing here gives up.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from jobs.errors import one_line

T = TypeVar("T")

PAUSE_S = (0.5, 1.0, 2.0, 5.0, 10.0)
POLL_S = 0.1


def is_shortage(exc: BaseException) -> bool:
    """Return whether this error means that no process or thread can be started now."""
    if isinstance(exc, OSError):
        return exc.errno == errno.EAGAIN
    return isinstance(exc, RuntimeError) and str(exc) == "can't start new thread"


def until_started(
    start: Callable[[], T], what: str, log: logging.Logger, stopped: Callable[[], bool] = lambda: False
) -> T | None:
    """
    Start a process or a thread; if that fails, log it and retry with growing pauses.

    Args:
        what: its name in the log.
        stopped: returns whether it is no longer needed.

    Returns:
        The result of `start`; None if it is no longer needed.
    """
    tries = 0
    while not stopped():
        try:
            return start()
        except (OSError, RuntimeError) as exc:
            if isinstance(exc, RuntimeError) and not is_shortage(exc):
                raise
            pause_s = PAUSE_S[min(tries, len(PAUSE_S) - 1)]
            log.warning("cannot start %s (%s); trying again in %g s", what, one_line(exc), pause_s)
        tries += 1
        wait(pause_s, stopped)
    return None


def wait(seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleep, but at most until `stopped` returns True."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stopped():
        time.sleep(min(left, POLL_S))
