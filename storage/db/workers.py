"""The worker table: name, state and last report of each worker."""

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from jobs.errors import WorkerNameTakenError
from storage.db.engine import Database
from storage.db.rows import WorkerIdentity
from storage.db.tables import utcnow, worker

FORGET_AFTER_S = 7 * 24 * 3600.0
RENAME_DELAY_FACTOR = 1.25
"""Heartbeat intervals within which a live worker takes back its name."""


class WorkerStore:
    """
    The row of one worker.

    The first report takes the name, because a restarted worker, perhaps on another machine, needs it at
    once. If the previous process is alive, its next report finds its row taken and takes it back; so the
    later worker learns that there are two. A worker that did not report for longer than a lease has lost
    its name as it has lost its jobs.

    Args:
        lease_seconds: time without a report after which a worker has lost its name.
        heartbeat_seconds: interval of the reports of all workers.
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
        self.reported_at = 0.0
        self.before: Row[Any] | None = None
        """The row of another process with this name, if it has reported within a lease."""
        self._disputed_until: float | None = None

    @property
    def name_disputed(self) -> bool:
        """Return whether another live worker may have this name; until then no job may be claimed."""
        return self._disputed_until is not None

    def confirm_name(self) -> None:
        """Record that the process that had this name before has ended."""
        self._disputed_until = None

    def report(self, state: str, job_id: int | None = None, *, patience_s: float = 5.0) -> bool:
        """
        Record this worker with its state: starting, idle, busy, draining or stopped.

        Returns:
            Whether a user has asked it to drain; see request_drain().

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
        drains = False
        if self.started_at is None:
            self.before, self.started_at = self.database.write(
                lambda conn: self._take_name(conn, values), patience_s=patience_s
            )
            if self.before is not None:
                self._disputed_until = time.monotonic() + RENAME_DELAY_FACTOR * self.heartbeat_seconds
        else:
            drains = self._keep_name(values, patience_s)
            if self._disputed_until is not None and time.monotonic() >= self._disputed_until:
                self._disputed_until = None
        self.reported_at = time.monotonic()
        return drains

    def _take_name(self, conn: Connection, values: dict[str, Any]) -> tuple[Row[Any] | None, float]:
        """Return the row of another process that may be alive, and when this one started."""
        named = worker.c.name == self.who.name
        recent = worker.c.seen_at > utcnow() - self.lease_seconds
        before = conn.execute(select(worker).where(named, recent, worker.c.state != "stopped")).one_or_none()
        values = {**values, "started_at": utcnow(), "drain_requested_at": None}
        if conn.execute(update(worker).where(named).values(values)).rowcount == 0:
            conn.execute(insert(worker).values(name=self.who.name, **values))
        started_at = conn.execute(select(worker.c.started_at).where(named)).scalar_one()
        return before, started_at

    def _keep_name(self, values: dict[str, Any], patience_s: float) -> bool:
        named, who = worker.c.name == self.who.name, self.who
        mine = (
            worker.c.boot_id == who.boot_id,
            worker.c.pid == who.pid,
            worker.c.start_ticks == who.start_ticks,
            worker.c.started_at == self.started_at,
        )
        kept = update(worker).where(named, *mine).values(values).returning(worker.c.drain_requested_at)
        # Nearly always this one statement is all: many workers report often.
        row = self.database.write(
            lambda conn: conn.execute(kept).first(), patience_s=patience_s, autocommit=True
        )
        if row is None:
            self.database.write(lambda conn: self._regain_name(conn, values), patience_s=patience_s)
        return row is not None and row.drain_requested_at is not None

    def _regain_name(self, conn: Connection, values: dict[str, Any]) -> None:
        named, who = worker.c.name == self.who.name, self.who
        other = conn.execute(select(worker).where(named)).one_or_none()
        values = {**values, "started_at": self.started_at}
        if other is None:
            conn.execute(insert(worker).values(name=who.name, **values))
        elif values["state"] == "stopped":
            pass  # the row belongs to the other worker now
        elif other.state == "stopped" or self._was_first(other.started_at):
            conn.execute(update(worker).where(named).values(values))
        else:
            raise WorkerNameTakenError(
                f"another worker named {who.name} is alive: process {other.pid} on {other.host}",
                hint="start this one with another --name, or give the machines different host names",
            )

    def _was_first(self, their_start: float) -> bool:
        """Return whether this process had the name before the other, and has reported since."""
        assert self.started_at is not None
        return their_start > self.started_at and time.monotonic() - self.reported_at <= self.lease_seconds

    @staticmethod
    def request_drain(database: Database, names: Sequence[str]) -> None:
        """Ask workers to drain and exit; a process that takes the name later does not."""
        asked = update(worker).where(worker.c.name.in_(names), worker.c.state != "stopped")
        database.write(lambda conn: conn.execute(asked.values(drain_requested_at=utcnow())))

    @staticmethod
    def forget(database: Database, name: str, *, after_s: float) -> bool:
        """
        Delete the row of a worker that has stopped, or has not reported for `after_s` seconds.

        Returns:
            Whether there was one.
        """
        over = or_(worker.c.state == "stopped", worker.c.seen_at < utcnow() - after_s)
        return bool(
            database.write(
                lambda conn: conn.execute(delete(worker).where(worker.c.name == name, over)).rowcount
            )
        )

    def forget_old(self) -> None:
        """Delete the rows of workers that have not reported for a week."""
        self.database.write(
            lambda conn: conn.execute(delete(worker).where(worker.c.seen_at < utcnow() - FORGET_AFTER_S))
        )
