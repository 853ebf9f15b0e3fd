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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    TextClause,
    bindparam,
    func,
    select,
    text,
    update,
)

from storage.jobs import Lease
from storage.models import CLAIMABLE, CLOCKS, RIPENING, RUNNING, YIELDED, attempt, job, quota, utcnow, worker
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


def _by(dialect: str, index: str) -> str:
    """
    SQLite prefers an index with `state` in it, and reads the whole queue, unless it is told.

    Postgres must have none: it leaves out a condition that a partial index implies, and
    without one on the first column it reads the index from its beginning.
    """
    return f"INDEXED BY {index}" if dialect == "sqlite" else ""


_OLDEST = {
    dialect: f"SELECT id FROM job {_by(dialect, 'ix_job_claimable')} WHERE {CLAIMABLE} AND queue = :queue"
    f' AND priority = :level AND "user" = :name AND {_MINE} ORDER BY id LIMIT 1'
    for dialect in CLOCKS
}
_PATIENT = (
    f'SELECT id, queue, "user" AS name FROM job {{by}} WHERE {YIELDED} AND {CLAIMABLE} AND queue IN :queues'
    f" AND {_MINE} AND yielded_at < :before ORDER BY yielded_at LIMIT 1"
)
# SQLite writes in one transaction at a time, and knows no row locks.
_LOOK_AT_OLDEST = {dialect: _sql(statement) for dialect, statement in _OLDEST.items()}
_TAKE_OLDEST = {
    "sqlite": _sql(_OLDEST["sqlite"]),
    "postgresql": _sql(_OLDEST["postgresql"] + " FOR UPDATE SKIP LOCKED"),
}
_PATIENT_OF = {
    "sqlite": _sql(_PATIENT.format(by=_by("sqlite", "ix_job_yielded"))),
    "postgresql": _sql(_PATIENT.format(by="") + " FOR UPDATE SKIP LOCKED"),
}

# Who waits at the highest priority of a queue. Each turn of the recursion is one step in the
# index, over all jobs of a user at once.
_USERS = {
    dialect: _sql(
        f"""
    WITH RECURSIVE top(level) AS (
        SELECT priority FROM job {claimable} WHERE {CLAIMABLE} AND queue = :queue AND {_MINE}
        AND priority < :below ORDER BY priority DESC LIMIT 1
    ),
    waiting(name) AS (
        SELECT (SELECT "user" FROM job {claimable} WHERE {CLAIMABLE} AND queue = :queue
                AND priority = (SELECT level FROM top) ORDER BY "user" LIMIT 1)
        UNION ALL
        SELECT (SELECT "user" FROM job {claimable} WHERE {CLAIMABLE} AND queue = :queue
                AND priority = (SELECT level FROM top) AND "user" > waiting.name ORDER BY "user" LIMIT 1)
        FROM waiting WHERE waiting.name IS NOT NULL
    )
    SELECT (SELECT level FROM top) AS level, name,
           (SELECT id FROM job {claimable} WHERE {CLAIMABLE} AND queue = :queue
            AND priority = (SELECT level FROM top) AND "user" = waiting.name ORDER BY id LIMIT 1) AS oldest,
           coalesce((SELECT served_at FROM share WHERE "user" = waiting.name), 0) AS served_at
    FROM waiting WHERE name IS NOT NULL
    """
    )
    for dialect in CLOCKS
    for claimable in (_by(dialect, "ix_job_claimable"),)
}
_RUNNING = select(job.c.user).where(text(RUNNING))
# One look tells whether anything of what is rare is there at all.
_GLANCE = {
    dialect: _sql(
        f"""
        SELECT (SELECT version_num FROM alembic_version) AS revision,
               EXISTS (SELECT 1 FROM job {_by(dialect, "ix_job_ripening")} WHERE {RIPENING}) AS ripening,
               EXISTS (SELECT 1 FROM quota) AS quotas,
               EXISTS (SELECT 1 FROM job {_by(dialect, "ix_job_yielded")} WHERE {YIELDED}) AS yielded,
               {clock} AS now
        """
    )
    for dialect, clock in CLOCKS.items()
}
_RIPE = {
    dialect: _sql(
        f"""
        SELECT id FROM job {_by(dialect, "ix_job_ripening")} WHERE {RIPENING}
        AND (not_before <= {clock} OR not_before > {clock} + :longest) LIMIT :most
        """
    )
    for dialect, clock in CLOCKS.items()
}
_DUE_IN = {
    dialect: _sql(
        f"""
        SELECT min(not_before) - {clock} FROM job {_by(dialect, "ix_job_ripening")}
        WHERE {RIPENING} AND held = 0 AND blockers = 0
        """
    )
    for dialect, clock in CLOCKS.items()
}
_SERVE = {
    dialect: _sql(
        f'INSERT INTO share ("user", served_at) VALUES (:name, {clock})'
        ' ON CONFLICT ("user") DO UPDATE SET served_at = excluded.served_at'
    )
    for dialect, clock in CLOCKS.items()
}


@dataclass(frozen=True)
class Wanted:
    """What a worker can run."""

    queues: Sequence[str]
    kinds: Sequence[str]
    spec_version: int

    def bound(self, **more: Any) -> dict[str, Any]:
        return {"kinds": list(self.kinds), "spec_version": self.spec_version, **more}


