"""Quotas: how many jobs of a user or a queue may run at once; scheduling.py applies them to claims."""

from collections import Counter
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select, text, update

from storage.db.engine import Database
from storage.db.rows import Job as JobRow
from storage.db.store.scheduling import EVERYONE, QuotaUsage
from storage.db.tables import CLAIMABLE, RUNNING, job, quota


@dataclass(frozen=True)
class Quota:
    """One quota and the running jobs; for '*' those of the user or queue with the most."""

    scope: str
    name: str
    max_running: int
    running: int


class Quotas:
    """The table of quotas."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def set(self, scope: str, name: str, most: int) -> None:
        """Set a quota for future claims; running jobs continue."""

        def work(conn: Connection) -> None:
            mine = quota.c.scope == scope, quota.c.name == name
            if conn.execute(update(quota).where(*mine).values(max_running=most)).rowcount == 0:
                conn.execute(insert(quota).values(scope=scope, name=name, max_running=most))

        self.database.write(work)

    def remove(self, scope: str, name: str) -> bool:
        """Delete a quota; return whether there was one."""
        gone = delete(quota).where(quota.c.scope == scope, quota.c.name == name)
        return self.database.write(lambda conn: conn.execute(gone).rowcount == 1)

    def all(self) -> list[Quota]:
        """Return all quotas with the running jobs."""

        def ask(conn: Connection) -> list[Quota]:
            running: Counter[tuple[str, str]] = Counter()
            counted = select(job.c.user, job.c.queue, func.count()).where(text(RUNNING))
            for user, queue, number in conn.execute(counted.group_by(job.c.user, job.c.queue)):
                running["user", user] += number
                running["queue", queue] += number
            rows = conn.execute(select(quota).order_by(quota.c.scope.desc(), quota.c.name)).all()
            named = {(row.scope, row.name) for row in rows}

            def taken(scope: str, name: str) -> int:
                if name != EVERYONE:
                    return running[scope, name]
                others = [n for key, n in running.items() if key[0] == scope and key not in named]
                return max(others, default=0)

            return [Quota(row.scope, row.name, row.max_running, taken(row.scope, row.name)) for row in rows]

        return self.database.read(ask)

    def quota_blocking_job(self, job: JobRow) -> Quota | None:
        """Return the quota that blocks a job now; None if there is none."""
        return self.blocking_quota(job.user, job.queue)

    def blocking_quota(self, user: str, queue: str) -> Quota | None:
        """Return the quota that blocks a job of this user in this queue now; None if there is none."""

        def ask(conn: Connection) -> Quota | None:
            full = QuotaUsage(conn, True, claiming=False).exceeded(user, queue)
            return None if full is None else Quota(*full)

        return self.database.read(ask)

    def blocking_all(self) -> list[tuple[Quota, int]]:
        """Return the quotas of 0, each with the number of jobs that it blocks."""

        def ask(conn: Connection) -> list[tuple[Quota, int]]:
            found = []
            for row in conn.execute(select(quota).where(quota.c.max_running == 0, quota.c.name != EVERYONE)):
                column = job.c.user if row.scope == "user" else job.c.queue
                behind = select(func.count()).where(text(CLAIMABLE), column == row.name)
                if number := int(conn.execute(behind).scalar_one()):
                    found.append((Quota(row.scope, row.name, 0, 0), number))
            return found

        return self.database.read(ask)
