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
    RIPENING,
    RUNNING,
    YIELDED,
    attempt,
    indexed_by,
    job,
    quota,
    utcnow,
    worker,
)

PATIENCE_S = 600.0
"""A job that yielded goes before all others when it has waited so many seconds."""
STAY_AT_MOST_S = 3600.0
"""A job that has yielded stays for as long as it was kept waiting, but no longer than this."""
IDLE_S = 3.0
SEEN_S = 30.0
RIPE_AT_ONCE = 100
WAITS_AT_ONCE = 500
ABOVE_ALL = 2**31  # one more than any priority
ANYBODY = "*"

# Older workers leave newer specs to newer workers.
_MINE = "kind IN :kinds AND spec_version <= :newest_spec"


def _sql(statement: str) -> TextClause:
    lists = [name for name in ("kinds", "queues") if f":{name}" in statement]
    return text(statement).bindparams(*(bindparam(name, expanding=True) for name in lists))


def _best(statement: str) -> ScalarSelect[int]:
    return _sql(statement).columns(column("id", Integer)).scalar_subquery()


_OLDEST = {
    dialect: f"SELECT id FROM job {indexed_by(dialect, 'ix_job_claimable')} WHERE {CLAIMABLE}"
    f' AND queue = :in_queue AND priority = :level AND "user" = :whose AND {_MINE} ORDER BY id LIMIT 1'
    for dialect in CLOCKS
}
_PATIENT = {
    dialect: _sql(
        f'SELECT id, queue, "user" AS name FROM job {indexed_by(dialect, "ix_job_yielded")} WHERE {YIELDED}'
        # One of the future was noted before somebody set the clock back.
        f" AND {CLAIMABLE} AND queue IN :queues AND {_MINE} AND (yielded_at < :before OR yielded_at > :now)"
        " ORDER BY yielded_at LIMIT 1"
    )
    for dialect in CLOCKS
}
_LOOK_AT_OLDEST = {dialect: _sql(statement) for dialect, statement in _OLDEST.items()}
# SQLite writes in one transaction at a time, and knows no row locks.
BEST = {
    ("sqlite", "oldest"): _best(_OLDEST["sqlite"]),
    ("postgresql", "oldest"): _best(_OLDEST["postgresql"] + " FOR UPDATE SKIP LOCKED"),
    ("sqlite", "this"): _best(f"SELECT id FROM job WHERE {CLAIMABLE} AND id = :this"),
    ("postgresql", "this"): _best(
        f"SELECT id FROM job WHERE {CLAIMABLE} AND id = :this FOR UPDATE SKIP LOCKED"
    ),
}
"""What a claim takes, as the part of its statement that finds and locks it: see Candidate."""

