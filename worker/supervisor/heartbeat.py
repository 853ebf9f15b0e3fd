"""The heartbeat thread of the supervisor: keeps the lease alive, reports progress, reads stop requests."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from jobs.errors import LeaseLostError, WorkerNameTakenError, one_line
from storage.db.rows import Lease
from storage.db.store import JobStore
from storage.db.workers import WorkerStore
from storage.settings import Settings
from worker.supervisor.metrics import Metrics

log = logging.getLogger("ganq.heartbeat")

LeaseEvent = Literal["lost", "cancel", "pause", "preempt"]
Fault = Literal["volume hung", "runner stuck"]

FULL_PACE_WORKERS = 200
"""With more live workers each does less often what it does at intervals, so that the sum stays bounded."""


def paced(seconds: float, live: int) -> float:
    """Return an interval, longer if there are more than FULL_PACE_WORKERS live workers."""
    return seconds * max(1.0, live / FULL_PACE_WORKERS)


class Heartbeat(threading.Thread):
    """
    Sends a heartbeat every heartbeat_seconds on its own database connections, earlier if there is progress.

    It sends none while the main loop has made no iteration for stuck_seconds, so that another worker takes
    the job and this one is shown as unresponsive. An unavailable database stops nothing: the fence decides
    when the result is committed.

    Args:
        on_event: called once per lease and event: the lease is lost, or a cancel, pause or preemption is
            requested.
        offer_preemption: requests preemption of the leased job if one of higher priority waits; returns the
            id of that job.
        on_name_taken: called if another living worker has this worker's name.
        on_drain: called while `ganq drain` asks this worker to exit.
        live_workers: how many share the database: many send progress and read stop requests less often,
            though at least every heartbeat_seconds.
    """

    def __init__(
        self,
        store: JobStore,
        workers: WorkerStore,
        settings: Settings,
        on_event: Callable[[LeaseEvent, Lease], None],
        offer_preemption: Callable[[Lease], int | None],
        on_name_taken: Callable[[WorkerNameTakenError], None],
        metrics: Metrics | None = None,
        on_drain: Callable[[], None] = lambda: None,
        live_workers: Callable[[], int] = lambda: 1,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.metrics = metrics or Metrics()
        self.store = store
        self.workers = workers
        self.settings = settings
        self.on_event = on_event
        self.offer_preemption = offer_preemption
        self.on_name_taken = on_name_taken
        self.on_drain = on_drain
        self.live_workers = live_workers
        self.stopping = threading.Event()
        self._poll = threading.Event()
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._progress: dict[str, Any] | None = None
        self._worker_state = "idle"
        self._emitted: set[LeaseEvent] = set()
        self._sent_at = 0.0
        self._reported_at = 0.0
        self.iterated_at = time.monotonic()
        self.acknowledged_at = time.monotonic()
        """When the database last accepted a heartbeat or a report of the worker's state."""
        self._loop_iterated_at = time.monotonic()
        self._loop_was_stuck = False
        self.fault: Fault | None = None

    def mark_iteration(self) -> None:
        """Record that the main loop makes progress, if only from one database retry to the next."""
        self._loop_iterated_at = time.monotonic()

    def set_fault(self, fault: Fault | None) -> None:
        """Report as the worker's state what keeps it from taking jobs; None: nothing does."""
        with self._lock:
            self.fault, self._reported_at = fault, 0.0

    def begin(self, lease: Lease) -> None:
        """Keep this lease alive from now on."""
        with self._lock:
            self._lease, self._progress, self._emitted = lease, None, set()
            self._sent_at = time.monotonic()
            self._worker_state, self._reported_at = "busy", 0.0

    def end(self) -> None:
        """Stop sending heartbeats: the lease has ended."""
        with self._lock:
            self._lease = None
            if self._worker_state == "busy":
                self._worker_state = "idle"
            self._reported_at = 0.0

    def drain(self) -> None:
        """Report the worker as draining from now on."""
        with self._lock:
            self._worker_state, self._reported_at = "draining", 0.0

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Send this progress with the next heartbeat."""
        with self._lock:
            self._progress = progress

    def poll_now(self) -> None:
        """Read stop requests now, not at the next interval."""
        self._poll.set()

    def run(self) -> None:
        while True:
            self._poll.wait(self.pause_s())
            self._poll.clear()
            if self.stopping.is_set():
                return
            self.beat()

    def pause_s(self) -> float:
        """Return the seconds until the next beat; a heartbeat that falls due earlier is not late."""
        poll_s = self.settings.cancel_poll_seconds
        with self._lock:
            due_at = self._sent_at if self._lease is not None else float("inf")
        due_s = due_at + self.settings.heartbeat_seconds - time.monotonic()
        return min(self._paced(poll_s), max(due_s, poll_s))

    def beat(self) -> None:
        """Send what is due, read what is requested; log errors."""
        with self._lock:
            lease, progress = self._lease, self._progress
            state, reported_at = self.fault or self._worker_state, self._reported_at
        now = self.iterated_at = time.monotonic()
        if self._loop_is_stuck(now):
            return
        try:
            if lease is not None:
                self._send(lease, progress, now)
                self.acknowledged_at = time.monotonic()
            if now - reported_at >= self.settings.heartbeat_seconds or self.workers.name_disputed:
                if self.workers.report(state, lease.job_id if lease else None):
                    self.on_drain()
                self.acknowledged_at = time.monotonic()
                with self._lock:
                    self._reported_at = now if (self.fault or self._worker_state) == state else 0.0
        except LeaseLostError:
            if lease is not None:
                self._emit("lost", lease)
        except WorkerNameTakenError as exc:
            self.on_name_taken(exc)
        except Exception as exc:  # if this thread ended, the job would be requeued
            log.warning("no heartbeat: %s", one_line(exc))
            log.debug("the heartbeat that failed", exc_info=True)

    def _paced(self, seconds: float) -> float:
        return min(paced(seconds, self.live_workers()), self.settings.heartbeat_seconds)

    def _loop_is_stuck(self, now: float) -> bool:
        idle_s = now - self._loop_iterated_at
        is_stuck = idle_s > self.settings.stuck_seconds
        if is_stuck and not self._loop_was_stuck:
            log.error("no heartbeat: the main loop has been stuck for %.0f s", idle_s)
        self._loop_was_stuck = is_stuck
        return is_stuck

    def _send(self, lease: Lease, progress: dict[str, Any] | None, now: float) -> None:
        """Send a heartbeat if one is due, read stop requests in any case, and emit what they ask for."""
        progress_due = progress is not None and now - self._sent_at >= self._paced(
            self.settings.progress_seconds
        )
        if progress_due or now - self._sent_at >= self.settings.heartbeat_seconds:
            with self.metrics.request("heartbeat"):
                stop_requests = self.store.heartbeat(lease, progress)
            with self._lock:
                self._sent_at = now
                if self._progress is progress:
                    self._progress = None
        else:
            stop_requests = self.store.stop_requests(lease)
        if stop_requests.cancel:
            self._emit("cancel", lease)
        elif stop_requests.pause:
            self._emit("pause", lease)
        elif stop_requests.preempt_for is not None or (
            stop_requests.higher_waits and self.offer_preemption(lease) is not None
        ):
            self._emit("preempt", lease)

    def _emit(self, event: LeaseEvent, lease: Lease) -> None:
        with self._lock:
            if event in self._emitted or self._lease is not lease:
                return
            self._emitted.add(event)
        self.on_event(event, lease)

    def stop(self) -> None:
        self.stopping.set()
        self._poll.set()
