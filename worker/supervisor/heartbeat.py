"""The supervisor's thread that keeps a lease alive: beats, carries progress, reads wishes."""

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

log = logging.getLogger("ganq.heart")

LeaseEvent = Literal["lost", "cancel", "yield"]
Trouble = Literal["volume hung", "runner stuck"]


class Heartbeat(threading.Thread):
    """
    Beats every heartbeat_seconds on connections of its own, sooner when there is progress to show.
    It beats for the loop that works: one that has not turned for stuck_seconds gets no beat, so that
    another worker takes the job, and this one is shown as silent.

    A database that is away stops nothing: the fence decides at publication. A lease
    that has passed on is told to the supervisor once, as is a wish to cancel, and that
    the job should yield to one of higher priority.
    """

    def __init__(
        self,
        store: JobStore,
        workers: WorkerStore,
        settings: Settings,
        tell: Callable[[LeaseEvent, Lease], None],
        offer: Callable[[Lease], int | None],
        name_taken: Callable[[WorkerNameTakenError], None],
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self.metrics = metrics or Metrics()
        self.store = store
        self.offer = offer
        self.workers = workers
        self.settings = settings
        self.tell = tell
        self.name_taken = name_taken
        self.stopping = threading.Event()
        self._look = threading.Event()
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._progress: dict[str, Any] | None = None
        self._worker_state = "idle"
        self._told: set[LeaseEvent] = set()
        self._last_beat = 0.0
        self._last_said = 0.0
        # For status_socket.py: the last iteration, and the last message that the database took.
        self.looped_at = self.spoke_at = time.monotonic()
        self._turned_at = time.monotonic()
        self._stood_still = False
        self.trouble: Trouble | None = None

    def turned(self) -> None:
        """The supervisor's loop moves, if only from one try at the database to the next."""
        self._turned_at = time.monotonic()

    def mark(self, trouble: Trouble | None) -> None:
        """Show as the worker's state what keeps it from taking jobs; None: nothing does."""
        with self._lock:
            self.trouble, self._last_said = trouble, 0.0

    def begin(self, lease: Lease) -> None:
        """Keep this lease alive from now on."""
        with self._lock:
            self._lease, self._progress, self._told = lease, None, set()
            self._last_beat = time.monotonic()
            self._worker_state, self._last_said = "busy", 0.0

    def end(self) -> None:
        """The lease is settled."""
        with self._lock:
            self._lease = None
            if self._worker_state == "busy":
                self._worker_state = "idle"
            self._last_said = 0.0

    def drain(self) -> None:
        with self._lock:
            self._worker_state, self._last_said = "draining", 0.0

    def progress(self, facts: dict[str, Any]) -> None:
        with self._lock:
            self._progress = facts

    def poll_now(self) -> None:
        """Something new may be wished: do not wait for the next turn."""
        self._look.set()

    def run(self) -> None:
        pause_s = min(self.settings.cancel_poll_seconds, self.settings.heartbeat_seconds)
        while True:
            self._look.wait(pause_s)
            self._look.clear()
            if self.stopping.is_set():
                return
            with self._lock:
                lease, progress = self._lease, self._progress
                state, last_said = self.trouble or self._worker_state, self._last_said
            now = self.looped_at = time.monotonic()
            if self._stands_still(now):
                continue
            try:
                if lease is not None:
                    self._beat(lease, progress, now)
                    self.spoke_at = time.monotonic()
                if now - last_said >= self.settings.heartbeat_seconds or self.workers.name_disputed:
                    self.workers.report(state, lease.job_id if lease else None)
                    self.spoke_at = time.monotonic()
                    with self._lock:
                        self._last_said = now if (self.trouble or self._worker_state) == state else 0.0
            except LeaseLostError:
                if lease is not None:
                    self._tell("lost", lease)
            except WorkerNameTakenError as exc:
                self.name_taken(exc)
            except Exception as exc:  # without this thread the job is taken back
                log.warning("no heartbeat: %s", one_line(exc))
                log.debug("the heartbeat that failed", exc_info=True)

    def _stands_still(self, now: float) -> bool:
        still_s = now - self._turned_at
        stands_still = still_s > self.settings.stuck_seconds
        if stands_still and not self._stood_still:
            log.error("no heartbeat: the main loop has stood still for %.0f s", still_s)
        self._stood_still = stands_still
        return stands_still

    def _beat(self, lease: Lease, progress: dict[str, Any] | None, now: float) -> None:
        news = progress is not None and now - self._last_beat >= self.settings.progress_seconds
        if news or now - self._last_beat >= self.settings.heartbeat_seconds:
            with self.metrics.request("heartbeat"):
                stop_requests = self.store.heartbeat(lease, progress)
            with self._lock:
                self._last_beat = now
                if self._progress is progress:
                    self._progress = None
        else:
            stop_requests = self.store.stop_requests(lease)
        if stop_requests.cancel:
            self._tell("cancel", lease)
        elif stop_requests.preempt_for is not None or self.offer(lease) is not None:
            self._tell("yield", lease)

    def _tell(self, news: LeaseEvent, lease: Lease) -> None:
        with self._lock:
            if news in self._told or self._lease is not lease:
                return
            self._told.add(news)
        self.tell(news, lease)

    def stop(self) -> None:
        self.stopping.set()
        self._look.set()
