"""
When a running job has to stop, and when to stop waiting for it: wishes, its time limit, and silence.

Everything here is by the monotonic clock of the supervisor.
"""

import time
from collections.abc import Mapping
from typing import Any, Literal

from jobs.durations import in_words
from jobs.errors import TimeLimitError
from jobs.states import StopReason
from storage.db.rows import Job, Lease

CANCEL_GRACE_S = 10.0
"""The GPU is free 15 s after a cancel: 1 s until it is seen, this, and the kill."""
HASTE_S = 5.0
"""What a second SIGTERM leaves a running job: it loses no more than it did since its last checkpoint."""
SAME_SIGNAL_S = 1.0
"""A service manager may send one SIGTERM to each process, and our launcher passes on its own."""
AWAY_S = 10.0
"""A round of the supervisor's loop that took longer: it was stopped, or waited for the database."""
QUIET_FACTOR = 6.0
"""Loading, saving and publishing say nothing while they last, and a slow volume makes them last."""

COUNTERS = ("done", "total", "epoch", "phase")


class Watchdog:
    """Over one job at a time: what it was asked, by when it must obey, when it last moved."""

    def __init__(self, stall_seconds: float) -> None:
        self.stall_s = stall_seconds
        self.asked: StopReason | None = None
        self.deadline = 0.0
        self.limit_at: float | None = None
        self.checked_at = self.moved_at = time.monotonic()
        self.quiet: str | None = None
        self._counters: tuple[Any, ...] = ()

    def begin(self, lease: Lease) -> None:
        """A job was claimed."""
        self.asked, self.limit_at = None, None
        if lease.job.time_limit_s is not None:
            self.limit_at = lease.claimed_at + lease.job.time_limit_s - lease.job.ran_s
        self.moved("starting")

    def end(self) -> None:
        """It is settled, or somebody else's."""
        self.asked, self.limit_at = None, None

    # --- stopping -------------------------------------------------------------------------

    def ask(self, reason: StopReason, grace_s: float) -> None:
        self.asked, self.deadline = reason, time.monotonic() + grace_s

    def hasten(self, grace_s: float) -> None:
        """It must obey sooner."""
        self.deadline = min(self.deadline, time.monotonic() + grace_s)

    @property
    def time_is_up(self) -> bool:
        return self.limit_at is not None and time.monotonic() >= self.limit_at

    @property
    def next_s(self) -> float:
        """Seconds until there may be something to do."""
        if self.asked is not None:
            return 0.5
        if self.limit_at is None:
            return 5.0
        return min(max(self.limit_at - time.monotonic(), 0.0), 5.0)

    # --- moving ---------------------------------------------------------------------------

    def heard(self, message: Mapping[str, Any]) -> None:
        """
        A message of the runner. One that says how far the work is counts only if that has changed:
        a thread that goes on reporting beside a hung one is no progress.
        """
        if message["op"] == "quiet":
            self.moved(message["why"])
            return
        if message["op"] != "progress":
            self.moved(self.quiet)
            return
        facts = message["progress"]
        counters = tuple(facts.get(name) for name in COUNTERS)
        if counters != self._counters:
            self._counters = counters
            self.moved(facts.get("phase"))

    def moved(self, quiet: str | None = None) -> None:
        """
        Args:
            quiet: what it does now, if that says nothing while it lasts.
        """
        self.moved_at, self.quiet = time.monotonic(), quiet

    def excuse_own_pause(self) -> None:
        """We were away ourselves: words of the runner may lie unread, or it was stopped as we were."""
        now = time.monotonic()
        if now - self.checked_at > AWAY_S:
            self.moved_at = now
        self.checked_at = now

    @property
    def still_s(self) -> float:
        """Seconds since the work last moved."""
        return time.monotonic() - self.moved_at

    def verdict(self) -> Literal["overdue", "time is up", "hung"] | None:
        """What is to be done about the job now, if anything."""
        if self.asked is not None:
            return "overdue" if time.monotonic() >= self.deadline else None
        if self.time_is_up:
            return "time is up"
        if self.stall_s and self.still_s > self.stall_s * (QUIET_FACTOR if self.quiet else 1.0):
            return "hung"
        return None


def time_limit_error(job: Job, *, has_checkpoint: bool) -> TimeLimitError:
    """How a job ends that has run for as long as it may."""
    if has_checkpoint:
        epochs = job.spec.get("epochs", "N")
        hint = f"its last checkpoint is safe: ganq submit train --continue {job.id} --epochs {epochs} goes on"
    else:
        hint = "submit it again with a longer --time-limit"
    return TimeLimitError(f"it has run for its time limit of {in_words(job.time_limit_s or 0.0)}", hint=hint)