# Who waits at the highest priority of a queue. Each turn of the recursion is one step in the
# index, over all jobs of a user at once. Beside it, whether anything of what is rare is there at all.
_LOOK = {
    dialect: _sql(
        f"""
    WITH RECURSIVE top(level) AS (
        SELECT priority FROM job {claimable} WHERE {CLAIMABLE} AND queue = :in_queue AND {_MINE}
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
            AND priority = (SELECT level FROM top) AND "user" = waiting.name ORDER BY id LIMIT 1) AS oldest,
           coalesce((SELECT served_at FROM share WHERE "user" = waiting.name), 0) AS served_at,
           (SELECT version_num FROM alembic_version) AS revision,
           EXISTS (SELECT 1 FROM job {indexed_by(dialect, "ix_job_ripening")} WHERE {RIPENING}) AS ripening,
           EXISTS (SELECT 1 FROM quota) AS quotas,
           EXISTS (SELECT 1 FROM job {indexed_by(dialect, "ix_job_yielded")} WHERE {YIELDED}) AS yielded,
           {clock} AS now
    FROM (SELECT 1 AS one) AS always LEFT JOIN waiting ON waiting.name IS NOT NULL
    """
    )
    for dialect, clock in CLOCKS.items()
    for claimable in (indexed_by(dialect, "ix_job_claimable"),)
}
_RUNNING = select(job.c.user).where(text(RUNNING))
# Of all that wait only what stands in the index; more only of those that are new.
_RIPENING = {
    dialect: _sql(f"SELECT id, not_before FROM job {indexed_by(dialect, 'ix_job_ripening')} WHERE {RIPENING}")
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
_SERVE = {
    dialect: _sql(
        # Later than any other, whatever the clocks of the workers that served them say.
        'INSERT INTO share ("user", served_at)'
        " SELECT :name, CASE WHEN last >= now THEN last + 0.001 ELSE now END"
        f" FROM (SELECT (SELECT max(served_at) FROM share) AS last, {clock} AS now) AS times WHERE true"
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
        return {"kinds": list(self.kinds), "newest_spec": self.spec_version, **more}


def look_at_waits(conn: Connection, backoffs: Backoffs) -> bool:
    """Note which jobs wait for their retry; False: that was done a moment ago."""

    def keys() -> Iterator[Key]:
        for row in conn.execute(_RIPENING[conn.dialect.name]):
            yield row.id, row.not_before

    def facts(new: list[Key]) -> Iterator[Wait]:
        for start in range(0, len(new), WAITS_AT_ONCE):
            ids = [id for id, _ in new[start : start + WAITS_AT_ONCE]]
            for row in conn.execute(_WAITS.where(job.c.id.in_(ids), job.c.not_before.is_not(None))):
                key = (row.id, row.not_before)
                yield Wait(key, row.remaining_s, row.waits, row.crash_count, row.error_code)

    return backoffs.look(keys, facts)


def due_jobs(conn: Connection, backoffs: Backoffs, most: int = RIPE_AT_ONCE) -> list[Key]:
    """Return jobs that waited for their time, which has come: see storage/db/backoff.py."""
    look_at_waits(conn, backoffs)
    return backoffs.due(most)


def release_due_jobs(conn: Connection, backoffs: Backoffs) -> bool:
    """
    Let jobs whose time has come be claimed: `not_before` passes into NULL.

    Returns:
        Whether there were any.
    """
    if over := due_jobs(conn, backoffs):
        # Not one that another has let go, and that waits again since.
        same = tuple_(job.c.id, job.c.not_before).in_(over)
        locked = select(job.c.id).where(same, text(RIPENING)).with_for_update(skip_locked=True)
        conn.execute(update(job).where(job.c.id.in_(locked)).values(not_before=None))
    return bool(over)


def due_in(conn: Connection, backoffs: Backoffs) -> float | None:
    """Seconds until the next job that waits for its time may be claimed; None if none waits."""
    return backoffs.next_s(complete=look_at_waits(conn, backoffs))


@dataclass(frozen=True)
class Candidate:
    """A job that a claim may take, if nobody else is about to."""

    how: str
    """'oldest': of a user, in a queue, of a priority; 'this': by its id. A key of BEST."""
    bound: dict[str, Any]
    """The values of that statement."""
    user: str
    in_turn: bool
    """Whether other users wait as well, so that this one goes to the end of the round."""


@dataclass(frozen=True)
class Look:
    """What a claim sees first, by one statement for each queue."""

    revision: str | None
    ripening: bool
    quotas: bool
    yielded: bool
    now: float
    turn: "list[_Waiting]"


def look(conn: Connection, wanted: Wanted, below: int = ABOVE_ALL) -> Look:
    """Who waits at the highest priority under `below`, and whether there is anything of what is rare."""
    rows = [
        (queue, row)
        for queue in wanted.queues
        for row in conn.execute(_LOOK[conn.dialect.name], wanted.bound(in_queue=queue, below=below))
    ]
    _, any_row = rows[0]
    rare = bool(any_row.ripening), bool(any_row.quotas), bool(any_row.yielded)
    return Look(any_row.revision, *rare, float(any_row.now), _in_order(conn, rows))


def candidates(conn: Connection, wanted: Wanted, seen: Look) -> Iterator[Candidate]:
    """The jobs that a worker may get, the best first."""
    full = QuotaUsage(conn, seen.quotas)
    if seen.yielded:
        bound = wanted.bound(queues=list(wanted.queues), before=seen.now - PATIENCE_S, now=seen.now + IDLE_S)
        patient = conn.execute(_PATIENT[conn.dialect.name], bound).first()
        if patient is not None and not full.for_(patient.name, patient.queue):
            yield Candidate("this", {"this": patient.id}, patient.name, False)
    turn = seen.turn
    while turn:
        several = len({one.name for one in turn}) > 1
        for one in turn:
            if not full.for_(one.name, one.queue):
                yield Candidate("oldest", one.bound(wanted), one.name, several)
        turn = look(conn, wanted, turn[0].level).turn


def oldest(conn: Connection, one: Candidate) -> int | None:
    """The id of a candidate by 'oldest', without a lock; None: nothing that this worker can run is there."""
    found: int | None = conn.execute(_LOOK_AT_OLDEST[conn.dialect.name], one.bound).scalar_one_or_none()
    return found


def serve(conn: Connection, user: str) -> None:
    """Put a user at the end of the round."""
    conn.execute(_SERVE[conn.dialect.name], {"name": user})


def higher_priority_waiting(conn: Connection, wanted: Wanted, priority: int) -> int | None:
    """The id of a job that could run on this worker and has a higher priority, if one waits."""
    seen = look(conn, wanted)
    if not seen.turn or seen.turn[0].level <= priority:
        return None
    full = QuotaUsage(conn, seen.quotas)
    for one in seen.turn:
        if not full.for_(one.name, one.queue):
            found = oldest(conn, Candidate("oldest", one.bound(wanted), one.name, False))
            if found is not None:
                return found
    return None


def may_stay(conn: Connection, lease: Lease) -> bool:
    """Whether a job that has yielded before has not yet run for as long as it was kept waiting."""
    if lease.job.yielded_at is None:
        return False
    began = select(attempt.c.started_at).where(
        attempt.c.job_id == lease.job_id, attempt.c.number == lease.attempt
    )
    started = conn.execute(began).scalar_one()
    # The one by the monotonic clock; the other by wall clocks, which may differ or jump.
    return bool(lease.ran_s < min(started - lease.job.yielded_at, STAY_AT_MOST_S))


def idle_worker(conn: Connection, waiting: int) -> bool:
    """
    Whether a worker without work serves the queue of this waiting job.

    One that has not taken it IDLE_S after it could have is not counted: it is gone, or cannot.
    """
    row = conn.execute(select(job.c.queue, job.c.created_at, utcnow()).where(job.c.id == waiting)).one()
    queue, created_at, now = row
    if abs(now - created_at) > IDLE_S:  # in the future: somebody's clock is wrong
        return False
    lately = worker.c.seen_at.between(utcnow() - SEEN_S, utcnow() + SEEN_S)
    idle = select(worker.c.queues).where(worker.c.state == "idle", lately)
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
        return wanted.bound(in_queue=self.queue, level=self.level, whose=self.name)


def _in_order(conn: Connection, rows: Sequence[tuple[str, Any]]) -> list[_Waiting]:
    """Of the users who wait, those at the highest priority, in the order in which they should be served."""
    there = [(queue, row) for queue, row in rows if row.name is not None]
    highest = max((row.level for _, row in there), default=0)
    there = [(queue, row) for queue, row in there if row.level == highest]
    several = len({row.name for _, row in there}) > 1
    running = Counter(conn.execute(_RUNNING).scalars()) if several else Counter[str]()
    return sorted(
        _Waiting(running[row.name], row.served_at, row.name, row.oldest, queue, row.level)
        for queue, row in there
    )


class QuotaUsage:
    """
    Which users and queues have as many running jobs as they may.

    Args:
        quotas: whether there are any; nothing is asked without.
        claiming: claims pass one at a time then: two must not both take the last place.
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

    def for_(self, user: str, queue: str) -> tuple[str, str, int, int] | None:
        """The limit that keeps a job of theirs from starting: scope, name, how many may run, how many do."""
        for scope, name in (("user", user), ("queue", queue)) if self.limits else ():
            most = self.limits.get((scope, name), self.limits.get((scope, ANYBODY)))
            if most is not None and self.running[scope, name] >= most:
                return scope, name, most, self.running[scope, name]
        return None
