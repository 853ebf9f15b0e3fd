"""What `ganq doctor` finds in the rows: who works, who is dead, what cannot move, what nobody needs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from shlex import quote

from sqlalchemy import Connection, func, select, text

from jobs.kinds import KINDS, SPEC_VERSION
from jobs.states import JobState
from storage.db.engine import Database
from storage.db.malformed import open_malformed_ids
from storage.db.queries import Filter, Queries
from storage.db.quotas import Quotas
from storage.db.rows import UNABLE, Job, WorkerRow
from storage.db.tables import CLAIMABLE, RUNNING, attempt, checkpoint, job, utcnow
from storage.settings import Settings, redact
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.facts import Facts

LISTED = 5
MOST_RUNNING = 1000
NEWEST = 20


def check_jobs_and_workers(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """All that the rows say; fills the facts for the checks of this machine and of the volume."""
    assert facts.database is not None
    queries = Queries(facts.database)
    facts.workers = queries.workers()
    facts.running = queries.page(Filter(states=(JobState.RUNNING,)), limit=MOST_RUNNING)
    facts.attempt_started = facts.database.read(_attempt_ages)
    facts.checkpoint_bytes = facts.database.read(_checkpoint_bytes)
    yield from check_workers(facts.workers, settings)
    yield from check_running(facts.running, facts.workers, settings)
    yield from check_queued(waiting(facts.database), facts.workers, settings)
    yield from check_malformed(queries)
    yield from check_limits(Quotas(facts.database))


def _attempt_ages(conn: Connection) -> dict[int, float]:
    """Seconds since the start of each open attempt, by job."""
    query = select(attempt.c.job_id, utcnow() - attempt.c.started_at).where(attempt.c.ended_at.is_(None))
    return {int(one): float(age) for one, age in conn.execute(query.limit(MOST_RUNNING))}


def _checkpoint_bytes(conn: Connection) -> list[int]:
    """The last checkpoint of each running job; the newest ones of all if none runs."""
    last = (
        select(func.max(checkpoint.c.id))
        .join(job, job.c.id == checkpoint.c.job_id)
        .where(text(f"job.{RUNNING}"))
        .group_by(checkpoint.c.job_id)
    )
    ids = list(conn.execute(last).scalars())
    query = select(checkpoint.c.bytes).order_by(checkpoint.c.id.desc())
    query = query.where(checkpoint.c.id.in_(ids)) if ids else query.limit(NEWEST)
    sizes = [int(one) for one in conn.execute(query).scalars()]
    return sizes if ids else sizes and [max(sizes)]


# --- workers ------------------------------------------------------------------------------


def alive(worker: WorkerRow, settings: Settings) -> bool:
    """Whether a worker has spoken lately and has not said goodbye."""
    return worker.state != "stopped" and worker.silent_s <= settings.lease_seconds


def check_workers(workers: Sequence[WorkerRow], settings: Settings) -> Iterator[Finding]:
    """Who is there, who has fallen silent, who runs another version."""
    from storage.version import version

    living = [one for one in workers if alive(one, settings)]
    silent = [one for one in workers if one.state != "stopped" and not alive(one, settings)]
    if living:
        hosts = len({one.host for one in living})
        busy = sum(one.state == "busy" for one in living)
        yield ok("workers", f"{len(living)} alive on {hosts} host{'s' * (hosts > 1)}, {busy} busy")
    else:
        yield warn("workers", "none is running", "ganq up, or ganq worker on each machine with a GPU")
    for state, why in UNABLE.items():
        unable = [f"{one.name} on {one.host}" for one in living if one.state == state]
        if unable:
            yield error("workers", f"take no job: {listed(unable)}, {why}", "ganq health there says more")
    if silent:
        longest = max(one.silent_s for one in silent)
        yield warn(
            "workers",
            f"dead or cut off: {listed([f'{one.name} on {one.host}' for one in silent])};"
            f" silent for up to {longest:,.0f} s without having stopped",
            "ganq health there says more; one that is gone for good is forgotten after a week",
        )
    others = [f"{one.name} ({one.version})" for one in living if one.version != version()]
    if others:
        yield warn(
            "workers",
            f"run another version than this ganq {version()}: {listed(others)}",
            "install one version everywhere; a worker drains on SIGTERM and loses nothing",
        )


# --- jobs ---------------------------------------------------------------------------------


def check_running(
    running: Sequence[Job], workers: Sequence[WorkerRow], settings: Settings
) -> Iterator[Finding]:
    """Running jobs whose worker does not speak any more."""
    living = {one.name for one in workers if alive(one, settings)}
    stale = [str(one.id) for one in running if one.worker not in living]
    if stale and living:
        yield warn(
            "jobs",
            f"running on a worker that is silent: {listed(stale)}",
            f"nothing: a living worker takes them back after {settings.lease_seconds:.0f} s",
        )
    elif stale:
        yield error(
            "jobs",
            f"marked as running, and no worker is alive to take them back: {listed(stale)}",
            "ganq up or ganq worker: they go on from their last checkpoints",
        )
    elif running:
        yield ok("jobs", f"{len(running)} running, each on a worker that speaks")


@dataclass(frozen=True)
class Waiting:
    """Jobs that a worker could take now, alike in what a worker must be able to do for them."""

    queue: str
    kind: str
    spec_version: int
    number: int


def waiting(database: Database) -> list[Waiting]:
    """What waits in each queue."""
    alike = (job.c.queue, job.c.kind, job.c.spec_version)
    query = select(*alike, func.count()).where(text(CLAIMABLE)).group_by(*alike).order_by(*alike)
    return database.read(lambda conn: [Waiting(*row) for row in conn.execute(query)])


def check_queued(
    queued: Sequence[Waiting], workers: Sequence[WorkerRow], settings: Settings
) -> Iterator[Finding]:
    """Queued jobs that nobody will ever take: the wrong queue, an unknown kind, a newer spec."""
    from storage.version import version

    takers = [one for one in workers if alive(one, settings) and one.state != "draining"]
    served = {queue: one for one in takers for queue in one.queues.split(",")}
    # What workers of another version can do is not known here.
    strangers = sorted({one.version for one in takers if one.version != version()})
    numbers: dict[str, int] = {}
    for one in queued:
        numbers[one.queue] = numbers.get(one.queue, 0) + one.number
        said = _beyond(one)
        if said is None:
            continue
        if strangers:
            yield warn(
                "jobs", f"{said}; a worker of ganq {listed(strangers)} may", "ganq workers shows versions"
            )
        else:
            yield error("jobs", said, "install the ganq that submitted them on the workers, or ganq cancel")
    for queue, number in numbers.items():
        jobs = f"{number:,} queued job{'s' * (number != 1)}"
        if queue in served:
            yield ok("jobs", f"{jobs} in the queue {queue}")
        elif takers:
            yield error(
                "jobs",
                f"{jobs} in the queue {queue}, which no living worker serves",
                f"ganq worker --queues {queue}",
            )
        else:
            yield warn(
                "jobs", f"{jobs} in the queue {queue}, and no worker is there", "ganq up, or ganq worker"
            )


def check_malformed(queries: Queries) -> Iterator[Finding]:
    """Open jobs whose rows no ganq wrote."""
    ids = queries.database.read(lambda conn: open_malformed_ids(conn, MOST_RUNNING))
    for one in queries.get_many(ids[:LISTED]):
        more = f", and {len(ids) - LISTED} more like it" if len(ids) > LISTED else ""
        yield error(
            "jobs",
            redact(f"no ganq wrote the row of job {one.id}: {one.malformed}{more}"),
            "a running worker fails it with BAD_SPEC; submit it again with ganq submit",
        )


def check_limits(quotas: Quotas) -> Iterator[Finding]:
    """Jobs that a limit of 0 keeps from starting, for ever if nobody remembers it."""
    for one, number in quotas.shut():
        name, jobs = redact(one.name), f"{number:,} queued job{'s' * (number != 1)}"
        yield warn(
            "jobs",
            f"{jobs} of the {one.scope} {name}, whose limit is 0",
            f"ganq limit --{one.scope} {quote(name)} none lets them start",
        )


def _beyond(one: Waiting) -> str | None:
    """Why no worker of this version takes such a job."""
    jobs = f"{one.number:,} queued job{'s' * (one.number != 1)}"
    kind = KINDS.get(one.kind)
    if kind is None or kind.runner is None:
        return f"{jobs} of the kind {redact(one.kind)!r}, which this ganq does not run"
    if one.spec_version > SPEC_VERSION:
        return f"{jobs} of a newer ganq (spec {one.spec_version}; this one reads up to {SPEC_VERSION})"
    return None


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return redact(", ".join(names[:LISTED]) + more)
