"""Submit a job: it is accepted when its row is committed."""

import os
import secrets
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from jobs.errors import JobNotFoundError, SpecError, SubmitKeyReusedError
from jobs.failpoints import failpoint
from jobs.states import JobState, ending_text
from storage.db.rows import Job
from storage.db.store.inheritance import raise_priority
from storage.db.store.shards import insert_shards
from storage.db.store.transitions import (
    StoreMixin,
    event_of_row,
    get_job,
    record_event,
    storable_text,
    with_requester,
)
from storage.db.store.waiting import NO_EXTRAS, Extras, insert_extras, lock_conditions
from storage.db.tables import checkpoint, dependency, event, job, utcnow

FinishedFiles = Callable[[int], tuple[str, str, int, int]]
"""New job's id → (path relative to the volume, manifest sha-256, bytes, epoch)."""


class SubmitMixin(StoreMixin):
    """Submit and import jobs."""

    def submit(
        self,
        *,
        kind: str,
        spec: dict[str, Any],
        spec_version: int,
        submit_key: str,
        user: str,
        name: str | None = None,
        queue: str = "default",
        priority: int = 0,
        after: Sequence[int] = (),
        retry_of: int | None = None,
        held: bool = False,
        preemptible: bool = False,
        time_limit_s: float | None = None,
        will_notify: bool = False,
        shards: Sequence[tuple[dict[str, Any], int]] = (),
        max_workers: int = 0,
        extras: Extras = NO_EXTRAS,
    ) -> Job:
        """
        Submit a job; when this returns, the row is committed.

        Args:
            submit_key: chosen by the client; a second submit with the same key returns the same job.
            after: jobs that must succeed first.
            preemptible: the job may be preempted by a job of higher priority.
            time_limit_s: limit of the duration of all attempts together.
            shards: (spec, number of images) of each shard of a job that is split.
            max_workers: shards that may run at once; 0: all.
            will_notify: the caller sends a notification when this returns. It is recorded here and not
                afterwards, because a claim skips a row that is being updated.

        Raises:
            JobNotFoundError: a job that it waits for does not exist.
            SpecError: a job that it waits for has ended in another way.
        """

        def work(conn: Connection) -> Job:
            return insert_job(
                conn,
                kind=kind,
                spec=spec,
                spec_version=spec_version,
                submit_key=submit_key,
                user=user,
                name=name,
                queue=queue,
                priority=priority,
                after=after,
                retry_of=retry_of,
                held=held,
                preemptible=preemptible,
                time_limit_s=time_limit_s,
                will_notify=will_notify,
                shards=shards,
                max_workers=max_workers,
                extras=extras,
            )

        accepted = self.database.write(work, autocommit=not after and not shards and not extras)
        failpoint("submit.committed")
        return accepted

    def add_finished(
        self,
        *,
        kind: str,
        spec: dict[str, Any],
        spec_version: int,
        user: str,
        name: str,
        files: FinishedFiles,
    ) -> Job:
        """
        Insert a succeeded job with its checkpoint, for `ganq import`.

        Args:
            files: called with the new id before the row is committed; it writes the files and returns
                where they are. If it fails, nothing is inserted.
        """

        submit_key = secrets.token_hex(16)

        def work(conn: Connection) -> Job:
            known = conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
            if known is not None:  # an earlier try has committed, and the answer was lost
                return Job.from_row(known)
            new_id = conn.execute(
                insert(job)
                .values(
                    submit_key=submit_key,
                    name=name,
                    kind=kind,
                    queue="none",
                    user=user,
                    priority=0,
                    spec=spec,
                    spec_version=spec_version,
                    state=JobState.SUCCEEDED,
                    attempt=1,
                    created_at=utcnow(),
                    started_at=utcnow(),
                    finished_at=utcnow(),
                )
                .returning(job.c.id)
            ).scalar_one()
            path, digest, size, epoch = files(new_id)
            conn.execute(
                insert(checkpoint).values(
                    job_id=new_id,
                    attempt=1,
                    kind="import",
                    epoch=epoch,
                    step=0,
                    path=path,
                    manifest_sha256=digest,
                    bytes=size,
                    created_at=utcnow(),
                )
            )
            record_event(conn, new_id, "imported", attempt=1, detail={"path": path})
            return get_job(conn, new_id)

        return self.database.write(work)


