"""
Which job a worker gets next: what stands under every claim.

In this order:

1. A job that yielded to others and has waited long enough since: no training starves.
2. The highest priority there is, exactly, on any broker.
3. Of equal priority, the user with the fewest running jobs, then the one who was served
   longest ago: users take turns, however many jobs each has.
4. Of one user, the oldest job.

Users and queues at their quota are passed over. The cost does not grow with the queue:
the partial index ix_job_claimable leads from one user to the next (a loose index scan),
and running jobs are as many as there are workers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    TextClause,
    and_,
    bindparam,
    func,
    or_,
    select,
    text,
    update,
)

from storage.jobs import Lease
from storage.models import CLAIMABLE, RIPENING, RUNNING, YIELDED, attempt, job, quota, utcnow, worker
from storage.transitions import BACKOFF_S

PATIENCE_S = 600.0
"""A job that yielded goes before all others when it has waited so many seconds."""
IDLE_S = 3.0
SEEN_S = 30.0
RIPE_AT_ONCE = 100
ABOVE_ALL = 2**31  # one more than any priority
ANYBODY = "*"

# Older workers leave newer specs to newer workers.
_MINE = "kind IN :kinds AND spec_version <= :spec_version"


def _sql(statement: str) -> TextClause:
    lists = [name for name in ("kinds", "queues") if f":{name}" in statement]
    return text(statement).bindparams(*(bindparam(name, expanding=True) for name in lists))


_LEVEL = _sql(
    f"SELECT priority FROM job WHERE {CLAIMABLE} AND queue = :queue AND {_MINE} AND priority < :below"
    " ORDER BY priority DESC LIMIT 1"
)
_OLDEST = (
    f"SELECT id FROM job WHERE {CLAIMABLE} AND queue = :queue AND priority = :level"
    f' AND "user" = :name AND {_MINE} ORDER BY id LIMIT 1'
)
_PATIENT = (
    f'SELECT id, queue, "user" AS name FROM job WHERE {YIELDED} AND {CLAIMABLE} AND queue IN :queues'
    f" AND {_MINE} AND yielded_at < :before ORDER BY yielded_at LIMIT 1"
)
# SQLite writes in one transaction at a time, and knows no row locks.
_OLDEST_OF = {"sqlite": _sql(_OLDEST), "postgresql": _sql(_OLDEST + " FOR UPDATE SKIP LOCKED")}
_PATIENT_OF = {"sqlite": _sql(_PATIENT), "postgresql": _sql(_PATIENT + " FOR UPDATE SKIP LOCKED")}

# Each turn of the recursion is one step in the index, over all jobs of a user at once.
_USERS = _sql(
    f"""
    WITH RECURSIVE waiting(name) AS (
        SELECT (SELECT "user" FROM job WHERE {CLAIMABLE} AND queue = :queue AND priority = :level
                ORDER BY "user" LIMIT 1)
        UNION ALL
        SELECT (SELECT "user" FROM job WHERE {CLAIMABLE} AND queue = :queue AND priority = :level
                AND "user" > waiting.name ORDER BY "user" LIMIT 1)
        FROM waiting WHERE waiting.name IS NOT NULL
    )
    SELECT name, :queue AS queue,
           (SELECT id FROM job WHERE {CLAIMABLE} AND queue = :queue AND priority = :level
            AND "user" = waiting.name ORDER BY id LIMIT 1) AS oldest,
           (SELECT count(*) FROM job WHERE {RUNNING} AND "user" = waiting.name) AS running,
           coalesce((SELECT served_at FROM share WHERE "user" = waiting.name), 0) AS served_at
    FROM waiting WHERE name IS NOT NULL
    """
)


@dataclass(frozen=True)
class Wanted:
    """What a worker can run."""

    queues: Sequence[str]
    kinds: Sequence[str]
    spec_version: int

    def bound(self, **more: Any) -> dict[str, Any]:
        return {"kinds": list(self.kinds), "spec_version": self.spec_version, **more}


def is_ripe() -> ColumnElement[bool]:
    """
    A job that waited for its time may be claimed now.

    A time further ahead than the longest backoff was noted before somebody set the clock back.
    """
    now, longest = utcnow(), BACKOFF_S[-1] + 1
    return and_(text(RIPENING), or_(job.c.not_before <= now, job.c.not_before > now + longest))


def ripen(conn: Connection) -> None:
    """Let jobs whose time has come be claimed: `not_before` passes into NULL."""
    ripe = select(job.c.id).where(is_ripe()).limit(RIPE_AT_ONCE)
    ids = conn.execute(ripe.with_for_update(skip_locked=True)).scalars().all()
    if ids:
        conn.execute(update(job).where(job.c.id.in_(ids)).values(not_before=None))


def best_job(conn: Connection, wanted: Wanted) -> int | None:
    """
    The job that a worker should get, its row locked on Postgres.

    Returns:
        Its id; None: nothing that this worker can run may run now.
    """
    full = _Full(conn)
    dialect = conn.dialect.name
    before = conn.execute(select(utcnow())).scalar_one() - PATIENCE_S if _any_yielded(conn) else None
    if before is not None:
        bound = wanted.bound(queues=list(wanted.queues), before=before)
        patient = conn.execute(_PATIENT_OF[dialect], bound).mappings().first()
        if patient is not None and not full.for_(patient):
            return int(patient["id"])
    below = ABOVE_ALL
    while (level := _level(conn, wanted, below)) is not None:
        several = False
        for several, candidate in _in_turn(conn, wanted, level):
            if full.for_(candidate):
                continue
            bound = wanted.bound(queue=candidate["queue"], level=level, name=candidate["name"])
            found = conn.execute(_OLDEST_OF[dialect], bound).scalar_one_or_none()
            if found is not None:
                if several:
                    _serve(conn, candidate["name"])
                return int(found)
        below = level
    return None


def waits_above(conn: Connection, wanted: Wanted, priority: int) -> int | None:
    """The id of a job that could run on this worker and has a higher priority, if one waits."""
    level = _level(conn, wanted, ABOVE_ALL)
    if level is None or level <= priority:
        return None
    full = _Full(conn)
    for _, candidate in _in_turn(conn, wanted, level):
        if not full.for_(candidate):
            bound = wanted.bound(queue=candidate["queue"], level=level, name=candidate["name"])
            found = conn.execute(_OLDEST_OF["sqlite"], bound).scalar_one_or_none()
            if found is not None:
                return int(found)
    return None


def may_stay(conn: Connection, lease: Lease) -> bool:
    """Whether a job that has yielded before has not yet run for as long as it was kept waiting."""
    if lease.job.yielded_at is None:
        return False
    began = select(attempt.c.started_at).where(
        attempt.c.job_id == lease.job_id, attempt.c.number == lease.attempt
    )
    now, started = conn.execute(select(utcnow(), began.scalar_subquery())).one()
    return bool(now - started < started - lease.job.yielded_at)


def idle_worker(conn: Connection, waiting: int) -> bool:
    """
    Whether a worker without work serves the queue of this waiting job.

    One that has not taken it IDLE_S after it could have is not counted: it is gone, or cannot.
    """
    row = conn.execute(select(job.c.queue, job.c.created_at, utcnow()).where(job.c.id == waiting)).one()
    queue, created_at, now = row
    if now - created_at > IDLE_S:
        return False
    idle = select(worker.c.queues).where(worker.c.state == "idle", worker.c.seen_at > utcnow() - SEEN_S)
    return any(queue in queues.split(",") for queues in conn.execute(idle).scalars())


def _any_yielded(conn: Connection) -> bool:
    return conn.execute(text(f"SELECT 1 FROM job WHERE {YIELDED} LIMIT 1")).first() is not None


def _level(conn: Connection, wanted: Wanted, below: int) -> int | None:
    """The highest priority under `below` at which something waits."""
    levels = [
        conn.execute(_LEVEL, wanted.bound(queue=queue, below=below)).scalar_one_or_none()
        for queue in wanted.queues
    ]
    return max((level for level in levels if level is not None), default=None)


def _in_turn(conn: Connection, wanted: Wanted, level: int) -> Iterator[tuple[bool, RowMapping]]:
    """(whether there are several users, user in a queue), in the order in which they should be served."""
    waiting: list[RowMapping] = []
    for queue in wanted.queues:
        waiting += conn.execute(_USERS, {"queue": queue, "level": level}).mappings()
    several = len({one["name"] for one in waiting}) > 1
    for one in sorted(waiting, key=_turn):
        yield several, one


def _turn(one: RowMapping) -> tuple[int, float, str, int]:
    return one["running"], one["served_at"], one["name"], one["oldest"]


def _serve(conn: Connection, user: str) -> None:
    """Put a user at the end of the round."""
    now = str(utcnow().compile(dialect=conn.dialect))
    conn.execute(
        text(
            f'INSERT INTO share ("user", served_at) VALUES (:name, {now})'
            ' ON CONFLICT ("user") DO UPDATE SET served_at = excluded.served_at'
        ),
        {"name": user},
    )


class _Full:
    """Which users and queues have as many running jobs as they may."""

    def __init__(self, conn: Connection) -> None:
        # Where there are quotas, claims pass one at a time: two must not both take the last place.
        rows = conn.execute(select(quota).with_for_update()).all()
        self.limits = {(row.scope, row.name): row.max_running for row in rows}
        self.running: Counter[tuple[str, str]] = Counter()
        if self.limits:
            counted = select(job.c.user, job.c.queue, func.count()).where(text(RUNNING))
            for user, queue, number in conn.execute(counted.group_by(job.c.user, job.c.queue)):
                self.running["user", user] += number
                self.running["queue", queue] += number

    def for_(self, candidate: RowMapping) -> bool:
        if not self.limits:
            return False
        places = (("user", candidate["name"]), ("queue", candidate["queue"]))
        return any(self.running[scope, name] >= self._limit(scope, name) for scope, name in places)

    def _limit(self, scope: str, name: str) -> float:
        return float(self.limits.get((scope, name), self.limits.get((scope, ANYBODY), float("inf"))))
