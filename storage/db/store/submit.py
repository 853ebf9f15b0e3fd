"""Accepting a job: the row is the acceptance."""

import secrets
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from jobs.errors import JobNotFoundError, SpecError
from jobs.failpoints import failpoint
from jobs.states import JobState
from storage.db.rows import Job
from storage.db.store.base import Store
from storage.db.store.inheritance import lend
from storage.db.store.shards import insert_shards
from storage.db.store.transitions import event_of_row, get_job, how_it_ended, record_event
from storage.db.tables import checkpoint, dependency, event, job, utcnow

FinishedFiles = Callable[[int], tuple[str, str, int, int]]
"""New job's id → (path relative to the volume, manifest sha-256, bytes, epoch)."""


class Submitting(Store):
    """Insert jobs."""

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
        ringing: bool = False,
        parts: Sequence[tuple[dict[str, Any], int]] = (),
        max_workers: int = 0,
    ) -> Job:
        """
        Accept a job: when this returns, the row is committed.

        Args:
            submit_key: made by the client; the same key gives the same row, once.
            after: jobs that must succeed first.
            preemptible: it may be asked to make room for a job of higher priority.
            time_limit_s: seconds that it may run, over all attempts.
            parts: (spec, pictures) of each part of a job that many workers share.
            max_workers: parts that may run at once; 0: all.
            ringing: the caller rings as soon as this returns. It is recorded here and not
                after the bell: a row that is being updated is one that a claim skips.

        Raises:
            JobNotFoundError: a job in `after` does not exist.
            SpecError: a job in `after` has failed or was cancelled.
        """

        def work(conn: Connection) -> Job:
            needs = sorted(set(after))  # one order for all, so that two submits cannot lock crosswise
            if needs and (known := _known(conn, submit_key, kind, spec)) is not None:
                return known
            blockers = hold_needed(conn, needs)
            said = {
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
                "blockers": blockers + len(parts),
                "retry_of": retry_of,
            }
            rung = ringing and not held and not blockers and not parts
            retried = {"retry_of": retry_of} if retry_of else None
            new = _insert(conn, said, retried, rung=rung)
            if new is None:  # the key is taken
                known = _known(conn, submit_key, kind, spec)
                assert known is not None
                return known
            for needed in needs:
                conn.execute(insert(dependency).values(job_id=new.id, needs=needed))
            if blockers and not held:
                lend(conn, needs, priority)
            if parts:
                common = {"kind": kind, "queue": queue, "user": user, "priority": priority}
                common |= {"spec_version": spec_version, "state": JobState.QUEUED, "held": int(held)}
                common |= {"time_limit_s": time_limit_s}
                insert_shards(
                    conn, new.id, submit_key, common, parts, needs=needs, blockers=blockers, lanes=max_workers
                )
            failpoint("submit.inserted")
            return Job.from_row(new)

        accepted = self.database.write(work, at_once=not after and not parts)
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
        Record a job whose work is already done, with its checkpoint: `ganq import`.

        Args:
            files: called with the new id while the row is not yet committed; it makes
                the files durable and says where they are. If it fails, nothing is recorded.
        """

        submit_key = secrets.token_hex(16)

        def work(conn: Connection) -> Job:
            known = conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
            if known is not None:  # our own commit, whose answer was lost
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


def hold_needed(conn: Connection, needs: Sequence[int]) -> int:
    """
    Lock the jobs that a new one waits for, so that none can end between this look and the insert.

    Returns:
        How many of them have not succeeded yet.

    Raises:
        JobNotFoundError, SpecError: one is not there, or will never succeed.
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
                f"job {needed} has {how_it_ended(state)}, so a job after it would never run",
                hint=f"ganq retry {needed}, or submit without --after",
            )
        blockers += state != JobState.SUCCEEDED
    return blockers


def _known(conn: Connection, submit_key: str, kind: str, spec: dict[str, Any]) -> Job | None:
    """
    The job that this key has made before.

    Raises:
        SpecError: from another request.
    """
    known = conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
    if known is None:
        return None
    if (known.kind, known.spec) != (kind, spec):
        raise SpecError(
            f"the submit key {submit_key[:64]!r} is that of job {known.id}, another request",
            hint="the same key must come with the same request; use another key",
        )
    return Job.from_row(known)


def _insert(conn: Connection, said: dict[str, Any], told: dict[str, Any] | None, *, rung: bool) -> Any:
    """Insert a job, tell of it and read it; None, and nothing is done, if its key is taken."""
    values = {f"new_{column}": value for column, value in said.items()}
    insert = _insert_once(conn.dialect.name, rung)
    if conn.dialect.name == "postgresql":
        return conn.execute(insert, {**values, "told": told}).first()
    new = conn.execute(insert, values).first()
    if new is not None:
        record_event(conn, new.id, "submitted", detail=told)
    return new


def _recorded(new: Any) -> Any:
    """Insert a job and tell of it: one statement, so that Postgres does both or neither."""
    row = new.cte("new")
    told = event_of_row(row, "submitted", detail=bindparam("told", type_=event.c.detail.type))
    return select(row).add_cte(told.cte("told"))


COLUMNS = (
    *("submit_key", "name", "kind", "queue", "user", "priority", "spec", "spec_version", "state", "held"),
    *("preemptible", "time_limit_s", "blockers", "retry_of"),
)


@cache
def _insert_once(dialect: str, rung: bool) -> Any:
    """Insert a job unless its key is taken. The other database's dialect stays unread: it takes 20 ms."""
    new = import_module(f"sqlalchemy.dialects.{dialect}").insert
    made = (
        new(job)
        .values(
            {column: bindparam(f"new_{column}", type_=job.c[column].type) for column in COLUMNS}
            | {"rung_at": utcnow() if rung else None, "created_at": utcnow()}
        )
        .on_conflict_do_nothing(index_elements=["submit_key"])
        .returning(job)
    )
    return _recorded(made) if dialect == "postgresql" else made