def ripe(conn: Connection, most: int = RIPE_AT_ONCE) -> list[int]:
    """
    Jobs that waited for their time, which has come.

    A time further ahead than the longest backoff was noted before somebody set the clock back.
    """
    bound = {"most": most, "longest": BACKOFF_S[-1] + 1}
    return list(conn.execute(_RIPE[conn.dialect.name], bound).scalars())


def ripen(conn: Connection) -> None:
    """Let jobs whose time has come be claimed: `not_before` passes into NULL."""
    if ids := ripe(conn):
        still = select(job.c.id).where(job.c.id.in_(ids), job.c.not_before.is_not(None))
        locked = still.with_for_update(skip_locked=True)
        conn.execute(update(job).where(job.c.id.in_(locked)).values(not_before=None))


def due_in(conn: Connection) -> float | None:
    """Seconds until the next job that waits for its time may be claimed; None if none waits."""
    soonest = conn.execute(_DUE_IN[conn.dialect.name]).scalar_one()
    return None if soonest is None else max(float(soonest), 0.0)


@dataclass(frozen=True)
class Glance:
    """What a claim must look at more closely."""

    revision: str | None
    ripening: bool
    quotas: bool
    yielded: bool
    now: float


def glance(conn: Connection) -> Glance:
    """One statement instead of five, since most of the time there is nothing of all this."""
    row = conn.execute(_GLANCE[conn.dialect.name]).one()
    return Glance(row.revision, bool(row.ripening), bool(row.quotas), bool(row.yielded), float(row.now))


def best_job(conn: Connection, wanted: Wanted, seen: Glance | None = None) -> int | None:
    """
    The job that a worker should get, its row locked on Postgres.

    Returns:
        Its id; None: nothing that this worker can run may run now.
    """
    seen = seen or glance(conn)
    full = _Full(conn, seen.quotas)
    dialect = conn.dialect.name
    if seen.yielded:
        bound = wanted.bound(queues=list(wanted.queues), before=seen.now - PATIENCE_S)
        patient = conn.execute(_PATIENT_OF[dialect], bound).first()
        if patient is not None and not full.for_(patient.name, patient.queue):
            return int(patient.id)
    below = ABOVE_ALL
    while turn := _turn(conn, wanted, below):
        for one in turn:
            if full.for_(one.name, one.queue):
                continue
            found = conn.execute(_TAKE_OLDEST[dialect], one.bound(wanted)).scalar_one_or_none()
            if found is not None:
                if len({other.name for other in turn}) > 1:
                    _serve(conn, one.name)
                return int(found)
        below = turn[0].level
    return None


def waits_above(conn: Connection, wanted: Wanted, priority: int) -> int | None:
    """The id of a job that could run on this worker and has a higher priority, if one waits."""
    turn = _turn(conn, wanted, ABOVE_ALL)
    if not turn or turn[0].level <= priority:
        return None
    full = _Full(conn, True)
    for one in turn:
        if not full.for_(one.name, one.queue):
            found = conn.execute(_LOOK_AT_OLDEST[conn.dialect.name], one.bound(wanted)).scalar_one_or_none()
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


class _Waiting(NamedTuple):
    """A user in a queue, with jobs at the highest priority there; sorted by whose turn it is."""

    running: int
    served_at: float
    name: str
    oldest: int
    queue: str
    level: int

    def bound(self, wanted: Wanted) -> dict[str, Any]:
        return wanted.bound(queue=self.queue, level=self.level, name=self.name)


def _turn(conn: Connection, wanted: Wanted, below: int) -> list[_Waiting]:
    """Who waits at the highest priority under `below`, in the order in which they should be served."""
    rows = [
        (queue, row)
        for queue in wanted.queues
        for row in conn.execute(_USERS[conn.dialect.name], wanted.bound(queue=queue, below=below))
    ]
    several = len({row.name for _, row in rows}) > 1
    running = Counter(conn.execute(_RUNNING).scalars()) if several else Counter[str]()
    waiting = [
        _Waiting(running[row.name], row.served_at, row.name, row.oldest, queue, row.level)
        for queue, row in rows
    ]
    highest = max((one.level for one in waiting), default=0)
    return sorted(one for one in waiting if one.level == highest)


def _serve(conn: Connection, user: str) -> None:
    """Put a user at the end of the round."""
    conn.execute(_SERVE[conn.dialect.name], {"name": user})


class _Full:
    """Which users and queues have as many running jobs as they may."""

    def __init__(self, conn: Connection, quotas: bool) -> None:
        # Where there are quotas, claims pass one at a time: two must not both take the last place.
        rows = conn.execute(select(quota).with_for_update()).all() if quotas else ()
        self.limits = {(row.scope, row.name): row.max_running for row in rows}
        self.running: Counter[tuple[str, str]] = Counter()
        if self.limits:
            counted = select(job.c.user, job.c.queue, func.count()).where(text(RUNNING))
            for user, queue, number in conn.execute(counted.group_by(job.c.user, job.c.queue)):
                self.running["user", user] += number
                self.running["queue", queue] += number

    def for_(self, user: str, queue: str) -> bool:
        if not self.limits:
            return False
        places = (("user", user), ("queue", queue))
        return any(self.running[scope, name] >= self._limit(scope, name) for scope, name in places)

    def _limit(self, scope: str, name: str) -> float:
        return float(self.limits.get((scope, name), self.limits.get((scope, ANYBODY), float("inf"))))
