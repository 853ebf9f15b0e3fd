"""Sweeps: many jobs that are submitted in one transaction; and requests for many jobs at once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Connection, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from jobs.errors import SpecError, SubmitKeyReusedError
from jobs.failpoints import failpoint
from jobs.states import JobState
from storage.db.store.inheritance import raise_priority
from storage.db.store.submit import insert_job, lock_dependencies
from storage.db.store.transitions import (
    StoreMixin,
    cancel_queued,
    record_event,
    storable_text,
    transition,
    with_requester,
)
from storage.db.store.waiting import NO_EXTRAS, Extras, insert_extras, lock_conditions
from storage.db.tables import UNRESOLVED, dependency, end_dependency, event, job, utcnow

MAX_SWEEP_JOBS = 10_000
"""Rows per transaction, which holds SQLite's write lock for about a second."""
OPEN = (JobState.QUEUED, JobState.RUNNING)
REFERENCES = ("source", "continue_from", "init_from")
"""Fields of a spec that hold the id of a job."""
BATCH_SIZE = 500
"""Jobs that one transaction cancels, so that workers can claim and send heartbeats in between."""


@dataclass(frozen=True)
class Sweep:
    """The jobs of one sweep."""

    id: str
    job_ids: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A job, or a sweep, that is submitted together with others."""

    placeholders: tuple[int, ...]
    """Negative placeholders for the ids of its jobs in the specs and in `after` of later entries."""
    specs: tuple[dict[str, Any], ...]
    names: tuple[str | None, ...]
    submit_key: str
    columns: dict[str, Any]
    """Columns that all its jobs share."""
    after: tuple[int, ...] = ()
    swept: bool = False
    shards: tuple[tuple[dict[str, Any], int], ...] = ()
    max_workers: int = 0
    will_notify: int = 0
    """Number of notifications that the caller sends."""
    extras: Extras = NO_EXTRAS


def sweep_id(submit_key: str) -> str:
    """Return the id of a sweep; it begins with a letter, unlike the id of a job."""
    return "s" + hashlib.sha256(submit_key.encode()).hexdigest()[:9]


class SweepMixin(StoreMixin):
    """Submit sweeps, cancel many jobs."""

    def submit_sweep(
        self,
        specs: Sequence[dict[str, Any]],
        *,
        names: Sequence[str | None],
        submit_key: str,
        kind: str,
        spec_version: int,
        user: str,
        queue: str = "default",
        priority: int = 0,
        after: Sequence[int] = (),
        held: bool = False,
        preemptible: bool = False,
        time_limit_s: float | None = None,
        will_notify: int = 0,
        extras: Extras = NO_EXTRAS,
    ) -> Sweep:
        """
        Submit many jobs in one transaction; when this returns, all rows are committed.

        Args:
            specs, names: of each job, in order.
            submit_key: chosen by the client; a second submit with the same key returns the same jobs.
            will_notify: number of notifications that the caller sends when this returns; see submit().

        Raises:
            JobNotFoundError: a job in `after` does not exist.
            SpecError: a job in `after` has failed or was cancelled, there are too many jobs, or the key
                belongs to another request.
        """

        def work(conn: Connection) -> Sweep:
            return insert_sweep(
                conn,
                specs,
                names=names,
                submit_key=submit_key,
                kind=kind,
                spec_version=spec_version,
                user=user,
                queue=queue,
                priority=priority,
                after=after,
                held=held,
                preemptible=preemptible,
                time_limit_s=time_limit_s,
                will_notify=will_notify,
                extras=extras,
            )

        try:
            accepted = self.database.write(work)
        except IntegrityError:  # another submit with this key was faster
            accepted = self.database.write(work)
        failpoint("submit.committed")
        return accepted

    def submit_together(self, entries: "Sequence[Entry]") -> list[tuple[int, ...]]:
        """
        Submit jobs and sweeps that may refer to each other, in one transaction: all or none.

        Args:
            entries: in an order in which each one refers only to jobs before it.

        Returns:
            The ids of the jobs of each entry.

        Raises:
            JobNotFoundError, SpecError: see submit() and submit_sweep(); nothing was submitted.
        """
        number = sum(len(entry.specs) for entry in entries)
        if number > MAX_SWEEP_JOBS:
            raise SpecError(f"{number:,} jobs are more than one submission holds ({MAX_SWEEP_JOBS:,})")

        def work(conn: Connection) -> list[tuple[int, ...]]:
            ids: dict[int, int] = {}
            made = []
            # One order for all, so that two submits cannot deadlock.
            lock_dependencies(conn, sorted({one for entry in entries for one in entry.after if one > 0}))
            for entry in entries:
                specs = [_with_ids(spec, ids) for spec in entry.specs]
                after = [ids.get(needed, needed) for needed in entry.after]
                extras = replace(
                    entry.extras,
                    after_any=[ids.get(needed, needed) for needed in entry.extras.after_any],
                    after_fail=[ids.get(needed, needed) for needed in entry.extras.after_fail],
                )
                if entry.swept:
                    new = insert_sweep(
                        conn,
                        specs,
                        names=entry.names,
                        submit_key=entry.submit_key,
                        after=after,
                        will_notify=entry.will_notify,
                        extras=extras,
                        **entry.columns,
                    ).job_ids
                else:
                    new = (
                        insert_job(
                            conn,
                            spec=specs[0],
                            name=entry.names[0],
                            submit_key=entry.submit_key,
                            after=after,
                            shards=[(_with_ids(shard, ids), images) for shard, images in entry.shards],
                            max_workers=entry.max_workers,
                            will_notify=entry.will_notify > 0,
                            extras=extras,
                            **entry.columns,
                        ).id,
                    )
                ids |= dict(zip(entry.placeholders, new, strict=True))
                made.append(tuple(new))
            failpoint("submit.inserted")
            return made

        try:
            accepted = self.database.write(work)
        except IntegrityError:  # another submit with one of the keys was faster
            accepted = self.database.write(work)
        failpoint("submit.committed")
        return accepted

    def cancel_many(self, ids: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """
        Cancel queued jobs and request the cancel of running ones, a few hundred in each transaction.

        Jobs that have ended meanwhile are skipped, and shards, which are cancelled with their parent.

        Yields:
            (job id, whether it is cancelled already), after each commit.
        """
        for start in range(0, len(ids), BATCH_SIZE):
            some = ids[start : start + BATCH_SIZE]
            yield from self.database.write(partial(_cancel, ids=some))


def insert_sweep(
    conn: Connection,
    specs: Sequence[dict[str, Any]],
    *,
    names: Sequence[str | None],
    submit_key: str,
    kind: str,
    spec_version: int,
    user: str,
    queue: str = "default",
    priority: int = 0,
    after: Sequence[int] = (),
    held: bool = False,
    preemptible: bool = False,
    time_limit_s: float | None = None,
    will_notify: int = 0,
    extras: Extras = NO_EXTRAS,
) -> Sweep:
    """Insert the jobs of a sweep in the caller's transaction; see submit_sweep()."""
    if len(specs) > MAX_SWEEP_JOBS:
        raise SpecError(f"{len(specs):,} jobs are more than one sweep holds ({MAX_SWEEP_JOBS:,})")
    name = sweep_id(submit_key)
    keys = [hashlib.sha256(f"{submit_key}/{place}".encode()).hexdigest() for place in range(len(specs))]

    known = _submitted_before(conn, name, kind, specs)
    if known is not None:
        return known
    needs = sorted(set(after))
    waits = lock_conditions(conn, extras, needs)
    blockers = lock_dependencies(conn, needs) + waits.blockers
    most = extras.max_running or len(specs)
    common = {"kind": kind, "queue": queue, "user": user, "priority": priority, "sweep": name}
    common |= {"spec_version": spec_version, "state": JobState.QUEUED, "held": int(held)}
    common |= {
        "preemptible": int(preemptible),
        "time_limit_s": time_limit_s,
        "max_running": extras.max_running,
    }
    common |= {"note": storable_text(extras.note), "begin_at": waits.begin_at}
    now = float(conn.execute(select(utcnow())).scalar_one())
    notified = will_notify if not held and not blockers else 0
    rows = [
        {
            **common,
            "submit_key": key,
            "name": called,
            "spec": spec,
            "blockers": blockers + (place >= most),
            "throttled": int(place >= most),
            "created_at": now,
            "rung_at": now if place < min(notified, most) else None,
        }
        for place, (key, called, spec) in enumerate(zip(keys, names, specs, strict=True))
    ]
    conn.execute(insert(job), rows)
    made = _ids(conn, name)
    if needs:
        links = [{"job_id": one, "needs": needed} for one in made for needed in needs]
        conn.execute(insert(dependency), links)
        if blockers and not held:
            raise_priority(conn, needs, priority)
    if extras:
        insert_extras(conn, made, extras, waits)
    detail = with_requester(conn, {"sweep": name})
    events = [{"job_id": one, "type": "submitted", "detail": detail} for one in made]
    conn.execute(insert(event).values(at=utcnow()), events)
    failpoint("submit.inserted")
    return Sweep(name, tuple(made))


