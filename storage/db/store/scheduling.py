"""
The order in which jobs are claimed.

1. A job that was preempted and has waited MAX_PREEMPTED_WAIT_S since, so that no training starves.
2. The highest priority.
3. Of equal priority, the job of the user with the fewest running jobs, then of the user who was served least
   recently, so that users take turns.
4. Of one user, the oldest job, unless `ganq move` has changed that.

Users and queues at their quota are skipped. The cost does not grow with the number of queued jobs: the
partial index ix_job_claimable leads from one user to the next (a loose index scan), and there are only as
many running jobs as workers.

On Postgres a plain claim (no quotas, delayed or preempted jobs) is the function ganq_claim of migration 0011,
which has the same order.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Integer,
    ScalarSelect,
    TextClause,
    bindparam,
    column,
    func,
    select,
    text,
    tuple_,
    update,
)

from storage.db.backoff import Backoffs, Key, Wait
from storage.db.rows import Lease
from storage.db.tables import (
    CLAIMABLE,
    CLOCKS,
    DELAYED,
    PREEMPTED,
    RUNNING,
    attempt,
    indexed_by,
    job,
    quota,
    utcnow,
    worker,
)

MAX_PREEMPTED_WAIT_S = 600.0
"""A preempted job that has waited longer is claimed before all others."""
MAX_STAY_S = 3600.0
"""A job that was preempted before is protected for as long as it then waited, at most for this time."""
IDLE_S = 3.0
RECENTLY_SEEN_S = 30.0
DUE_BATCH = 100
WAIT_BATCH = 500
ABOVE_ANY_PRIORITY = 2**31
EVERYONE = "*"

# Specs of a newer version are left to newer workers.
_MATCH = "kind IN :kinds AND spec_version <= :newest_spec"


def _sql(statement: str) -> TextClause:
    lists = [name for name in ("kinds", "queues") if f":{name}" in statement]
    return text(statement).bindparams(*(bindparam(name, expanding=True) for name in lists))


def _best(statement: str) -> ScalarSelect[int]:
    return _sql(statement).columns(column("id", Integer)).scalar_subquery()


_OLDEST = {
    dialect: f"SELECT id FROM job {indexed_by(dialect, 'ix_job_claimable')} WHERE {CLAIMABLE}"
    f' AND queue = :in_queue AND priority = :level AND "user" = :whose AND {_MATCH}'
    " ORDER BY position, id LIMIT 1"
    for dialect in CLOCKS
}
_STARVED = {
    dialect: _sql(
        f'SELECT id, queue, "user" AS name FROM job {indexed_by(dialect, "ix_job_yielded")} WHERE {PREEMPTED}'
        # A time in the future was written before the clock was set back.
        f" AND {CLAIMABLE} AND queue IN :queues AND {_MATCH} AND (yielded_at < :before OR yielded_at > :now)"
        " ORDER BY yielded_at LIMIT 1"
    )
    for dialect in CLOCKS
}
_OLDEST_UNLOCKED = {dialect: _sql(statement) for dialect, statement in _OLDEST.items()}
# SQLite has no row locks; it runs one write transaction at a time.
BEST = {
    ("sqlite", "oldest"): _best(_OLDEST["sqlite"]),
    ("postgresql", "oldest"): _best(_OLDEST["postgresql"] + " FOR UPDATE SKIP LOCKED"),
    ("sqlite", "this"): _best(f"SELECT id FROM job WHERE {CLAIMABLE} AND id = :this"),
    ("postgresql", "this"): _best(
        f"SELECT id FROM job WHERE {CLAIMABLE} AND id = :this FOR UPDATE SKIP LOCKED"
    ),
}
"""Subqueries that find and lock the job to claim, by dialect and Candidate.how."""

# The users who wait at the highest priority of a queue. Each step of the recursion is one step in the
# index, over all jobs of a user. Beside them, whether there are quotas, delayed jobs or preempted jobs.
_PEEK = {
    dialect: _sql(
        f"""
    WITH RECURSIVE top(level) AS (
        SELECT priority FROM job {claimable} WHERE {CLAIMABLE} AND queue = :in_queue AND {_MATCH}
        AND priority < :below ORDER BY priority DESC LIMIT 1
    ),
    waiting(name) AS (
        SELECT (SELECT "user" FROM job {claimable} WHERE {CLAIMABLE} AND queue = :in_queue
                AND priority = (SELECT level FROM top) ORDER BY "user" LIMIT 1)
        UNION ALL
        SELECT (SELECT "user" FROM job {claimable} WHERE {CLAIMABLE} AND queue = :in_queue
                AND priority = (SELECT level FROM top) AND "user" > waiting.name ORDER BY "user" LIMIT 1)
        FROM waiting WHERE waiting.name IS NOT NULL
    )
    SELECT (SELECT level FROM top) AS level, name,
           (SELECT id FROM job {claimable} WHERE {CLAIMABLE} AND queue = :in_queue
            AND priority = (SELECT level FROM top) AND "user" = waiting.name
            ORDER BY position, id LIMIT 1) AS oldest,
           coalesce((SELECT served_at FROM share WHERE "user" = waiting.name), 0) AS served_at,
           (SELECT version_num FROM alembic_version) AS revision,
           EXISTS (SELECT 1 FROM job {indexed_by(dialect, "ix_job_ripening")} WHERE {DELAYED}) AS delayed,
           EXISTS (SELECT 1 FROM quota) AS quotas,
           EXISTS (SELECT 1 FROM job {indexed_by(dialect, "ix_job_yielded")} WHERE {PREEMPTED}) AS yielded,
           {clock} AS now
    FROM (SELECT 1 AS one) AS always LEFT JOIN waiting ON waiting.name IS NOT NULL
    """
    )
    for dialect, clock in CLOCKS.items()
    for claimable in (indexed_by(dialect, "ix_job_claimable"),)
}
_RUNNING = select(job.c.user, func.count().label("number")).where(text(RUNNING)).group_by(job.c.user)
# Of all delayed jobs only the columns of the index; more only of those that are new.
_DELAYED = {
    dialect: _sql(f"SELECT id, not_before FROM job {indexed_by(dialect, 'ix_job_ripening')} WHERE {DELAYED}")
    for dialect in CLOCKS
}
_WAITS = select(
    job.c.id,
    job.c.not_before,
    (job.c.not_before - utcnow()).label("remaining_s"),
    job.c.waits,
    job.c.crash_count,
    job.c.error_code,
)
# Later than any other, even if the workers' clocks differ.
_SERVED_AT = {
    dialect: "SELECT CASE WHEN last >= now THEN last + 0.001 ELSE now END AS served_at"
    f" FROM (SELECT (SELECT max(served_at) FROM share) AS last, {clock} AS now) AS times WHERE true"
    for dialect, clock in CLOCKS.items()
}
_MARK_SERVED = {
    "sqlite": _sql(
        f'INSERT INTO share ("user", served_at) SELECT :name, served_at FROM ({_SERVED_AT["sqlite"]})'
        ' WHERE true ON CONFLICT ("user") DO UPDATE SET served_at = excluded.served_at'
    ),
    # A row that is locked is just being marked by another claim. To wait for its commit would have all claims
    # for this user run one after the other.
    "postgresql": _sql(
        f"""
    WITH next AS ({_SERVED_AT["postgresql"]}),
    marked AS (
        UPDATE share SET served_at = next.served_at FROM next WHERE share."user" =
        (SELECT "user" FROM share WHERE "user" = :name FOR UPDATE SKIP LOCKED)
    )
    INSERT INTO share ("user", served_at) SELECT :name, served_at FROM next
    WHERE NOT EXISTS (SELECT 1 FROM share WHERE "user" = :name) ON CONFLICT ("user") DO NOTHING
    """
    ),
}


@dataclass(frozen=True)
class Capabilities:
    """The jobs that a worker can run."""

    queues: Sequence[str]
    kinds: Sequence[str]
    spec_version: int

    def parameters(self, **more: Any) -> dict[str, Any]:
        return {"kinds": list(self.kinds), "newest_spec": self.spec_version, **more}


def observe_waits(conn: Connection, backoffs: Backoffs) -> bool:
    """Record which jobs wait for their retry; return False if that was done a moment ago."""

    def keys() -> Iterator[Key]:
        for row in conn.execute(_DELAYED[conn.dialect.name]):
            yield row.id, row.not_before

    def facts(new: list[Key]) -> Iterator[Wait]:
        for start in range(0, len(new), WAIT_BATCH):
            ids = [id for id, _ in new[start : start + WAIT_BATCH]]
            for row in conn.execute(_WAITS.where(job.c.id.in_(ids), job.c.not_before.is_not(None))):
                key = (row.id, row.not_before)
                yield Wait(key, row.remaining_s, row.waits, row.crash_count, row.error_code)

    return backoffs.observe(keys, facts)


def due_jobs(conn: Connection, backoffs: Backoffs, most: int = DUE_BATCH) -> list[Key]:
    """Return delayed jobs whose backoff is over: see storage/db/backoff.py."""
    observe_waits(conn, backoffs)
    return backoffs.due(most)


def release_due_jobs(conn: Connection, backoffs: Backoffs) -> bool:
    """
    Make delayed jobs whose backoff is over claimable, by setting `not_before` to NULL.

    Returns:
        Whether there were any.
    """
    if over := due_jobs(conn, backoffs):
        # Not one that another worker has released, and that is delayed again.
        same = tuple_(job.c.id, job.c.not_before).in_(over)
        locked = select(job.c.id).where(same, text(DELAYED)).with_for_update(skip_locked=True)
        conn.execute(update(job).where(job.c.id.in_(locked)).values(not_before=None))
    return bool(over)


def due_in(conn: Connection, backoffs: Backoffs) -> float | None:
    """Return the seconds until the next delayed job may be claimed; None if there is none."""
    return backoffs.next_s(complete=observe_waits(conn, backoffs))


@dataclass(frozen=True)
class Candidate:
    """A job that a claim may take if no other worker is claiming it."""

    how: str
    """'oldest': the oldest job of a user, queue and priority; 'this': a job by its id. A key of BEST."""
    parameters: dict[str, Any]
    """Parameters of that statement."""
    user: str
    rotates: bool
    """Whether other users wait too, so that this one is marked as served."""


@dataclass(frozen=True)
class QueuePeek:
    """The first read of a claim: one statement for each queue."""

    revision: str | None
    delayed: bool
    quotas: bool
    yielded: bool
    now: float
    turn: "list[_WaitingUser]"


def peek(conn: Connection, capabilities: Capabilities, below: int = ABOVE_ANY_PRIORITY) -> QueuePeek:
    """Return the users who wait at the highest priority below `below`, and whether special cases exist."""
    rows = [
        (queue, row)
        for queue in capabilities.queues
        for row in conn.execute(
            _PEEK[conn.dialect.name], capabilities.parameters(in_queue=queue, below=below)
        )
    ]
    _, any_row = rows[0]
    rare = bool(any_row.delayed), bool(any_row.quotas), bool(any_row.yielded)
    return QueuePeek(any_row.revision, *rare, float(any_row.now), _by_turn(conn, rows))


def candidates(conn: Connection, capabilities: Capabilities, seen: QueuePeek) -> Iterator[Candidate]:
    """Yield the jobs that a worker may claim, the best first."""
    usage = QuotaUsage(conn, seen.quotas)
    if seen.yielded:
        parameters = capabilities.parameters(
            queues=list(capabilities.queues), before=seen.now - MAX_PREEMPTED_WAIT_S, now=seen.now + IDLE_S
        )
        starved = conn.execute(_STARVED[conn.dialect.name], parameters).first()
        if starved is not None and not usage.exceeded(starved.name, starved.queue):
            yield Candidate("this", {"this": starved.id}, starved.name, False)
    turn = seen.turn
    while turn:
        several = len({one.name for one in turn}) > 1
        for one in turn:
            if not usage.exceeded(one.name, one.queue):
                yield Candidate("oldest", one.parameters(capabilities), one.name, several)
        turn = peek(conn, capabilities, turn[0].level).turn


def oldest(conn: Connection, one: Candidate) -> int | None:
    """Return the id of an 'oldest' candidate without locking it; None if this worker can run none."""
    found: int | None = conn.execute(_OLDEST_UNLOCKED[conn.dialect.name], one.parameters).scalar_one_or_none()
    return found


def mark_served(conn: Connection, user: str) -> None:
    """Record that a user was served now, so that the others come first."""
    conn.execute(_MARK_SERVED[conn.dialect.name], {"name": user})


def higher_priority_waiting(conn: Connection, capabilities: Capabilities, priority: int) -> int | None:
    """Return the id of a waiting job of higher priority that this worker can run, if there is one."""
    seen = peek(conn, capabilities)
    if not seen.turn or seen.turn[0].level <= priority:
        return None
    usage = QuotaUsage(conn, seen.quotas)
    for one in seen.turn:
        if not usage.exceeded(one.name, one.queue):
            found = oldest(conn, Candidate("oldest", one.parameters(capabilities), one.name, False))
            if found is not None:
                return found
    return None


def protected_from_preemption(conn: Connection, lease: Lease) -> bool:
    """Return whether a job that was preempted before has run for less time than it then waited."""
    if lease.job.yielded_at is None:
        return False
    began = select(attempt.c.started_at).where(
        attempt.c.job_id == lease.job_id, attempt.c.number == lease.attempt
    )
    started = conn.execute(began).scalar_one()
    # The first by the monotonic clock; the second by wall clocks, which may differ or jump.
    return bool(lease.ran_s < min(started - lease.job.yielded_at, MAX_STAY_S))


def idle_worker(conn: Connection, waiting: int) -> bool:
    """
    Return whether an idle worker serves the queue of this waiting job.

    Workers that have not claimed it within IDLE_S are not counted: they have stopped, or cannot run it.
    """
    row = conn.execute(select(job.c.queue, job.c.created_at, utcnow()).where(job.c.id == waiting)).one()
    queue, created_at, now = row
    if abs(now - created_at) > IDLE_S:  # in the future: a clock is wrong
        return False
    lately = worker.c.seen_at.between(utcnow() - RECENTLY_SEEN_S, utcnow() + RECENTLY_SEEN_S)
    idle = select(worker.c.queues).where(worker.c.state == "idle", lately)
    return any(queue in queues.split(",") for queues in conn.execute(idle).scalars())


class _WaitingUser(NamedTuple):
    """A user with jobs at the highest priority of a queue; sorts in the order in which users are served."""

    running: int
    served_at: float
    name: str
    oldest: int
    queue: str
    level: int

    def parameters(self, capabilities: Capabilities) -> dict[str, Any]:
        return capabilities.parameters(in_queue=self.queue, level=self.level, whose=self.name)


def _by_turn(conn: Connection, rows: Sequence[tuple[str, Any]]) -> list[_WaitingUser]:
    """Return the users who wait at the highest priority, in the order in which they are served."""
    there = [(queue, row) for queue, row in rows if row.name is not None]
    highest = max((row.level for _, row in there), default=0)
    there = [(queue, row) for queue, row in there if row.level == highest]
    several = len({row.name for _, row in there}) > 1
    running = Counter({row.user: row.number for row in conn.execute(_RUNNING)} if several else {})
    return sorted(
        _WaitingUser(running[row.name], row.served_at, row.name, row.oldest, queue, row.level)
        for queue, row in there
    )


class QuotaUsage:
    """
    Running jobs of users and queues, compared with their quotas.

    Args:
        quotas: whether there are any; without, nothing is read.
        claiming: lock the quotas, so that two claims cannot both take the last place.
    """

    def __init__(self, conn: Connection, quotas: bool, *, claiming: bool = True) -> None:
        asked = select(quota).with_for_update() if claiming else select(quota)
        rows = conn.execute(asked).all() if quotas else ()
        self.limits = {(row.scope, row.name): row.max_running for row in rows}
        self.running: Counter[tuple[str, str]] = Counter()
        if self.limits:
            counted = select(job.c.user, job.c.queue, func.count()).where(text(RUNNING))
            for user, queue, number in conn.execute(counted.group_by(job.c.user, job.c.queue)):
                self.running["user", user] += number
                self.running["queue", queue] += number

    def exceeded(self, user: str, queue: str) -> tuple[str, str, int, int] | None:
        """Return the quota that is used up: scope, name, limit, running jobs; None if there is none."""
        for scope, name in (("user", user), ("queue", queue)) if self.limits else ():
            most = self.limits.get((scope, name), self.limits.get((scope, EVERYONE)))
            if most is not None and self.running[scope, name] >= most:
                return scope, name, most, self.running[scope, name]
        return None
