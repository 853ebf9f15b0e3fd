"""The worker table: who is there, what they do, when they last spoke."""

from sqlalchemy import Connection, delete, insert, update

from storage.engine import Database
from storage.jobs import WorkerIdentity
from storage.models import utcnow, worker

FORGET_S = 7 * 24 * 3600.0


class WorkerStore:
    """What a supervisor says of itself."""

    def __init__(self, database: Database, who: WorkerIdentity) -> None:
        self.database = database
        self.who = who

    def say(self, state: str, job_id: int | None = None, *, patience_s: float = 5.0) -> None:
        """Record this worker with its state: starting, idle, busy, draining or stopped."""
        who = self.who

        def work(conn: Connection) -> None:
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
            if state == "starting":
                values["started_at"] = utcnow()
            if conn.execute(update(worker).where(worker.c.name == who.name).values(values)).rowcount == 0:
                conn.execute(insert(worker).values(name=who.name, **{**values, "started_at": utcnow()}))

        self.database.write(work, patience_s=patience_s)

    def forget_old(self) -> None:
        """Drop workers that have been silent for a week."""
        self.database.write(
            lambda conn: conn.execute(delete(worker).where(worker.c.seen_at < utcnow() - FORGET_S))
        )
