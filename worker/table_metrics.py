"""
Prometheus metrics of the job table, for the one server that is scraped for them.

A worker does not serve them: the queries of many workers would add up. Register the collector once:

    registry.register(TableMetrics(database, settings))
"""

import shutil
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.errors import GanqError, one_line
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.reachable import is_reachable
from storage.settings import Settings
from worker.celery_bridge.notify import waiting

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

CACHE_S = 15.0
VOLUME_S = 2.0
FORGET_WORKER_S = 3600.0
"""A worker that was killed together with its machine is unresponsive for so long."""
WORKER_STATES = ("starting", "idle", "busy", "draining", "unresponsive")


class TableMetrics:
    """
    A collector of prometheus_client; its answer is kept for 15 s, however many scrape.

    A queue that a worker serves or that had a job reports 0 when it is empty. Jobs that have ended are not
    counted here, because that would read the whole table: see `ganq_jobs_finished_total` of the workers.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self.queries = Queries(database)
        self.lock = threading.Lock()
        self.seen: set[tuple[str, str, str]] = set()
        self.queues: set[str] = {"default"}
        self.found: list[GaugeMetricFamily] = []
        self.found_at = float("-inf")

    def describe(self) -> list[Any]:
        """Return nothing, so that registration does not read the table."""
        return []

    def collect(self) -> "Iterator[GaugeMetricFamily]":
        with self.lock:
            if time.monotonic() - self.found_at >= CACHE_S:
                self.found, self.found_at = list(self._read()), time.monotonic()
        yield from self.found

    def _read(self) -> "Iterator[GaugeMetricFamily]":
        from prometheus_client.core import GaugeMetricFamily

        up = GaugeMetricFamily("ganq_job_table_up", "1 if the job table is_reachable.")
        try:
            families = list(self._of_table())
        except GanqError:
            up.add_metric([], 0)
            families = []
        else:
            up.add_metric([], 1)
        yield up
        yield from families
        free = GaugeMetricFamily(
            "ganq_volume_free_bytes", "Free bytes of the volume; none if it does not answer."
        )
        if is_reachable(self.settings.volume, VOLUME_S):
            try:
                free.add_metric([], shutil.disk_usage(self.settings.volume).free)
            except OSError as exc:
                free.documentation += f" {one_line(exc)}"
        yield free
        notifications = GaugeMetricFamily(
            "ganq_notifications_waiting",
            "Notifications that no worker has fetched; none if Redis does not answer.",
            labels=["queue"],
        )
        try:
            found = waiting(self.settings, sorted(self.queues), self.database.installation)
        except GanqError:
            found = {}
        for queue, number in found.items():
            notifications.add_metric([queue], number)
        yield notifications

    def _of_table(self) -> "Iterator[GaugeMetricFamily]":
        from prometheus_client.core import GaugeMetricFamily

        live, workers = self.queries.live(), self.queries.workers()
        present = [one for one in workers if one.state != "stopped" and one.silent_s < FORGET_WORKER_S]
        self.queues |= {queue for one in present for queue in one.queues.split(",") if queue}
        self.queues |= {row.queue for row in live}

        jobs = GaugeMetricFamily(
            "ganq_jobs", "Jobs that have not ended, by state.", labels=["state", "kind", "queue"]
        )
        numbers = dict.fromkeys(self.seen, 0)
        for row in live:
            key = ("held" if row.held else row.state, row.kind, row.queue)
            numbers[key] = numbers.get(key, 0) + row.jobs
        self.seen |= set(numbers)
        for key, number in sorted(numbers.items()):
            jobs.add_metric(key, number)
        yield jobs

        claimable = GaugeMetricFamily(
            "ganq_queue_claimable_jobs", "Jobs that a free worker could claim now.", labels=["queue"]
        )
        oldest = GaugeMetricFamily(
            "ganq_queue_oldest_wait_seconds", "Age of the oldest claimable job.", labels=["queue"]
        )
        for queue in sorted(self.queues):
            rows = [row for row in live if row.queue == queue]
            claimable.add_metric([queue], sum(row.claimable for row in rows))
            oldest.add_metric([queue], max((row.oldest_s for row in rows), default=0.0))
        yield claimable
        yield oldest

        states = dict.fromkeys(WORKER_STATES, 0)
        for one in present:
            state = "unresponsive" if one.silent_s > self.settings.lease_seconds else one.state
            states[state] = states.get(state, 0) + 1
        by_state = GaugeMetricFamily(
            "ganq_workers",
            "Workers by state; unresponsive: no heartbeat for a lease, and for an hour at most.",
            labels=["state"],
        )
        for state, number in sorted(states.items()):
            by_state.add_metric([state], number)
        yield by_state
