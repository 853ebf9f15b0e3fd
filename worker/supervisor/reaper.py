"""
Recovery: the reaper and the dispatcher. Each supervisor runs both; several do no harm.

The reaper uses no wall clock. It requeues a job if (attempt, hb_seq) has not changed for lease_seconds on
its own monotonic clock, over reads that all succeeded.
"""

import hashlib
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jobs.errors import GanqError, SchemaMismatchError, one_line
from storage.db.engine import Database
from storage.db.store import HeartbeatRow, JobStore
from storage.db.store.reap import BUCKETS, WatchShare
from storage.db.workers import WorkerStore
from storage.settings import Settings
from worker.host.process import boot_id, has_died
from worker.supervisor.heartbeat import paced
from worker.supervisor.metrics import Metrics
from worker.supervisor.webhooks import DelivererStarter

log = logging.getLogger("ganq.recovery")

MAX_NOTIFICATIONS = 50
BEGIN_SLACK_S = 0.05
"""Added to the time until a job begins, by another machine's clock."""
WATCHERS = 3
"""Supervisors that watch each bucket of running jobs."""
MAX_FULL_WATCHERS = 16
"""Up to this number of workers, each supervisor watches all running jobs."""
LEADERS_BUCKET = -1
"""The supervisors that watch it do what a few do for all."""
LIST_EVERY_S = 0.1
"""Seconds per live worker between two reads of their list, so that all together read 10 rows per worker."""
LOOKS_PER_LEASE = 12
"""At least so many looks, however many workers there are."""
LEADERS_DISPATCH_S = 2.0


def watch_share(me: str, live: Sequence[tuple[str, str]]) -> WatchShare | None:
    """
    Return which running jobs a supervisor watches; None: all.

    If each watched all, the rows read per second would grow with the square of the workers. Each bucket is
    watched by the WATCHERS live workers with the highest hash of (name, bucket) (rendezvous hashing, Thaler
    and Ravishankar 1998): when a worker joins or leaves, all others keep watching what they watched.

    With at least WATCHERS machines they are on different ones, so that no job loses all with a machine.

    Args:
        live: (name, host) of each live worker.
    """
    host_of = dict(live)
    if len(live) <= MAX_FULL_WATCHERS or me not in host_of:
        return None
    local = sorted(name for name, host in live if host == host_of[me])
    hosts = set(host_of.values())

    def ahead(own: str, others: Iterable[str], bucket: int) -> int:
        """Return how many have a higher hash."""
        weight = _weight(own, bucket)
        return sum(_weight(other, bucket) > weight for other in others)

    def watches(bucket: int) -> bool:
        if len(hosts) < WATCHERS:
            return ahead(me, host_of, bucket) < WATCHERS
        return ahead(me, local, bucket) == 0 and ahead(host_of[me], hosts, bucket) < WATCHERS

    mine = tuple(bucket for bucket in range(BUCKETS) if watches(bucket))
    return WatchShare(mine, tuple(local), watches(LEADERS_BUCKET))


def _weight(name: str, bucket: int) -> bytes:
    return hashlib.blake2b(f"{bucket} {name}".encode(), digest_size=8).digest()


@dataclass
class HeartbeatObservation:
    """Since when (monotonic seconds) one (attempt, hb_seq) has been read without a change."""

    attempt: int
    hb_seq: int
    since: float
    started_after: float | None
    """Monotonic time after which the attempt started; None: before it was first read."""


class Reaper:
    """Requeues jobs of workers that have died or send no heartbeats."""

    def __init__(self, store: JobStore, settings: Settings, name: str = "") -> None:
        self.store = store
        self.name = name
        self.share: WatchShare | None = None
        self.share_until: float | None = None
        self.live = 0
        self.looked = False
        self.lease_s = settings.lease_seconds
        self.max_gap_s = max(3 * settings.reap_seconds, settings.lease_seconds / 4, 1.0)
        """After a longer pause between two reads nothing that was observed before counts."""
        self.boot = boot_id()
        self.host = socket.gethostname()
        self.observations: dict[int, HeartbeatObservation] = {}
        self.last_read: float | None = None

    def tick(self, now: float | None = None) -> list[int]:
        """
        Check all running jobs once.

        Args:
            now: monotonic seconds; this process's clock by default.

        Returns:
            Ids of the jobs that were requeued.

        Raises:
            DatabaseUnavailableError: nothing was concluded.
        """
        now = time.monotonic() if now is None else now
        if self.last_read is not None and now - self.last_read > self.max_gap_s:
            self.observations.clear()
            self.last_read = None
        if self.share_until is None or now > self.share_until:
            live = self.store.live_workers(self.name, within_s=self.lease_s)
            self.share, self.live = watch_share(self.name, live), len(live)
            self.share_until = now + max(self.lease_s / 2, self.live * LIST_EVERY_S)
        # The first look is at all: this worker may have died and been started again.
        rows = self.store.running(self.share if self.looked else None)
        self.looked = True
        previous_read, self.last_read = self.last_read, now
        requeued = []
        for row in rows:
            try:
                reason = self._reason_to_requeue(row, now, previous_read)
                seen = self.observations.get(row.job_id)
                started_after = seen.started_after if seen is not None else previous_read
                ran_s = float("inf") if started_after is None else now - started_after
                if (
                    reason
                    and self.store.requeue_lost(row, reason, within_s=self.max_gap_s, ran_s=ran_s) is not None
                ):
                    log.warning("job %s requeued: %s", row.job_id, reason)
                    requeued.append(row.job_id)
                elif reason:
                    self.observations.pop(row.job_id, None)
            except GanqError:
                # A table that accepts no write kept the worker from its heartbeats, too: it gets a whole
                # lease from when the table can be written again.
                self.observations.clear()
                raise
            except Exception as exc:  # concerns this row alone
                log.error("job %s cannot be requeued: %s", row.job_id, one_line(exc))
                log.debug("the row that cannot be requeued", exc_info=True)
        running = {row.job_id for row in rows}
        self.observations = {job_id: seen for job_id, seen in self.observations.items() if job_id in running}
        return requeued

    @property
    def leads(self) -> bool:
        """Return whether this supervisor does what a few do for all."""
        return self.share is None or self.share.leads

    def pause_s(self, reap_seconds: float) -> float:
        """Return the seconds between two looks: more with many workers, so that the sum stays bounded."""
        return max(reap_seconds, min(paced(reap_seconds, self.live), self.lease_s / LOOKS_PER_LEASE))

    def _reason_to_requeue(self, row: HeartbeatRow, now: float, previous_read: float | None) -> str | None:
        """
        Return why a job must be requeued, and record its heartbeat if it has changed.

        Args:
            previous_read: when the running jobs were read before now, without a gap.
        """
        # The host, too: machines started from one snapshot share their boot id.
        is_local = bool(self.boot) and (row.boot_id, row.host) == (self.boot, self.host)
        if is_local and has_died(row.pid or 0, row.start_ticks or 0):
            return f"worker {row.worker} (process {row.pid}) has died"
        seen = self.observations.get(row.job_id)
        if seen is None or (seen.attempt, seen.hb_seq) != (row.attempt, row.hb_seq):
            same_attempt = seen is not None and seen.attempt == row.attempt
            started_after = seen.started_after if seen is not None and same_attempt else previous_read
            self.observations[row.job_id] = HeartbeatObservation(row.attempt, row.hb_seq, now, started_after)
            return None
        if now - seen.since >= self.lease_s:
            return f"worker {row.worker} has been unresponsive for {now - seen.since:.0f} s"
        return None


