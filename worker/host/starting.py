"""
Starts processes and threads on a machine that may have none left for some seconds.

A limit on processes (RLIMIT_NPROC, a container's or a service's pids limit) counts threads, too, and
is shared with whatever else runs there: it passes. Nothing here gives up.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from jobs.errors import one_line

T = TypeVar("T")

PAUSE_S = (0.5, 1.0, 2.0, 5.0, 10.0)
LOOK_S = 0.1


def is_shortage(exc: BaseException) -> bool:
    """Return whether this error says that the machine has no process or thread left."""
    if isinstance(exc, OSError):
        return exc.errno == errno.EAGAIN
    return isinstance(exc, RuntimeError) and str(exc) == "can't start new thread"


def until_started(
    start: Callable[[], T], what: str, log: logging.Logger, stopped: Callable[[], bool] = lambda: False
) -> T | None:
    """
    Start a process or a thread; where that fails, say so and try again with a growing pause.

    Args:
        what: its name in the log.
        stopped: whether it is needed no more.

    Returns:
        What `start` returns; None if it is needed no more.
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
    """Sleep, but no longer than until `stopped`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stopped():
        time.sleep(min(left, LOOK_S))
