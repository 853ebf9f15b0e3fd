"""Checks of `ganq doctor`: workers and jobs in the job table, and jobs that cannot start."""

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
from storage.db.rows import CANNOT_CLAIM, Job, WorkerRow
from storage.db.tables import CLAIMABLE, RUNNING, attempt, checkpoint, job, utcnow
from storage.settings import Settings, redact
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.facts import Facts

MAX_LISTED = 5
MAX_RUNNING = 1000
NEWEST = 20


def check_jobs_and_workers(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check workers and jobs; fill the facts for the checks of this machine and of the volume."""
    assert facts.database is not None
    queries = Queries(facts.database)
    facts.workers = queries.workers()
    facts.running = queries.page(Filter(states=(JobState.RUNNING,)), limit=MAX_RUNNING)
    facts.attempt_started = facts.database.read(_attempt_ages)
    facts.checkpoint_bytes = facts.database.read(_checkpoint_bytes)
    yield from check_workers(facts.workers, settings)
    yield from check_running(facts.running, facts.workers, settings)
    yield from check_queued(waiting(facts.database), facts.workers, settings)
    yield from check_malformed(queries)
    yield from check_limits(Quotas(facts.database))


def _attempt_ages(conn: Connection) -> dict[int, float]:
    """Return the seconds since the start of each open attempt, by job."""
    query = select(attempt.c.job_id, utcnow() - attempt.c.started_at).where(attempt.c.ended_at.is_(None))
    return {int(one): float(age) for one, age in conn.execute(query.limit(MAX_RUNNING))}


def _checkpoint_bytes(conn: Connection) -> list[int]:
    """Return the size of the last checkpoint of each running job; of the largest recent one if none runs."""
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
    """Return whether a worker sends heartbeats and has not stopped."""
    return worker.state != "stopped" and worker.silent_s <= settings.lease_seconds


def check_workers(workers: Sequence[WorkerRow], settings: Settings) -> Iterator[Finding]:
    """Report workers: alive, unresponsive, unable to take jobs, of another version."""
    from storage.version import version

    responsive = [one for one in workers if alive(one, settings)]
    unresponsive = [one for one in workers if one.state != "stopped" and not alive(one, settings)]
    if responsive:
        hosts = len({one.host for one in responsive})
        busy = sum(one.state == "busy" for one in responsive)
        yield ok("workers", f"{len(responsive)} alive on {hosts} host{'s' * (hosts > 1)}, {busy} busy")
    else:
        yield warn("workers", "none is running", "ganq up, or ganq worker on each machine with a GPU")
    for state, reason in CANNOT_CLAIM.items():
        unable = [f"{one.name} on {one.host}" for one in responsive if one.state == state]
        if unable:
            yield error("workers", f"take no job: {listed(unable)}, {reason}", "run ganq health there")
    if unresponsive:
        longest_s = max(one.silent_s for one in unresponsive)
        yield warn(
            "workers",
            f"unresponsive: {listed([f'{one.name} on {one.host}' for one in unresponsive])};"
            f" no heartbeat for up to {longest_s:,.0f} s",
            "run ganq health there; a stopped worker is removed from the table after a week",
        )
    others = [f"{one.name} ({one.version})" for one in responsive if one.version != version()]
    if others:
        yield warn(
            "workers",
            f"of another version than this ganq {version()}: {listed(others)}",
            "install one version everywhere; a worker drains on SIGTERM and loses nothing",
        )


# --- jobs ---------------------------------------------------------------------------------


def check_running(
    running: Sequence[Job], workers: Sequence[WorkerRow], settings: Settings
) -> Iterator[Finding]:
    """Report running jobs whose worker is unresponsive."""
    responsive = {one.name for one in workers if alive(one, settings)}
    stale = [str(one.id) for one in running if one.worker not in responsive]
    if stale and responsive:
        yield warn(
            "jobs",
            f"running on an unresponsive worker: {listed(stale)}",
            f"nothing to do: another worker requeues them after {settings.lease_seconds:.0f} s",
        )
    elif stale:
        yield error(
            "jobs",
            f"running on an unresponsive worker, and no other worker can requeue them: {listed(stale)}",
            "start ganq up or ganq worker: they continue from their last checkpoints",
        )
    elif running:
        yield ok("jobs", f"{len(running)} running, each on a responsive worker")


@dataclass(frozen=True)
class Waiting:
    """Number of claimable jobs of one queue, kind and spec version."""

    queue: str
    kind: str
    spec_version: int
    number: int


def waiting(database: Database) -> list[Waiting]:
    """Count the claimable jobs by queue, kind and spec version."""
    columns = (job.c.queue, job.c.kind, job.c.spec_version)
    query = select(*columns, func.count()).where(text(CLAIMABLE)).group_by(*columns).order_by(*columns)
    return database.read(lambda conn: [Waiting(*row) for row in conn.execute(query)])


def check_queued(
    queued: Sequence[Waiting], workers: Sequence[WorkerRow], settings: Settings
) -> Iterator[Finding]:
    """Report queued jobs that no worker will claim: wrong queue, unknown kind, newer spec."""
    from storage.version import version

    claiming = [one for one in workers if alive(one, settings) and one.state != "draining"]
    served = {queue for one in claiming for queue in one.queues.split(",")}
    # Which jobs workers of another version can run is not known here.
    other_versions = sorted({one.version for one in claiming if one.version != version()})
    numbers: dict[str, int] = {}
    for one in queued:
        numbers[one.queue] = numbers.get(one.queue, 0) + one.number
        message = _unsupported(one)
        if message is None:
            continue
        if other_versions:
            message += f"; a worker of ganq {listed(other_versions)} may"
            yield warn("jobs", message, "ganq workers shows versions")
        else:
            hint = "install the ganq that submitted them on the workers, or ganq cancel"
            yield error("jobs", message, hint)
    for queue, number in numbers.items():
        jobs = f"{number:,} queued job{'s' * (number != 1)}"
        if queue in served:
            yield ok("jobs", f"{jobs} in the queue {queue}")
        elif claiming:
            yield error(
                "jobs",
                f"{jobs} in the queue {queue}, which no running worker serves",
                f"start ganq worker --queues {queue}",
            )
        else:
            yield warn(
                "jobs", f"{jobs} in the queue {queue}, and no worker is running", "ganq up, or ganq worker"
            )


def check_malformed(queries: Queries) -> Iterator[Finding]:
    """Report open jobs whose rows ganq did not write."""
    ids = queries.database.read(lambda conn: open_malformed_ids(conn, MAX_RUNNING))
    for one in queries.get_many(ids[:MAX_LISTED]):
        more = f", and {len(ids) - MAX_LISTED} more" if len(ids) > MAX_LISTED else ""
        yield error(
            "jobs",
            redact(f"ganq did not write the row of job {one.id}: {one.malformed}{more}"),
            "a running worker fails it with BAD_SPEC; submit it again with ganq submit",
        )


def check_limits(quotas: Quotas) -> Iterator[Finding]:
    """Report queued jobs that a limit of 0 prevents from starting."""
    for one, number in quotas.blocking_all():
        name, jobs = redact(one.name), f"{number:,} queued job{'s' * (number != 1)}"
        yield warn(
            "jobs",
            f"{jobs} of the {one.scope} {name}, whose limit is 0",
            f"ganq limit --{one.scope} {quote(name)} none removes the limit",
        )


def _unsupported(one: Waiting) -> str | None:
    """Return why no worker of this version claims such a job; None: it does."""
    jobs = f"{one.number:,} queued job{'s' * (one.number != 1)}"
    kind = KINDS.get(one.kind)
    if kind is None or kind.runner is None:
        return f"{jobs} of the kind {redact(one.kind)!r}, which this ganq does not run"
    if one.spec_version > SPEC_VERSION:
        return f"{jobs} of a newer ganq (spec {one.spec_version}; this one reads up to {SPEC_VERSION})"
    return None


def listed(names: Sequence[str]) -> str:
    """Return the first names as text, and the number of the others."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return redact(", ".join(names[:MAX_LISTED]) + more)
