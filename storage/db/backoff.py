"""
When a job that waits for its retry is due, judged so that no wall clock can break it.

`not_before` is a time of the clock of whoever wrote it: on SQLite each worker's own, which may be
hours from that of the worker that reads it, and any clock may be set meanwhile. So each process
notes by its own monotonic clock when it first sees a job wait, and decides once how long it still
waits: until `not_before`, but no longer than the backoff that the row records, and no shorter than
what must remain of it if the job was not yet waiting at the look before.
"""

import time
from collections.abc import Callable, Iterable
from threading import Lock
from typing import NamedTuple

BACKOFF_S = (2.0, 10.0, 30.0, 60.0)

LOOK_EVERY_S = 0.5
LOOK_SHARE = 50.0
"""A look that takes longer, because very many wait, is made less often."""

Key = tuple[int, float]
"""A job's id and its `not_before`: together they name one wait."""


class Wait(NamedTuple):
    """One job that waits, as it is first seen."""

    key: Key
    remaining_s: float  # by the database's clock
    waits: int
    crash_count: int
    error_code: str | None

    def bounds(self) -> tuple[float, float]:
        """Return the least and the greatest backoff that this wait can have."""
        if self.error_code in ("CRASHED", "STALLED"):
            return _nth(self.crash_count), _nth(self.crash_count)
        if self.error_code == "WORKER_LOST":
            return BACKOFF_S[0], BACKOFF_S[-1]
        if self.waits > 0:
            return _nth(self.waits), _nth(self.waits)
        return 0.0, BACKOFF_S[-1]


def _nth(times: int) -> float:
    return BACKOFF_S[min(max(times, 1), len(BACKOFF_S)) - 1]


class Backoffs:
    """The waiting jobs that this process has seen, and when each is due; used by several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._due: dict[Key, float] = {}
        self._looked_at: float | None = None
        self._look_again_at = 0.0

    def look(self, keys: Callable[[], Iterable[Key]], facts: Callable[[list[Key]], Iterable[Wait]]) -> bool:
        """
        Note which jobs wait, unless that was done a moment ago.

        Args:
            keys: reads all waits.
            facts: reads more of those that are new.

        Returns:
            False: it was done a moment ago.
        """
        with self._lock:
            began = time.monotonic()
            if began < self._look_again_at:
                return False
            there = set(keys())
            new = [key for key in there if key not in self._due]
            gap_s = None if self._looked_at is None else began - self._looked_at
            due = {key: at for key, at in self._due.items() if key in there}
            due |= {one.key: began + remaining(one, gap_s) for one in facts(new)} if new else {}
            self._due, self._looked_at = due, began
            now = time.monotonic()
            self._look_again_at = now + max(LOOK_EVERY_S, LOOK_SHARE * (now - began))
            return True

    def due(self, most: int) -> list[Key]:
        """Return waits that are over, the longest first."""
        now = time.monotonic()
        with self._lock:
            over = sorted((at, key) for key, at in self._due.items() if at <= now)
        return [key for _, key in over[:most]]

    def next_s(self, *, complete: bool) -> float | None:
        """
        Return the seconds until a wait is over; None if nothing waits.

        Args:
            complete: no job may have begun to wait since the last look; else the next look comes first.
        """
        with self._lock:
            at = min(self._due.values(), default=None)
            if not complete:
                at = self._look_again_at if at is None else min(at, self._look_again_at)
        return None if at is None else max(0.0, at - time.monotonic())


def remaining(one: Wait, gap_s: float | None) -> float:
    """
    Return the seconds that a wait still lasts.

    Args:
        gap_s: since the last look, at which it was not there; None: this is the first look.
    """
    least_s, most_s = one.bounds()
    at_least_s = 0.0 if gap_s is None else least_s - gap_s
    return max(0.0, at_least_s, min(one.remaining_s, most_s))
