"""
The dispatcher and the reaper: every supervisor runs both, and many do no harm.

The reaper trusts no wall clock. It takes a job back when (attempt, hb_seq) has not
changed for lease_seconds on its own monotonic clock, over reads that all succeeded.
"""

import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.errors import GanqError, SchemaMismatchError, one_line
from storage.db.engine import Database
from storage.db.store import HeartbeatRow, JobStore
from storage.db.workers import WorkerStore
from storage.settings import Settings
from worker.host.process import boot_id, has_died
from worker.supervisor.metrics import Metrics

log = logging.getLogger("ganq.recovery")

BELLS_AT_ONCE = 50


@dataclass
class HeartbeatObservation:
    """How long one (attempt, hb_seq) has been seen without a change."""

    attempt: int
    hb_seq: int
    since: float
    began: float | None
    """The attempt began after this; None: before it was first seen."""


class Reaper:
    """Takes jobs back from workers that died or fell silent."""

    def __init__(self, store: JobStore, settings: Settings) -> None:
        self.store = store
        self.lease_s = settings.lease_seconds
        self.patience_s = max(3 * settings.reap_seconds, settings.lease_seconds / 4, 1.0)
        self.boot = boot_id()
        self.host = socket.gethostname()
        self.watched: dict[int, HeartbeatObservation] = {}
        self.last_read: float | None = None

    def tick(self, now: float | None = None) -> list[int]:
        """
        One look at all running jobs.

        Args:
            now: monotonic seconds; this process's clock by default.

        Returns:
            Ids of the jobs that were taken back.

        Raises:
            DatabaseUnavailableError: nothing was concluded.
        """
        now = time.monotonic() if now is None else now
        if self.last_read is not None and now - self.last_read > self.patience_s:
            self.watched.clear()  # we were away ourselves: what we saw before counts for nothing
            self.last_read = None
        beats = self.store.running()
        before, self.last_read = self.last_read, now
        rescued = []
        for beat in beats:
            try:
                why = self._verdict(beat, now, before)
                began = self.watched[beat.job_id].began if beat.job_id in self.watched else before
                ran_s = float("inf") if began is None else now - began
                if (
                    why
                    and self.store.requeue_lost(beat, why, within_s=self.patience_s, ran_s=ran_s) is not None
                ):
                    log.warning("job %s taken back: %s", beat.job_id, why)
                    rescued.append(beat.job_id)
                elif why:
                    self.watched.pop(beat.job_id, None)
            except GanqError:
                # A table that takes no write kept the worker from its heartbeats, too: its silence counts for
                # nothing, and it has a whole lease from when the table can be written again.
                self.watched.clear()
                raise
            except Exception as exc:  # of this row; the others are taken back all the same
                log.error("job %s cannot be taken back: %s", beat.job_id, one_line(exc))
                log.debug("the row that cannot be taken back", exc_info=True)
        alive = {beat.job_id for beat in beats}
        self.watched = {job_id: seen for job_id, seen in self.watched.items() if job_id in alive}
        return rescued

    def _verdict(self, beat: HeartbeatRow, now: float, before: float | None) -> str | None:
        """
        Args:
            before: when the running jobs were last read before now, without a gap.
        """
        # The host, too: machines that were started from one snapshot share their boot.
        here = bool(self.boot) and (beat.boot_id, beat.host) == (self.boot, self.host)
        if here and has_died(beat.pid or 0, beat.start_ticks or 0):
            return f"worker {beat.worker} (process {beat.pid}) has died"
        seen = self.watched.get(beat.job_id)
        if seen is None or (seen.attempt, seen.hb_seq) != (beat.attempt, beat.hb_seq):
            began = seen.began if seen is not None and seen.attempt == beat.attempt else before
            self.watched[beat.job_id] = HeartbeatObservation(beat.attempt, beat.hb_seq, now, began)
            return None
        if now - seen.since >= self.lease_s:
            return f"worker {beat.worker} has been silent for {now - seen.since:.0f} s"
        return None


class Recovery(threading.Thread):
    """The supervisor's thread for reaping, ringing again, and noticing a schema that is not for this code."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        workers: WorkerStore,
        ring: Callable[[str, int], None],
        wake: Callable[[], None],
        schema_mismatch: Callable[[SchemaMismatchError], None],
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(name="recovery", daemon=True)
        self.metrics = metrics or Metrics()
        self.database = database
        self.settings = settings
        self.store = JobStore(database)
        self.workers = workers
        self.ring = ring
        self.wake = wake
        self.schema_mismatch = schema_mismatch
        self.reaper = Reaper(self.store, settings)
        self.stopping = threading.Event()
        self.malformed_after = 0

    def run(self) -> None:
        self.workers_forgotten = False
        next_ring = 0.0
        while True:
            try:
                self.database.require_schema()
                with self.metrics.request("reap"):
                    rescued = self.reaper.tick()
                if rescued:
                    self.metrics.rescued(len(rescued))
                    self.wake()
                if time.monotonic() >= next_ring:
                    self.fail_malformed()
                    self.dispatch()
                    next_ring = time.monotonic() + self.settings.poll_seconds
                if not self.workers_forgotten:
                    self.workers.forget_old()
                    self.workers_forgotten = True
            except SchemaMismatchError as exc:
                self.schema_mismatch(exc)
            except Exception as exc:  # without this thread no job of a dead worker is put back
                log.warning("recovery waits: %s", one_line(exc))
                log.debug("the recovery that failed", exc_info=True)
            if self.stopping.wait(self.settings.reap_seconds * random.uniform(0.8, 1.2)):
                return

    def fail_malformed(self) -> None:
        """Fail queued jobs that no ganq wrote and no claim finds."""
        failed, self.malformed_after = self.store.fail_malformed(self.malformed_after)
        for one in failed:
            log.warning("job %s has failed: no ganq wrote its row (ganq status %s)", one, one)

    def dispatch(self) -> None:
        """Ring for queued jobs that nobody was told of."""
        for job_id, queue in self.store.due_notifications(
            again_s=self.settings.renotify_seconds, limit=BELLS_AT_ONCE
        ):
            self.ring(queue, job_id)

    def stop(self) -> None:
        self.stopping.set()
