"""
Deadlines of the running job: stop requests, the time limit and the stall timeout.

All times are those of the supervisor's monotonic clock.
"""

import time
from collections.abc import Mapping
from typing import Any, Literal

from jobs.durations import in_words
from jobs.errors import TimeLimitError
from jobs.states import StopReason
from storage.db.rows import Job, Lease

CANCEL_GRACE_S = 10.0
"""With 1 s until a cancel is read, and the kill, the GPU is free 15 s after `ganq cancel`."""
SECOND_SIGNAL_GRACE_S = 5.0
"""After a second SIGTERM a job gets no more; it loses what it did since its last checkpoint."""
SAME_SIGNAL_S = 1.0
"""A service manager may signal each process, and the launcher forwards its signal: these count once."""
OWN_PAUSE_S = 10.0
"""After a longer iteration of the main loop, the loop itself was stopped or waited for the database."""
SILENT_PHASE_FACTOR = 6.0
"""Loading, saving and publishing report no progress, and a slow volume makes them take long."""

COUNTERS = ("done", "total", "epoch", "phase")


class Watchdog:
    """Stop request, deadline and last progress of one job at a time."""

    def __init__(self, stall_seconds: float) -> None:
        self.stall_s = stall_seconds
        self.stop_reason: StopReason | None = None
        self.deadline = 0.0
        self.limit_at: float | None = None
        self.time_up_at: float | None = None
        """When the time of --stop-after has passed; None afterwards, and without one."""
        self.checked_at = self.progressed_at = time.monotonic()
        self.silent_phase: str | None = None
        self._counters: tuple[Any, ...] = ()

    def begin(self, lease: Lease) -> None:
        """Watch the job that was just claimed."""
        self.stop_reason, self.limit_at, self.time_up_at = None, None, None
        if lease.job.time_limit_s is not None:
            self.limit_at = lease.claimed_at + lease.job.time_limit_s - lease.job.ran_s
        self.mark_progress("starting")

    def end(self) -> None:
        """Watch nothing: the lease has ended."""
        self.stop_reason, self.limit_at, self.time_up_at = None, None, None

    # --- stop requests and the time limit -------------------------------------------------

    def request_stop(self, reason: StopReason, grace_s: float) -> None:
        """Start the deadline by which the job must have stopped."""
        self.stop_reason, self.deadline = reason, time.monotonic() + grace_s

    def shorten_deadline(self, grace_s: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + grace_s)

    @property
    def time_limit_reached(self) -> bool:
        return self.limit_at is not None and time.monotonic() >= self.limit_at

    @property
    def next_check_s(self) -> float:
        """Return the seconds until check() may have a result."""
        if self.stop_reason is not None:
            return 0.5
        times = [at for at in (self.limit_at, self.time_up_at) if at is not None]
        return min([5.0, *(max(at - time.monotonic(), 0.0) for at in times)])

    # --- progress -------------------------------------------------------------------------

    def observe(self, message: Mapping[str, Any]) -> None:
        """
        Take note of a message from the runner.

        A progress message counts only if its counters have changed: a thread that goes on reporting beside
        one that hangs makes no progress.
        """
        if message["op"] == "quiet":
            self.mark_progress(message["why"])
            return
        if message["op"] != "progress":
            self.mark_progress(self.silent_phase)
            return
        progress = message["progress"]
        counters = tuple(progress.get(name) for name in COUNTERS)
        if counters != self._counters:
            self._counters = counters
            self.mark_progress(progress.get("phase"))

    def mark_progress(self, silent_phase: str | None = None) -> None:
        """
        Restart the stall timeout.

        Args:
            silent_phase: what the job does now, if that reports no progress.
        """
        self.progressed_at, self.silent_phase = time.monotonic(), silent_phase

    def discount_own_pause(self) -> None:
        """
        Restart the stall timeout if the main loop itself has paused.

        Messages of the runner may be unread, or the runner was stopped together with this process.
        """
        now = time.monotonic()
        if now - self.checked_at > OWN_PAUSE_S:
            self.progressed_at = now
        self.checked_at = now

    @property
    def stalled_s(self) -> float:
        """Return the seconds since the last progress."""
        return time.monotonic() - self.progressed_at

    def check(self) -> Literal["overdue", "time limit", "time is up", "stalled"] | None:
        """Return what requires action now, if anything."""
        if self.stop_reason is not None:
            return "overdue" if time.monotonic() >= self.deadline else None
        if self.time_limit_reached:
            return "time limit"
        if self.time_up_at is not None and time.monotonic() >= self.time_up_at:
            self.time_up_at = None
            return "time is up"
        if self.stall_s and self.stalled_s > self.stall_s * (
            SILENT_PHASE_FACTOR if self.silent_phase else 1.0
        ):
            return "stalled"
        return None


def time_limit_error(job: Job, *, has_checkpoint: bool) -> TimeLimitError:
    """Return the error of a job that has reached its time limit."""
    if has_checkpoint:
        epochs = job.spec.get("epochs", "N")
        hint = f"its last checkpoint is safe: ganq submit train --continue {job.id} --epochs {epochs} goes on"
    else:
        hint = "submit it again with a longer --time-limit"
    return TimeLimitError(f"it has run for its time limit of {in_words(job.time_limit_s or 0.0)}", hint=hint)