def insert_job(
    conn: Connection,
    *,
    kind: str,
    spec: dict[str, Any],
    spec_version: int,
    submit_key: str,
    user: str,
    name: str | None = None,
    queue: str = "default",
    priority: int = 0,
    after: Sequence[int] = (),
    retry_of: int | None = None,
    held: bool = False,
    preemptible: bool = False,
    time_limit_s: float | None = None,
    will_notify: bool = False,
    shards: Sequence[tuple[dict[str, Any], int]] = (),
    max_workers: int = 0,
    extras: Extras = NO_EXTRAS,
) -> Job:
    """Insert a job with its dependencies, shards and event in the caller's transaction; see submit()."""
    needs = sorted(set(after))  # one order for all, so that two submits cannot deadlock
    if (needs or extras) and (known := _submitted_before(conn, submit_key, kind, spec)) is not None:
        return known
    waits = lock_conditions(conn, extras, needs)
    blockers = lock_dependencies(conn, needs) + waits.blockers
    columns = {
        "submit_key": submit_key,
        "name": name,
        "kind": kind,
        "queue": queue,
        "user": user,
        "priority": priority,
        "spec": spec,
        "spec_version": spec_version,
        "state": JobState.QUEUED,
        "held": int(held),
        "preemptible": int(preemptible),
        "time_limit_s": time_limit_s,
        "blockers": blockers + len(shards),
        "retry_of": retry_of,
        "note": storable_text(extras.note),
        "begin_at": waits.begin_at,
    }
    notified = will_notify and not held and not blockers and not shards
    detail = {"retry_of": retry_of} if retry_of else {}
    if spec.get("out"):  # a worker of another account leaves copying to the client
        detail["uid"] = os.geteuid()
    new = _insert(conn, columns, detail or None, notified=notified)
    if new is None:  # the key is taken
        known = _submitted_before(conn, submit_key, kind, spec)
        assert known is not None
        return known
    for needed in needs:
        conn.execute(insert(dependency).values(job_id=new.id, needs=needed))
    if blockers and not held:
        raise_priority(conn, needs, priority)
    if shards:
        common = {"kind": kind, "queue": queue, "user": user, "priority": priority}
        common |= {"spec_version": spec_version, "state": JobState.QUEUED, "held": int(held)}
        common |= {"time_limit_s": time_limit_s, "begin_at": waits.begin_at}
        made = insert_shards(
            conn,
            new.id,
            submit_key,
            common,
            shards,
            needs=needs,
            blockers=blockers,
            max_parallel=max_workers,
        )
        insert_extras(conn, made, NO_EXTRAS, waits)
    if extras:
        insert_extras(conn, [new.id], extras, waits)
    failpoint("submit.inserted")
    return Job.from_row(new)


def lock_dependencies(conn: Connection, needs: Sequence[int]) -> int:
    """
    Lock the jobs on which a new one depends, so that none can end before the insert.

    Returns:
        The number of those that have not succeeded yet.

    Raises:
        JobNotFoundError: one does not exist.
        SpecError: one has failed or was cancelled.
    """
    blockers = 0
    for needed in needs:
        state = conn.execute(
            select(job.c.state).where(job.c.id == needed).with_for_update()
        ).scalar_one_or_none()
        if state is None:
            raise JobNotFoundError(f"there is no job {needed} to wait for", hint="ganq status lists them")
        if state in (JobState.FAILED, JobState.CANCELLED):
            raise SpecError(
                f"job {needed} has {ending_text(state)}, so a job after it would never run",
                hint=f"ganq retry {needed}, or submit without --after",
            )
        blockers += state != JobState.SUCCEEDED
    return blockers


def _submitted_before(conn: Connection, submit_key: str, kind: str, spec: dict[str, Any]) -> Job | None:
    """
    Return the job that was submitted with this key, if there is one.

    Raises:
        SubmitKeyReusedError: its request was another one.
    """
    known = conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
    if known is None:
        return None
    if (known.kind, known.spec) != (kind, spec):
        raise SubmitKeyReusedError(
            f"the submit key {submit_key[:64]!r} belongs to job {known.id}, which is another request",
            hint="use another key for another request",
            job_id=known.id,
            known={"kind": known.kind, "spec": known.spec},
            given={"kind": kind, "spec": spec},
        )
    return Job.from_row(known)


def _insert(
    conn: Connection, columns: dict[str, Any], detail: dict[str, Any] | None, *, notified: bool
) -> Any:
    """Insert a job and its event, and return the row; return None if the key is taken."""
    values = {f"new_{column}": value for column, value in columns.items()}
    insert = _insert_once(conn.dialect.name, notified)
    if conn.dialect.name == "postgresql":
        return conn.execute(insert, {**values, "new_detail": with_requester(conn, detail)}).first()
    new = conn.execute(insert, values).first()
    if new is not None:
        record_event(conn, new.id, "submitted", detail=detail)
    return new


def _with_records(new: Any) -> Any:
    """Insert a job and its event in one statement, which Postgres executes atomically."""
    row = new.cte("new")
    detail = event_of_row(row, "submitted", detail=bindparam("new_detail", type_=event.c.detail.type))
    return select(row).add_cte(detail.cte("recorded"))


COLUMNS = (
    *("submit_key", "name", "kind", "queue", "user", "priority", "spec", "spec_version", "state", "held"),
    *("preemptible", "time_limit_s", "blockers", "retry_of", "note", "begin_at"),
)


@cache
def _insert_once(dialect: str, notified: bool) -> Any:
    """Return the insert of a job whose key is not taken; import only the dialect that is used (20 ms)."""
    new = import_module(f"sqlalchemy.dialects.{dialect}").insert
    made = (
        new(job)
        .values(
            {column: bindparam(f"new_{column}", type_=job.c[column].type) for column in COLUMNS}
            | {"rung_at": utcnow() if notified else None, "created_at": utcnow()}
        )
        .on_conflict_do_nothing(index_elements=["submit_key"])
        .returning(job)
    )
    return _with_records(made) if dialect == "postgresql" else made