class Recovery(threading.Thread):
    """The supervisor's thread that reaps, notifies again, and checks the schema of the job table."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        workers: WorkerStore,
        notify: Callable[[str, int], None],
        wake: Callable[[], None],
        on_schema_mismatch: Callable[[SchemaMismatchError], None],
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(name="recovery", daemon=True)
        self.metrics = metrics or Metrics()
        self.database = database
        self.settings = settings
        self.store = JobStore(database)
        self.workers = workers
        self.notify = notify
        self.wake = wake
        self.on_schema_mismatch = on_schema_mismatch
        self.reaper = Reaper(self.store, settings, workers.who.name)
        self.deliverer = DelivererStarter(database, settings)
        self.stopping = threading.Event()
        self.malformed_after = 0
        self.next_dispatch = 0.0
        self.old_workers_removed = False

    def run(self) -> None:
        while not self.stopping.wait(self.look()):
            pass

    def look(self) -> float:
        """Do once what is due, and log errors; return the seconds until the next time."""
        begins_in_s: float | None = None
        try:
            self.database.require_schema()
            with self.metrics.request("reap"):
                requeued = self.reaper.tick()
            leads, released = self.reaper.leads, 0
            if leads:
                released, begins_in_s = self.store.release_waiting()
            if requeued:
                self.metrics.rescued(len(requeued))
            if requeued or released:
                self.wake()
                self.next_dispatch = 0.0
            if time.monotonic() >= self.next_dispatch and (leads or requeued):
                self.fail_malformed()
                self.dispatch()
                self.deliverer.tick()
                self.next_dispatch = time.monotonic() + self._dispatch_every_s()
            if not self.old_workers_removed:
                self.workers.forget_old()
                self.old_workers_removed = True
        except SchemaMismatchError as exc:
            self.on_schema_mismatch(exc)
        except Exception as exc:  # if this thread ended, no job of a dead worker would be requeued
            log.warning("recovery waits: %s", one_line(exc))
            log.debug("the recovery that failed", exc_info=True)
        pause_s = self.reaper.pause_s(self.settings.reap_seconds) * random.uniform(0.8, 1.2)
        if begins_in_s is None:
            return pause_s
        return min(pause_s, max(begins_in_s, 0.0) + BEGIN_SLACK_S)

    def fail_malformed(self) -> None:
        """Fail queued jobs whose rows ganq did not write; no claim finds them."""
        failed, self.malformed_after = self.store.fail_malformed(self.malformed_after)
        for job_id in failed:
            log.warning("job %s has failed: ganq did not write its row (ganq status %s)", job_id, job_id)

    def dispatch(self) -> None:
        """
        Notify again for queued jobs that no worker has claimed: as many as there are idle workers.

        A busy worker needs no notification, because it claims its next job when it finishes.
        """
        again_s, lease_s = self.settings.renotify_seconds, self.settings.lease_seconds
        if not self.store.any_to_notify(again_s=again_s, idle_within_s=lease_s):
            return
        idle = self.store.idle_workers(within_s=lease_s)
        for job_id, queue in self.store.due_notifications(
            again_s=again_s,
            limit=min(len(idle), MAX_NOTIFICATIONS),
            queues={queue for queues in idle for queue in queues},
        ):
            self.notify(queue, job_id)

    def _dispatch_every_s(self) -> float:
        """Return the interval of the dispatches: the few leaders of many workers stand in for all."""
        poll_s = self.settings.poll_seconds
        return poll_s if self.reaper.share is None else min(poll_s, LEADERS_DISPATCH_S)

    def stop(self) -> None:
        self.stopping.set()