def _with_ids(spec: dict[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """Return a spec with ids instead of placeholders."""
    return {**spec, **{name: ids[spec[name]] for name in REFERENCES if spec.get(name) in ids}}


def _ids(conn: Connection, name: str) -> list[int]:
    found = select(job.c.id).where(text("sweep IS NOT NULL"), job.c.sweep == name).order_by(job.c.id)
    return list(conn.execute(found).scalars())


def _submitted_before(
    conn: Connection, name: str, kind: str, specs: Sequence[dict[str, Any]]
) -> Sweep | None:
    """
    Return the sweep that was submitted with this key, if there is one.

    Raises:
        SubmitKeyReusedError: its request was another one.
    """
    query = select(job.c.id, job.c.kind, job.c.spec).where(text("sweep IS NOT NULL"), job.c.sweep == name)
    rows = conn.execute(query.order_by(job.c.id)).all()
    if not rows:
        return None
    if [(row.kind, row.spec) for row in rows] != [(kind, spec) for spec in specs]:
        raise SubmitKeyReusedError(
            f"this submit key belongs to sweep {name}, which is another request",
            hint="use another key for another request",
            job_id=rows[0].id,
            known={"kind": rows[0].kind, "specs": [row.spec for row in rows[:10]]},
            given={"kind": kind, "specs": list(specs[:10])},
        )
    return Sweep(name, tuple(row.id for row in rows))


def _cancel(conn: Connection, ids: Sequence[int]) -> list[tuple[int, bool]]:
    rows = conn.execute(
        select(job)
        .where(
            job.c.id.in_(ids), job.c.state.in_((JobState.QUEUED, JobState.RUNNING)), job.c.part_of.is_(None)
        )
        .order_by(job.c.id)
        .with_for_update()
    ).all()
    wanted = [row.id for row in rows]
    # Jobs without dependants and shards, nearly all, are cancelled together.
    needed = select(dependency.c.needs).where(dependency.c.needs.in_(wanted))
    needed_ids = set(conn.execute(needed).scalars())
    ends = select(end_dependency.c.needs).where(end_dependency.c.needs.in_(wanted), text(UNRESOLVED))
    needed_ids |= set(conn.execute(ends).scalars())
    split = select(job.c.part_of).where(text("part_of IS NOT NULL"), job.c.part_of.in_(wanted))
    needed_ids |= set(conn.execute(split).scalars())
    alone = [row.id for row in rows if row.state == JobState.QUEUED and row.id not in needed_ids]
    cancel_queued(conn, alone)
    done = dict.fromkeys(alone, True)
    for row in reversed(rows):  # the newest first, so that dependants come before their dependencies
        if row.id in done:
            continue
        now = conn.execute(select(job).where(job.c.id == row.id)).one()
        if JobState(now.state).terminal:  # together with a dependency
            done[row.id] = True
            continue
        if now.cancel_requested_at is None:
            conn.execute(update(job).where(job.c.id == row.id).values(cancel_requested_at=utcnow()))
            record_event(conn, row.id, "cancel_requested")
        if now.state == JobState.QUEUED:
            transition(conn, now, JobState.CANCELLED, None, {}, None)
        done[row.id] = now.state == JobState.QUEUED
    return sorted(done.items(), reverse=True)
