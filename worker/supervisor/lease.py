"""The supervisor's hold on one job: from its claim to the commit that ends it, however long that takes."""

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
    Holds one lease at a time, and is the way by which anything is committed for it.

    A lease that has passed on takes its runner with it: what that still makes is nobody's.

    Args:
        must_go: whether this worker has been told to leave, and its time for that is over.
        on_misfit: told of a job table that is no longer as this worker knows it.
    """

    def __init__(
        self,
        settings: Settings,
        runner: RunnerProcess,
        heartbeat: Heartbeat,
        *,
        must_go: Callable[[], bool],
        on_schema_mismatch: Callable[[SchemaMismatchError], None],
        metrics: Metrics | None = None,
    ) -> None:
        self.runner = runner
        self.heartbeat = heartbeat
        self.must_go = must_go
        self.on_schema_mismatch = on_schema_mismatch
        self.metrics = metrics or Metrics()
        self.watch = Watchdog(settings.stall_seconds)
        self.lease: Lease | None = None
        self.taken: Lease | None = None
        """The next one, taken with the commit that ended the last; the claim that follows begins it."""
        self.answer: Any = None
        """Of the last commit."""
        self.parts: list[dict[str, Any]] = []
        """Of the job in hand, if it was split."""

    def begin(self, lease: Lease) -> None:
        self.lease = lease
        self.watch.begin(lease)
        self.heartbeat.begin(lease)
        self.metrics.begun(lease)

    def settle(self, word: str, commit: Callable[..., Any], *args: Any) -> bool:
        """
        Write the end of the attempt, then let the job go.

        Returns:
            Whether the end was written; False: the lease was lost, or given up without an answer.
        """
        if not self.commit(commit, *args):
            return False
        assert self.lease is not None
        self.metrics.ended(self.lease, _name(commit), args, self.answer)
        log.info("job %s: %s", self.lease.job_id, word)
        self.release()
        if self.taken is not None:
            self.heartbeat.begin(self.taken)  # from now on, whatever comes before it begins
        return True

    def commit(self, commit: Callable[..., Any], *args: Any) -> bool:
        """
        Commit under the fence, waiting for a database that is away.

        Returns:
            False if the lease was lost: the runner is dead and the job is someone else's.
        """
        while True:
            try:
                with self.metrics.request(_name(commit)):
                    self.answer = commit(*args)
                self.watch.moved(self.watch.quiet)  # it may have waited for us, however long
                return True
            except LeaseLostError:
                self.lost("its lease has passed on")
                return False
            except DatabaseUnavailableError as exc:
                log.warning("waiting for the database: %s", exc)
                if self.must_go():
                    # The reaper of another worker will take the job back.
                    self.lost("the database is away, and this worker must go")
                    return False
                time.sleep(RETRY_DATABASE_S)
                self.heartbeat.turned()
            except SchemaMismatchError as exc:
                # A worker that fits the new schema will take the job back.
                self.on_schema_mismatch(exc)
                self.lost("the job table is no longer as this worker knows it")
                return False

    def lost(self, why: str) -> None:
        """The job is someone else's, now or soon: nothing may go on making it here."""
        self.runner.kill()
        self.metrics.lease_lost()
        self.release(why)

    def release(self, why: str | None = None) -> None:
        if why and self.lease is not None:
            log.warning("job %s: let go: %s", self.lease.job_id, why)
        self.lease = None
        self.metrics.idle()
        self.watch.end()
        self.heartbeat.end()


def _name(commit: Callable[..., Any]) -> str:
    """Return the name of a function, also of one with arguments bound to it."""
    return str(getattr(getattr(commit, "func", commit), "__name__", "other"))
