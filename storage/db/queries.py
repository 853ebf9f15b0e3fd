"""Read-only queries of the job table."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, and_, case, exists, func, or_, select, text, tuple_

from jobs.errors import CheckpointNotFoundError, JobNotFoundError
from jobs.states import TERMINAL, JobState, ending_text
from storage.db.engine import Database
from storage.db.rows import Checkpoint, Event, Job, WorkerRow, attempt_from_row, state_of
from storage.db.store.shards import IS_SHARD, ShardSummary, shards_of, summaries
from storage.db.tables import (
    CLAIMABLE,
    CLOCKS,
    HELD,
    RETRIES,
    RUNNING,
    UNRESOLVED,
    attempt,
    checkpoint,
    dependency,
    end_dependency,
    event,
    indexed_by,
    job,
    label,
    utcnow,
    worker,
)

PAGE = 500
MAX_PRIORITY_SOURCES = 5
PREEMPTIONS = ("preempt_requested", "asked_to_yield")  # the second: ganq 0.2
_SHARDS_BY_STATE = {
    dialect: text(
        f"SELECT state, count(*) FROM job {indexed_by(dialect, 'ix_job_part_of')}"
        f" WHERE {IS_SHARD} GROUP BY state"
    )
    for dialect in CLOCKS
}
"""Number of shards, by state."""

_REVISION = text(
    "SELECT coalesce(max(id), 0), count(*),"
    " (SELECT coalesce(sum(hb_seq), 0) FROM job WHERE state = 'running'),"
    " (SELECT coalesce(sum(seen_at), 0) FROM worker)"
    " FROM event WHERE id > (SELECT coalesce(max(id), 0) - 512 FROM event)"
)


@dataclass(frozen=True)
class Filter:
    """Which jobs to list; None means any."""

    states: tuple[JobState, ...] | None = None
    kind: str | None = None
    user: str | None = None
    name: str | None = None
    sweep: str | None = None
    after_id: int | None = None
    before_id: int | None = None
    parts: bool = False
    """List shards, too."""
    part_of: int | None = None
    since: float | None = None
    """Submitted at this time or later."""
    labels: tuple[tuple[str, str | None], ...] = ()
    """(key, value) of labels that the job has; a value of None matches any."""
    held: bool | None = None
    """Whether the job is held or paused, or being paused."""
    to_retry: bool = False
    """Only failed jobs that were not retried yet, without those that failed because a job before them did."""

    def where(self) -> list[ColumnElement[bool]]:
        wanted: list[ColumnElement[bool]] = []
        if not self.parts:
            wanted.append(job.c.part_of.is_(None))
        if self.part_of is not None:
            wanted.append(job.c.part_of == self.part_of)
        if self.states is not None:
            wanted.append(job.c.state.in_(self.states))
            if JobState.RUNNING in self.states and JobState.QUEUED not in self.states:
                wanted[-1] = or_(wanted[-1], job.c.id.in_(_active_splits()))
            elif JobState.QUEUED in self.states and JobState.RUNNING not in self.states:
                wanted.append(job.c.id.not_in(_active_splits()))
        if self.since is not None:
            wanted.append(job.c.created_at >= self.since)
        for key, value in self.labels:
            labelled = select(label.c.job_id).where(label.c.key == key)
            wanted.append(job.c.id.in_(labelled if value is None else labelled.where(label.c.value == value)))
        if self.held is not None:
            wanted.append(job.c.id.in_(_held()) if self.held else job.c.held == 0)
        if self.to_retry:
            again = job.alias("again")
            retried = select(again.c.retry_of).where(again.c.retry_of.is_not(None))
            wanted.append(job.c.state == JobState.FAILED)
            wanted.append(job.c.error_code != "DEPENDENCY_FAILED")
            wanted.append(job.c.id.not_in(retried))
        if self.kind is not None:
            wanted.append(job.c.kind == self.kind)
        if self.user is not None:
            wanted.append(job.c.user == self.user)
        if self.name is not None:
            # The index of names holds all that this needs, and is far smaller than the table.
            like = select(job.c.id).where(job.c.name.contains(self.name, autoescape=True))
            wanted.append(job.c.id.in_(like))
        if self.sweep is not None:
            wanted += [job.c.sweep.is_not(None), job.c.sweep == self.sweep]
        if self.after_id is not None:
            wanted.append(job.c.id > self.after_id)
        if self.before_id is not None:
            wanted.append(job.c.id < self.before_id)
        return wanted


def _held() -> Select[tuple[int]]:
    """Return a query for the held jobs that have not ended."""
    # Not `state IN (queued, running)`, for which SQLite would read all jobs of those states.
    return select(job.c.id).where(text(HELD), job.c.state.not_in(TERMINAL))


def _active_splits() -> Select[tuple[int]]:
    """Select the ids of queued jobs that have shards under way: they are shown as running."""
    split, shard = job.alias("split"), job.alias("shard")
    begun = select(shard.c.part_of).where(text("shard.part_of IS NOT NULL"), shard.c.state != JobState.QUEUED)
    return select(split.c.id).where(
        split.c.state == JobState.QUEUED, split.c.blockers > 0, split.c.id.in_(begun)
    )


UsageKey = Literal["user", "queue", "kind"]


@dataclass(frozen=True)
class Usage:
    """What one user, queue or kind has used of the workers."""

    name: str
    jobs: int
    attempts: int
    worker_s: float
    gpu_s: float
    """The part of it on workers with a GPU."""


@dataclass(frozen=True)
class LiveJobs:
    """Jobs of one state, kind and queue that have not ended."""

    state: str
    kind: str
    queue: str
    held: int
    jobs: int
    claimable: int
    oldest_s: float
    """Age of the oldest that is claimable; 0 if none is."""


def _scalar(conn: Connection, query: Any) -> Any:
    return conn.execute(query).scalar_one_or_none()


class Queries:
    """Read-only queries."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def now(self) -> float:
        """Return the time of the database's clock, against which ages are measured."""
        return self.database.read(lambda conn: float(conn.execute(select(utcnow())).scalar_one()))

    def revision(self) -> tuple[float, ...]:
        """
        Return numbers that differ after every commit that a reader may show.

        On SQLite its `data_version`; on Postgres the newest events and the
        heartbeats. Ids of events are given out before they are committed, so those of the last few
        transactions are counted, too.
        """
        if self.database.data_version is not None:
            return self.database.data_version()
        return self.database.read(lambda conn: tuple(map(float, conn.execute(_REVISION).one())))

    def any_begun(self) -> bool:
        """Return whether any job was started, so that its files may be on the volume."""
        asked = select(exists(select(attempt.c.job_id)))
        return self.database.read(lambda conn: bool(conn.execute(asked).scalar_one()))

    def get(self, job_id: int) -> Job:
        """
        Return a job.

        Raises:
            JobNotFoundError: there is no such id.
        """
        found = self.database.read(lambda conn: conn.execute(select(job).where(job.c.id == job_id)).first())
        if found is None:
            raise JobNotFoundError(f"there is no job {job_id}", hint="ganq status lists them")
        return Job.from_row(found)

    def find(self, reference: str) -> Job:
        """
        Return a job by its id, or the newest one with this name.

        Raises:
            JobNotFoundError: there is neither.
        """
        if re.fullmatch(r"[0-9]{1,18}", reference):
            return self.get(int(reference))
        newest = self.database.read(
            lambda conn: conn.execute(
                select(job).where(job.c.name == reference).order_by(job.c.id.desc()).limit(1)
            ).first()
        )
        if newest is None:
            raise JobNotFoundError(f"there is no job named {reference[:70]!r}", hint=self._hint(reference))
        return Job.from_row(newest)

    def _hint(self, reference: str) -> str:
        """Return what to do about a name that no job has."""
        with suppress(JobNotFoundError):
            self.find_sweep(reference)
            return f"{reference[:70]} is a sweep: --sweep {reference[:70]}, or the name of one of its jobs"
        return "ganq status lists ids and names"

    def by_submit_key(self, submit_key: str) -> Job | None:
        """Return the job that was submitted with this key, if there is one."""
        found = self.database.read(
            lambda conn: conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
        )
        return None if found is None else Job.from_row(found)

    def page(self, wanted: Filter, *, limit: int, oldest_first: bool = False) -> list[Job]:
        """Return up to `limit` jobs, by default newest first."""
        order = job.c.id if oldest_first else job.c.id.desc()
        query = select(job).where(*wanted.where()).order_by(order).limit(limit)
        return self.database.read(lambda conn: [Job.from_row(row) for row in conn.execute(query)])

    def stream(self, wanted: Filter) -> Iterator[Job]:
        """Yield all matching jobs, newest first; memory does not grow with their number."""
        before = wanted.before_id
        while True:
            page = self.page(Filter(**{**wanted.__dict__, "before_id": before}), limit=PAGE)
            yield from page
            if len(page) < PAGE:
                return
            before = page[-1].id

    def ids(self, wanted: Filter) -> list[int]:
        """Return all matching ids, newest first."""
        query = select(job.c.id).where(*wanted.where()).order_by(job.c.id.desc())
        return self.database.read(lambda conn: list(conn.execute(query).scalars()), patience_s=30.0)

    def get_many(self, job_ids: Sequence[int]) -> list[Job]:
        """Return these jobs, ordered by id; ids that do not exist are left out."""
        pages = [job_ids[start : start + PAGE] for start in range(0, len(job_ids), PAGE)]

        def ask(conn: Connection) -> list[Job]:
            found = [conn.execute(select(job).where(job.c.id.in_(page))).all() for page in pages]
            return sorted((Job.from_row(row) for rows in found for row in rows), key=lambda one: one.id)

        return self.database.read(ask)

    def counts(
        self, *, sweep: str | None = None, parts: bool = False, part_of: int | None = None
    ) -> dict[str, int]:
        """
        Count the jobs in each state.

        Args:
            sweep: of this array only, whose jobs have no parts.
            parts: those of split jobs are counted, too.
            part_of: of the parts of this job only.
        """
        by_state = select(job.c.state, func.count()).group_by(job.c.state)
        if sweep is not None:
            by_state = by_state.where(text("sweep IS NOT NULL"), job.c.sweep == sweep)
        if part_of is not None:
            by_state = by_state.where(job.c.part_of == part_of)
        less_parts = sweep is None and part_of is None and not parts
        split = select(func.count()).select_from(_active_splits().subquery())

        def ask(conn: Connection) -> dict[str, int]:
            # All, from the index of states alone, less the parts, from theirs: a count of
            # what is no part would read a million rows.
            found = {str(state): int(number) for state, number in conn.execute(by_state)}
            for state, number in conn.execute(_SHARDS_BY_STATE[conn.dialect.name]) if less_parts else ():
                found[state] -= number
            if sweep is None and part_of is None and (active := conn.execute(split).scalar_one()):
                found[JobState.QUEUED] -= active
                found[JobState.RUNNING] = found.get(JobState.RUNNING, 0) + active
            return found

        found = self.database.read(ask)
        return {state: found.get(state, 0) for state in JobState}

    def find_sweep(self, reference: str) -> str:
        """
        Return the id of a sweep, given its id, its name, or the name of one of its jobs.

        Raises:
            JobNotFoundError: there is none.
        """
        of_name = select(job.c.sweep).where(job.c.sweep.is_not(None))
        if re.fullmatch(r"[0-9]{1,18}", reference):
            tries = [of_name.where(job.c.id == int(reference))]
        else:
            tries = [of_name.where(job.c.sweep == reference)]
            tries += [of_name.where(job.c.name == name) for name in (f"{reference}-0", reference)]
            named = select(job.c.id).where(job.c.name.startswith(f"{reference}-", autoescape=True))
            tries.append(of_name.where(job.c.id.in_(named)))
        for query in tries:
            newest = query.order_by(job.c.id.desc()).limit(1)
            found = self.database.read(partial(_scalar, query=newest))
            if found is not None:
                return str(found)
        raise JobNotFoundError(
            f"there is no sweep {reference[:70]!r}", hint="ganq submit … --sweep prints the id and the name"
        )

    def newest_model(self, *, succeeded: bool = False) -> Job:
        """
        Return the default model of `generate`: the newest job that has a checkpoint or may get one.

        Args:
            succeeded: only one that has succeeded and has a checkpoint.

        Raises:
            JobNotFoundError: nothing was trained or imported yet.
        """
        from jobs.kinds import KINDS

        kinds = [kind.name for kind in KINDS.values() if kind.makes_model]
        has_checkpoint = select(checkpoint.c.id).where(checkpoint.c.job_id == job.c.id).exists()
        query = (
            select(job)
            .where(
                job.c.kind.in_(kinds),
                # One that has ended may have failed, or ganq gc may have taken what it made.
                and_(job.c.state == JobState.SUCCEEDED, has_checkpoint)
                if succeeded
                else or_(job.c.state.in_((JobState.QUEUED, JobState.RUNNING)), has_checkpoint),
            )
            .order_by(job.c.id.desc())
            .limit(1)
        )
        found = self.database.read(lambda conn: conn.execute(query).first())
        if found is None:
            raise JobNotFoundError(
                "there is nothing to generate from yet",
                hint="train first (ganq submit train --data DIR), or import weights (ganq import)",
            )
        return Job.from_row(found)

    def events(self, job_id: int, *, after_id: int = 0) -> list[Event]:
        """Return a job's events, oldest first."""
        query = select(event).where(event.c.job_id == job_id, event.c.id > after_id).order_by(event.c.id)
        return self.database.read(lambda conn: [Event.from_row(row) for row in conn.execute(query)])

    def instabilities(self, job_ids: Sequence[int]) -> dict[int, str]:
        """Return 'diverged: …' or 'collapsed: …' of jobs whose last such event no rollback has followed."""
        types = ("diverged", "collapsed", "rolled_back")
        query = select(event).where(event.c.job_id.in_(job_ids), event.c.type.in_(types)).order_by(event.c.id)
        found: dict[int, str] = {}
        for one in self.database.read(lambda conn: [Event.from_row(row) for row in conn.execute(query)]):
            if one.type == "rolled_back":
                found.pop(one.job_id, None)
            else:
                found[one.job_id] = f"{one.type}: {(one.detail or {}).get('reason', 'see ganq events')}"
        return found

    def preempted_by(self, job_ids: Sequence[int]) -> dict[int, int]:
        """Return the job for which each of these jobs was preempted last."""
        query = select(event).where(event.c.job_id.in_(job_ids), event.c.type.in_(PREEMPTIONS))
        rows = self.database.read(lambda conn: conn.execute(query.order_by(event.c.id)).all())
        events = [Event.from_row(row) for row in rows]
        waiting = {one.job_id: (one.detail or {}).get("waiting_job") for one in events}
        return {one: other for one, other in waiting.items() if isinstance(other, int)}

    def attempts(self, job_id: int) -> list[dict[str, Any]]:
        """Return a job's attempts, oldest first, without their tokens."""
        query = select(attempt).where(attempt.c.job_id == job_id).order_by(attempt.c.number)
        rows = self.database.read(lambda conn: conn.execute(query).all())
        return [attempt_from_row(row) for row in rows]

    def shards(self, job_id: int, *, most: int | None = None) -> list[Job]:
        """Return the first shards of a parent, in the order of sample indices; none of another job."""
        rows = self.database.read(lambda conn: shards_of(conn, job_id, most=most))
        return [Job.from_row(row) for row in rows]

    def shard_summaries(self, job_ids: Sequence[int]) -> dict[int, ShardSummary]:
        """Return the progress of the shards of each parent."""
        return self.database.read(lambda conn: summaries(conn, job_ids))

    def needs(self, job_id: int) -> list[tuple[int, JobState]]:
        """Return the jobs on which this one depends, without its own shards."""
        query = (
            select(job.c.id, job.c.state)
            .join(dependency, dependency.c.needs == job.c.id)
            .where(dependency.c.job_id == job_id, job.c.part_of.is_(None))
            .order_by(job.c.id)
        )
        return self.database.read(lambda conn: [(row.id, state_of(row.state)) for row in conn.execute(query)])

    def waits_for_end(self, job_id: int) -> list[tuple[int, str, JobState]]:
        """Return (job, condition, its state) of the jobs whose end this one waits or has waited for."""
        query = (
            select(job.c.id, end_dependency.c.condition, job.c.state)
            .join(end_dependency, end_dependency.c.needs == job.c.id)
            .where(end_dependency.c.job_id == job_id)
            .order_by(job.c.id)
        )
        rows = self.database.read(lambda conn: conn.execute(query).all())
        return [(row.id, row.condition, state_of(row.state)) for row in rows]

    def labels_of(self, job_ids: Sequence[int]) -> dict[int, dict[str, str]]:
        """Return the labels of those of these jobs that have any."""
        pages = [job_ids[start : start + PAGE] for start in range(0, len(job_ids), PAGE)]

        def ask(conn: Connection) -> dict[int, dict[str, str]]:
            found: dict[int, dict[str, str]] = {}
            for page in pages:
                query = select(label).where(label.c.job_id.in_(page)).order_by(label.c.job_id, label.c.key)
                for row in conn.execute(query):
                    found.setdefault(row.job_id, {})[row.key] = row.value
            return found

        return self.database.read(ask) if job_ids else {}

    def label_texts(self, limit: int) -> list[str]:
        """Return different labels as 'key=value', for completion."""
        query = select(label.c.key, label.c.value).distinct().order_by(label.c.key, label.c.value)
        rows = self.database.read(lambda conn: conn.execute(query.limit(limit)).all())
        return [f"{row.key}={row.value}" for row in rows]

    def priority_sources(self, one: Job) -> list[int]:
        """Return the dependants from which this job inherits its priority."""
        query = (
            select(job.c.id)
            .join(dependency, dependency.c.job_id == job.c.id)
            .where(
                dependency.c.needs == one.id,
                job.c.state == JobState.QUEUED,
                job.c.held == 0,
                job.c.priority >= one.priority,
            )
            .order_by(job.c.id)
            .limit(MAX_PRIORITY_SOURCES)
        )
        return self.database.read(lambda conn: list(conn.execute(query).scalars()))

    def ended_with(self, job_id: int) -> list[Job]:
        """Return the direct and indirect dependants that ended because this job did, oldest first."""

        def ask(conn: Connection) -> list[Job]:
            found: dict[int, Job] = {}
            needed = [job_id]
            while needed:
                query = (
                    select(job)
                    .join(dependency, dependency.c.job_id == job.c.id)
                    .where(
                        dependency.c.needs.in_(needed[:PAGE]),
                        job.c.error_code == "DEPENDENCY_FAILED",
                        job.c.part_of.is_(None),
                    )
                )
                new = {row.id: Job.from_row(row) for row in conn.execute(query) if row.id not in found}
                found |= new
                needed = [*needed[PAGE:], *new]
            return [found[one] for one in sorted(found)]

        return self.database.read(ask)

    def retried_as(self, job_id: int) -> int | None:
        """Return the newest retry of a job, None if there is none."""
        query = select(func.max(job.c.id)).where(text(RETRIES), job.c.retry_of == job_id)
        found: int | None = self.database.read(lambda conn: conn.scalar(query))
        return found

    def to_retry(self, wanted: Filter) -> list[int]:
        """Return the ids of failed jobs that were not retried yet, oldest first; see Filter.to_retry."""
        return sorted(self.ids(replace(wanted, to_retry=True)))

    def unfinished_dependencies(self, job_ids: Sequence[int]) -> dict[int, list[int]]:
        """Return for each job the dependencies that have not ended, by one query."""
        query = (
            select(dependency.c.job_id, dependency.c.needs)
            .join(job, job.c.id == dependency.c.needs)
            .where(
                dependency.c.job_id.in_(job_ids),
                job.c.part_of.is_(None),
                job.c.state.in_((JobState.QUEUED, JobState.RUNNING)),
            )
            .order_by(dependency.c.needs)
        )
        ends = (
            select(end_dependency.c.job_id, end_dependency.c.needs)
            .where(end_dependency.c.job_id.in_(job_ids), text(UNRESOLVED))
            .order_by(end_dependency.c.needs)
        )
        waiting: dict[int, list[int]] = {}

        def ask(conn: Connection) -> list[Any]:
            return [*conn.execute(query).all(), *conn.execute(ends).all()]

        for row in self.database.read(ask) if job_ids else ():
            waiting.setdefault(row.job_id, []).append(row.needs)
        return waiting

    def checkpoints(self, job_id: int) -> list[Checkpoint]:
        """Return a job's registered checkpoints, oldest first."""
        query = (
            select(checkpoint)
            .where(checkpoint.c.job_id == job_id)
            .order_by(checkpoint.c.step, checkpoint.c.id)
        )
        return self.database.read(lambda conn: [Checkpoint.from_row(row) for row in conn.execute(query)])

    def best_metrics(self, job_ids: Sequence[int]) -> dict[int, float]:
        """Return the lowest metric among each job's checkpoints, for jobs that have one."""
        query = (
            select(checkpoint.c.job_id, func.min(checkpoint.c.metric))
            .where(checkpoint.c.job_id.in_(job_ids), checkpoint.c.metric.is_not(None))
            .group_by(checkpoint.c.job_id)
        )
        return self.database.read(lambda conn: {row[0]: float(row[1]) for row in conn.execute(query)})

    def checkpoint_of(self, sha256: str) -> Checkpoint | None:
        """Return the newest checkpoint whose manifest has this SHA-256."""
        query = select(checkpoint).where(checkpoint.c.manifest_sha256 == sha256)
        query = query.order_by(checkpoint.c.id.desc()).limit(1)
        row = self.database.read(lambda conn: conn.execute(query).first())
        return None if row is None else Checkpoint.from_row(row)

    def choose_checkpoint(self, job_id: int, which: str) -> Checkpoint:
        """
        Return a checkpoint of a job.

        Args:
            which: 'best' (lowest metric; the last one if there is no metric), 'last', or a number of
                complete epochs.

        Raises:
            CheckpointNotFoundError: the job has none, or not that one; the hint lists the epochs.
        """
        there = self.checkpoints(job_id)
        if not there:
            raise without_checkpoint(self, self.get(job_id))
        if which == "last":
            return there[-1]
        if which == "best":
            measured = [one for one in there if one.metric is not None]
            return min(measured, key=lambda one: one.metric or 0.0) if measured else there[-1]
        exact = [one for one in there if one.epoch == int(which) and one.kind != "resume"]
        if not exact:
            epochs = sorted({one.epoch for one in there if one.kind != "resume"}) or [there[-1].epoch]
            raise CheckpointNotFoundError(
                f"job {job_id} has no checkpoint of epoch {which}",
                hint=f"it has: {', '.join(map(str, epochs[-12:]))}; or use best, last",
            )
        return exact[-1]

    def workers(self) -> list[WorkerRow]:
        """Return all registered workers, by name."""
        query = select(worker, (utcnow() - worker.c.seen_at).label("silent_s")).order_by(worker.c.name)
        return self.database.read(lambda conn: [WorkerRow.from_row(row) for row in conn.execute(query)])

    def running(self) -> dict[str, Job]:
        """Return the job that each worker runs, by the name of the worker."""
        query = select(job).where(text(RUNNING)).order_by(job.c.id)
        rows = self.database.read(lambda conn: conn.execute(query).all())
        return {one.worker: one for one in map(Job.from_row, rows) if one.worker is not None}

    def submitter_uid(self, job_id: int) -> int | None:
        """Return the account that has submitted a job with --out; None if an older ganq did."""
        query = select(event.c.detail).where(event.c.job_id == job_id, event.c.type == "submitted")
        details = self.database.read(lambda conn: conn.execute(query).scalars().all())
        return next((one["uid"] for one in details if one and isinstance(one.get("uid"), int)), None)

    def held(self) -> dict[JobState, int]:
        """Count the jobs that are held or paused (queued) or being paused (running), without shards."""
        query = select(job.c.state, func.count()).where(job.c.id.in_(_held()), job.c.part_of.is_(None))
        rows = self.database.read(lambda conn: conn.execute(query.group_by(job.c.state)).all())
        return {JobState(state): int(number) for state, number in rows}

    def live(self) -> list[LiveJobs]:
        """Count the jobs that have not ended, by state, kind and queue."""
        can_start = text(CLAIMABLE)
        since = case((can_start, job.c.created_at))
        query = (
            select(
                job.c.state,
                job.c.kind,
                job.c.queue,
                job.c.held,
                func.count().label("jobs"),
                func.count(since).label("claimable"),
                func.coalesce(utcnow() - func.min(since), 0.0).label("oldest_s"),
            )
            .where(job.c.state.in_((JobState.QUEUED, JobState.RUNNING)))
            .group_by(job.c.state, job.c.kind, job.c.queue, job.c.held)
        )
        return self.database.read(lambda conn: [LiveJobs(**row._mapping) for row in conn.execute(query)])

    def usage(self, by: UsageKey, since_s: float) -> list[Usage]:
        """
        Sum the time that attempts took on workers within the last `since_s` seconds; the most first.

        A running attempt counts until now; of one that began earlier, the part within that time counts.
        Attempts of one job add up: a job that was lost and started again has used the workers twice.
        """
        since = utcnow() - since_s
        begun = case((attempt.c.started_at < since, since), else_=attempt.c.started_at)
        length = func.coalesce(attempt.c.ended_at, utcnow()) - begun
        seconds = case((length > 0, length), else_=0.0)
        is_gpu = attempt.c.device.is_not(None) & attempt.c.device.not_like("cpu%")
        query = (
            select(
                job.c[by].label("name"),
                func.count(job.c.id.distinct()).label("jobs"),
                func.count().label("attempts"),
                func.sum(seconds).label("worker_s"),
                func.sum(case((is_gpu, seconds), else_=0.0)).label("gpu_s"),
            )
            .select_from(attempt)
            .join(job, job.c.id == attempt.c.job_id)
            .where(or_(attempt.c.ended_at.is_(None), attempt.c.ended_at > since))
            .group_by(job.c[by])
        )
        rows = self.database.read(lambda conn: conn.execute(query).all(), patience_s=30.0)
        found = [Usage(**row._mapping) for row in rows]
        return sorted(found, key=lambda one: (-one.worker_s, one.name))

    def queue_position(self, one: Job) -> int:
        """Return the number of claimable jobs before a queued one, in its queue."""

        def ask(conn: Connection) -> int:
            earlier = tuple_(job.c.position, job.c.id) < tuple_(one.position, one.id)
            ahead = or_(job.c.priority > one.priority, (job.c.priority == one.priority) & earlier)
            query = select(func.count()).where(
                job.c.state == JobState.QUEUED,
                job.c.held == 0,
                job.c.blockers == 0,
                job.c.queue == one.queue,
                ahead,
            )
            return int(conn.execute(query).scalar_one())

        return self.database.read(ask)


def without_checkpoint(queries: Queries, one: Job) -> CheckpointNotFoundError:
    """Return the error of a job that has no checkpoint; its hint names an older job of its name that has."""
    source = one.spec.get("source")
    if one.kind in ("generate", "evaluate") and isinstance(source, int):
        return CheckpointNotFoundError(
            f"job {one.id} is of kind {one.kind} and has no checkpoints", hint=f"job {source} is its source"
        )
    if "deleted_at" in (one.result or {}):
        return CheckpointNotFoundError(
            f"the checkpoints of job {one.id} were deleted by ganq gc",
            hint=f"ganq retry {one.id} trains it again",
        )
    if one.state.terminal:
        older = queries.page(Filter(name=one.name, before_id=one.id), limit=20) if one.name else []
        named = (each.id for each in older if each.name == one.name and queries.checkpoints(each.id))
        other = next((f"name job {id}, which has the same name" for id in named), "name another job")
        return CheckpointNotFoundError(
            f"job {one.id} has {ending_text(one.state)} and left no checkpoint",
            hint=f"ganq retry {one.id} trains it again; or {other}",
        )
    return CheckpointNotFoundError(
        f"job {one.id} has no checkpoint yet", hint=f"ganq status {one.id} shows how far it is"
    )
