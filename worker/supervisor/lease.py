"""The lease that the supervisor holds: from the claim of a job to the commit that ends its attempt."""

import logging
import time
from collections.abc import Callable
from typing import Any

from jobs.errors import DatabaseUnavailableError, LeaseLostError, SchemaMismatchError
from storage.db.rows import Lease
from storage.settings import Settings
from worker.supervisor.heartbeat import Heartbeat
from worker.supervisor.metrics import Metrics
from worker.supervisor.runner_process import RunnerProcess
from worker.supervisor.watchdog import Watchdog

log = logging.getLogger("ganq.supervisor")

RETRY_DATABASE_S = 1.0


class HeldLease:
    """
    Holds one lease at a time; each commit for it goes through this class.

    When the lease is lost, the runner is killed and its output is discarded.

    Args:
        drain_expired: returns whether this worker is draining and its time for that is over.
        on_schema_mismatch: called if the job table no longer has the schema of this worker.
    """

    def __init__(
        self,
        settings: Settings,
        runner: RunnerProcess,
        heartbeat: Heartbeat,
        *,
        drain_expired: Callable[[], bool],
        on_schema_mismatch: Callable[[SchemaMismatchError], None],
        metrics: Metrics | None = None,
    ) -> None:
        self.runner = runner
        self.heartbeat = heartbeat
        self.drain_expired = drain_expired
        self.on_schema_mismatch = on_schema_mismatch
        self.metrics = metrics or Metrics()
        self.watchdog = Watchdog(settings.stall_seconds)
        self.lease: Lease | None = None
        self.next_lease: Lease | None = None
        """Claimed in the commit that ended the previous attempt; the next claim begins it."""
        self.answer: Any = None
        """Return value of the last commit."""
        self.shards: list[dict[str, Any]] = []
        """Shards of the leased job, if it was split."""

    def begin(self, lease: Lease) -> None:
        self.lease = lease
        self.watchdog.begin(lease)
        self.heartbeat.begin(lease)
        self.metrics.begun(lease)

    def finish(self, outcome: str, commit: Callable[..., Any], *args: Any) -> bool:
        """
        Commit the end of the attempt and release the lease.

        Args:
            outcome: for the log.

        Returns:
            Whether the end was committed; False: the lease was lost, or given up without an answer.
        """
        if not self.commit(commit, *args):
            return False
        assert self.lease is not None
        self.metrics.ended(self.lease, _name(commit), args, self.answer)
        log.info("job %s: %s", self.lease.job_id, outcome)
        self.release()
        if self.next_lease is not None:
            self.heartbeat.begin(self.next_lease)  # already leased, whenever its work begins
        return True

    def commit(self, commit: Callable[..., Any], *args: Any) -> bool:
        """
        Commit under the fence; wait while the database is unavailable.

        Returns:
            False if the lease was lost: the runner has been killed, and the job belongs to another worker.
        """
        while True:
            try:
                with self.metrics.request(_name(commit)):
                    self.answer = commit(*args)
                self.watchdog.mark_progress(self.watchdog.silent_phase)  # the runner may have waited for this
                return True
            except LeaseLostError:
                self.abandon("another worker has the lease")
                return False
            except DatabaseUnavailableError as exc:
                log.warning("waiting for the database: %s", exc)
                if self.drain_expired():
                    # The reaper of another worker requeues the job.
                    self.abandon("the database is unavailable, and this worker must exit")
                    return False
                time.sleep(RETRY_DATABASE_S)
                self.heartbeat.mark_iteration()
            except SchemaMismatchError as exc:
                # A worker with the new schema requeues the job.
                self.on_schema_mismatch(exc)
                self.abandon("the job table no longer has the schema of this worker")
                return False

    def abandon(self, reason: str) -> None:
        """Kill the runner and release a lease that another worker has, or will have."""
        self.runner.kill()
        self.metrics.lease_lost()
        self.release(reason)

    def release(self, reason: str | None = None) -> None:
        if reason and self.lease is not None:
            log.warning("job %s: lease released: %s", self.lease.job_id, reason)
        self.lease = None
        self.metrics.idle()
        self.watchdog.end()
        self.heartbeat.end()


def _name(commit: Callable[..., Any]) -> str:
    """Return the name of a function, also of one with arguments bound to it."""
    return str(getattr(getattr(commit, "func", commit), "__name__", "other"))
