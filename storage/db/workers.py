"""The worker table: who is there, what they do, when they last spoke."""

import time
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from jobs.errors import WorkerNameTakenError
from storage.db.engine import Database
from storage.db.rows import WorkerIdentity
from storage.db.tables import utcnow, worker

FORGET_S = 7 * 24 * 3600.0
HEARD_AFTER = 1.25
"""Heartbeats within which a live worker whose name was taken has taken it back."""


class WorkerStore:
    """
    What a supervisor says of itself.

    The first word takes the name, because a worker that was restarted, perhaps on a machine that
    cannot see what became of the process before, needs it at once. If that process lives, its next
    word finds its row taken, and takes it back; so the worker that came later learns that there are
    two. A worker that was away for longer than a lease has lost its name as it has lost its jobs.

    Args:
        lease_seconds: silence after which a worker has lost its name.
        heartbeat_seconds: of all workers; the time between two words.
    """

    def __init__(
        self,
        database: Database,
        who: WorkerIdentity,
        *,
        lease_seconds: float = 60.0,
        heartbeat_seconds: float = 10.0,
    ) -> None:
        self.database = database
        self.who = who
        self.lease_seconds = lease_seconds
        self.heartbeat_seconds = heartbeat_seconds
        self.started_at: float | None = None
        self.said_at = 0.0
        self.before: Row[Any] | None = None
        """The row that another process left under this name, if it has spoken within a lease."""
        self._doubted_until: float | None = None

    @property
    def doubted(self) -> bool:
        """Return whether another live worker may still claim this name: it is no time to begin a job."""
        return self._doubted_until is not None

    def trust(self) -> None:
        """The process that had this name before is known to have ended."""
        self._doubted_until = None

    def say(self, state: str, job_id: int | None = None, *, patience_s: float = 5.0) -> None:
        """
        Record this worker with its state: starting, idle, busy, draining or stopped.

        Raises:
            WorkerNameTakenError: another live worker has this name, and had it first.
        """
        who = self.who
        values = {
            "host": who.host,
            "boot_id": who.boot_id,
            "pid": who.pid,
            "start_ticks": who.start_ticks,
            "device": who.device,
            "queues": ",".join(who.queues),
            "state": state,
            "job_id": job_id,
            "version": who.version,
            "seen_at": utcnow(),
        }
        if self.started_at is None:
            self.before, self.started_at = self.database.write(
                lambda conn: self._take_name(conn, values), patience_s=patience_s
            )
            if self.before is not None:
                self._doubted_until = time.monotonic() + HEARD_AFTER * self.heartbeat_seconds
        else:
            self.database.write(lambda conn: self._keep_name(conn, values), patience_s=patience_s)
            if self._doubted_until is not None and time.monotonic() >= self._doubted_until:
                self._doubted_until = None
        self.said_at = time.monotonic()

    def _take_name(self, conn: Connection, values: dict[str, Any]) -> tuple[Row[Any] | None, float]:
        """Returns the row of another process that may live, and when this one started."""
        named = worker.c.name == self.who.name
        lately = worker.c.seen_at > utcnow() - self.lease_seconds
        before = conn.execute(select(worker).where(named, lately, worker.c.state != "stopped")).one_or_none()
        values = {**values, "started_at": utcnow()}
        if conn.execute(update(worker).where(named).values(values)).rowcount == 0:
            conn.execute(insert(worker).values(name=self.who.name, **values))
        started_at = conn.execute(select(worker.c.started_at).where(named)).scalar_one()
        return before, started_at

    def _keep_name(self, conn: Connection, values: dict[str, Any]) -> None:
        named, who = worker.c.name == self.who.name, self.who
        mine = (
            worker.c.boot_id == who.boot_id,
            worker.c.pid == who.pid,
            worker.c.start_ticks == who.start_ticks,
            worker.c.started_at == self.started_at,
        )
        if conn.execute(update(worker).where(named, *mine).values(values)).rowcount:
            return
        other = conn.execute(select(worker).where(named)).one_or_none()
        values = {**values, "started_at": self.started_at}
        if other is None:
            conn.execute(insert(worker).values(name=who.name, **values))
        elif values["state"] == "stopped":
            pass  # the other's row is none of this worker's business any more
        elif other.state == "stopped" or self._was_first(other.started_at):
            conn.execute(update(worker).where(named).values(values))
        else:
            raise WorkerNameTakenError(
                f"another worker named {who.name} is alive: process {other.pid} on {other.host}",
                hint="start this one with another --name, or give the machines different host names",
            )

    def _was_first(self, their_start: float) -> bool:
        """Whether this process had the name before the other, and was not away meanwhile."""
        assert self.started_at is not None
        return their_start > self.started_at and time.monotonic() - self.said_at <= self.lease_seconds

    def forget_old(self) -> None:
        """Drop workers that have been silent for a week."""
        self.database.write(
            lambda conn: conn.execute(delete(worker).where(worker.c.seen_at < utcnow() - FORGET_S))
        )
