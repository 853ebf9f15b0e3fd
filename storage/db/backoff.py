"""
Backoff of delayed jobs, measured so that wall clocks may differ and jump.

`not_before` is a time of the clock that wrote it: on SQLite each worker's own, which may differ by hours
from that of the reader. So each process records, by its own monotonic clock, when it first sees that a job
is delayed, and decides once how long the delay lasts: until `not_before`, but no longer than the backoff
that the row records, and no shorter than what must remain of it if the job was not delayed at the previous
observation.
"""

import time
from collections.abc import Callable, Iterable
from threading import Lock
from typing import NamedTuple

BACKOFF_S = (2.0, 10.0, 30.0, 60.0)

OBSERVE_EVERY_S = 0.5
OBSERVE_SHARE = 50.0
"""Minimum ratio of interval and duration: slow observations, of very many jobs, are made less often."""

Key = tuple[int, float]
"""A job's id and its `not_before`: together they identify one delay."""


class Wait(NamedTuple):
    """One delayed job, as first observed."""

    key: Key
    remaining_s: float  # by the database's clock
    waits: int
    crash_count: int
    error_code: str | None

    def bounds(self) -> tuple[float, float]:
        """Return the shortest and the longest backoff that this delay can have."""
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
    """The delayed jobs that this process has observed, and when each is due; thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._due: dict[Key, float] = {}
        self._observed_at: float | None = None
        self._observe_again_at = 0.0

    def observe(
        self, keys: Callable[[], Iterable[Key]], facts: Callable[[list[Key]], Iterable[Wait]]
    ) -> bool:
        """
        Record which jobs are delayed, unless that was done a moment ago.

        Args:
            keys: reads the keys of all delays.
            facts: reads the other columns of new ones.

        Returns:
            False if it was done a moment ago.
        """
        with self._lock:
            began = time.monotonic()
            if began < self._observe_again_at:
                return False
            there = set(keys())
            new = [key for key in there if key not in self._due]
            gap_s = None if self._observed_at is None else began - self._observed_at
            due = {key: at for key, at in self._due.items() if key in there}
            due |= {one.key: began + remaining(one, gap_s) for one in facts(new)} if new else {}
            self._due, self._observed_at = due, began
            now = time.monotonic()
            self._observe_again_at = now + max(OBSERVE_EVERY_S, OBSERVE_SHARE * (now - began))
            return True

    def due(self, most: int) -> list[Key]:
        """Return delays that are over, the earliest first."""
        now = time.monotonic()
        with self._lock:
            over = sorted((at, key) for key, at in self._due.items() if at <= now)
        return [key for _, key in over[:most]]

    def next_s(self, *, complete: bool) -> float | None:
        """
        Return the seconds until a delay is over; None if there is none.

        Args:
            complete: no job can be delayed since the last observation; else the next observation counts.
        """
        with self._lock:
            at = min(self._due.values(), default=None)
            if not complete:
                at = self._observe_again_at if at is None else min(at, self._observe_again_at)
        return None if at is None else max(0.0, at - time.monotonic())


def remaining(one: Wait, gap_s: float | None) -> float:
    """
    Return the seconds that a delay still lasts.

    Args:
        gap_s: since the last observation, at which it did not exist; None: this is the first one.
    """
    least_s, most_s = one.bounds()
    at_least_s = 0.0 if gap_s is None else least_s - gap_s
    return max(0.0, at_least_s, min(one.remaining_s, most_s))
