"""Limits on how many jobs of a user or a queue run at once; scheduling.py applies them to claims."""

from collections import Counter
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select, text, update

from storage.db.engine import Database
from storage.db.store.scheduling import ANYBODY, QuotaUsage
from storage.db.tables import CLAIMABLE, RUNNING, job, quota

SCOPES = ("user", "queue")


@dataclass(frozen=True)
class Quota:
    """One limit, and how much of it is taken. Of '*', the running jobs are those of the fullest."""

    scope: str
    name: str
    max_running: int
    running: int


class Quotas:
    """The table of limits."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def set(self, scope: str, name: str, most: int) -> None:
        """Let at most so many run from the next claim on; what runs already goes on."""

        def work(conn: Connection) -> None:
            mine = quota.c.scope == scope, quota.c.name == name
            if conn.execute(update(quota).where(*mine).values(max_running=most)).rowcount == 0:
                conn.execute(insert(quota).values(scope=scope, name=name, max_running=most))

        self.database.write(work)

    def remove(self, scope: str, name: str) -> bool:
        """
        Returns:
            Whether there was such a limit.
        """
        gone = delete(quota).where(quota.c.scope == scope, quota.c.name == name)
        return self.database.write(lambda conn: conn.execute(gone).rowcount == 1)

    def all(self) -> list[Quota]:
        """All limits, with how many run now."""

        def ask(conn: Connection) -> list[Quota]:
            running: Counter[tuple[str, str]] = Counter()
            counted = select(job.c.user, job.c.queue, func.count()).where(text(RUNNING))
            for user, queue, number in conn.execute(counted.group_by(job.c.user, job.c.queue)):
                running["user", user] += number
                running["queue", queue] += number
            rows = conn.execute(select(quota).order_by(quota.c.scope.desc(), quota.c.name)).all()
            named = {(row.scope, row.name) for row in rows}

            def taken(scope: str, name: str) -> int:
                if name != ANYBODY:
                    return running[scope, name]
                others = [n for key, n in running.items() if key[0] == scope and key not in named]
                return max(others, default=0)

            return [Quota(row.scope, row.name, row.max_running, taken(row.scope, row.name)) for row in rows]

        return self.database.read(ask)

    def full_for(self, user: str, queue: str) -> Quota | None:
        """The limit that keeps a job of this user in this queue from starting now; None if there is none."""

        def ask(conn: Connection) -> Quota | None:
            full = QuotaUsage(conn, True, claiming=False).for_(user, queue)
            return None if full is None else Quota(*full)

        return self.database.read(ask)

    def shut(self) -> list[tuple[Quota, int]]:
        """Limits of 0, with how many jobs wait behind each that could run otherwise."""

        def ask(conn: Connection) -> list[tuple[Quota, int]]:
            found = []
            for row in conn.execute(select(quota).where(quota.c.max_running == 0, quota.c.name != ANYBODY)):
                column = job.c.user if row.scope == "user" else job.c.queue
                behind = select(func.count()).where(text(CLAIMABLE), column == row.name)
                if number := int(conn.execute(behind).scalar_one()):
                    found.append((Quota(row.scope, row.name, 0, 0), number))
            return found

        return self.database.read(ask)
