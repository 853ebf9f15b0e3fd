"""Arrays: many jobs that were submitted as one, accepted all or none; and what is wished of many at once."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from jobs.errors import SpecError
from jobs.failpoints import failpoint
from jobs.states import JobState
from storage.db.store.base import Store
from storage.db.store.inheritance import lend
from storage.db.store.submit import hold_needed
from storage.db.store.transitions import cancel_queued, leave, record_event
from storage.db.tables import dependency, event, job, utcnow

MOST_IN_A_SWEEP = 10_000
"""One transaction holds SQLite's only write lock: this many rows take about a second."""
OPEN = (JobState.QUEUED, JobState.RUNNING)
AT_ONCE = 500
"""Jobs that one transaction cancels: workers claim and beat between two of them."""


@dataclass(frozen=True)
class Sweep:
    """An array of jobs, as it was accepted."""

    id: str
    job_ids: tuple[int, ...]


def sweep_id(submit_key: str) -> str:
    """What an array is called; it begins with a letter, so that it is no job's id."""
    return "s" + hashlib.sha256(submit_key.encode()).hexdigest()[:9]


class Sweeping(Store):
    """Submit arrays, cancel many."""

    def submit_sweep(
        self,
        specs: Sequence[dict[str, Any]],
        *,
        names: Sequence[str],
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
        ringing: int = 0,
    ) -> Sweep:
        """
        Accept an array of jobs in one transaction: when this returns, all rows are committed.

        Args:
            specs, names: of each job, in order.
            submit_key: made by the client; the same key gives the same jobs, once.
            ringing: the caller rings so often as soon as this returns; see submit().

        Raises:
            JobNotFoundError: a job in `after` does not exist.
            SpecError: one in `after` has ended badly, too many, or another request had this key.
        """
        if len(specs) > MOST_IN_A_SWEEP:
            raise SpecError(f"{len(specs):,} jobs are more than one sweep holds ({MOST_IN_A_SWEEP:,})")
        name = sweep_id(submit_key)
        keys = [hashlib.sha256(f"{submit_key}/{place}".encode()).hexdigest() for place in range(len(specs))]

        def work(conn: Connection) -> Sweep:
            known = _known(conn, name, kind, specs)
            if known is not None:
                return known
            needs = sorted(set(after))
            blockers = hold_needed(conn, needs)
            common = {"kind": kind, "queue": queue, "user": user, "priority": priority, "sweep": name}
            common |= {"spec_version": spec_version, "state": JobState.QUEUED, "held": int(held)}
            common |= {"preemptible": int(preemptible), "time_limit_s": time_limit_s, "blockers": blockers}
            now = float(conn.execute(select(utcnow())).scalar_one())
            rung = ringing if not held and not blockers else 0
            rows = [
                {
                    **common,
                    "submit_key": key,
                    "name": called,
                    "spec": spec,
                    "created_at": now,
                    "rung_at": now if place < rung else None,
                }
                for place, (key, called, spec) in enumerate(zip(keys, names, specs, strict=True))
            ]
            conn.execute(insert(job), rows)
            made = _ids(conn, name)
            if needs:
                links = [{"job_id": one, "needs": needed} for one in made for needed in needs]
                conn.execute(insert(dependency), links)
                if blockers and not held:
                    lend(conn, needs, priority)
            said = [{"job_id": one, "type": "submitted", "detail": {"sweep": name}} for one in made]
            conn.execute(insert(event).values(at=utcnow()), said)
            failpoint("submit.inserted")
            return Sweep(name, tuple(made))

        try:
            accepted = self.database.write(work)
        except IntegrityError:  # two submits with one key at the same moment: the other one won
            accepted = self.database.write(work)
        failpoint("submit.committed")
        return accepted

    def cancel_many(self, ids: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """
        Cancel jobs, or ask their workers to stop them, a few hundred in each transaction.

        What has ended meanwhile is passed over, and so are parts, which go with their whole.

        Yields:
            (job id, whether it has ended; else its worker was asked), as it is committed.
        """
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            yield from self.database.write(partial(_cancel, ids=some))


def _ids(conn: Connection, name: str) -> list[int]:
    found = select(job.c.id).where(text("sweep IS NOT NULL"), job.c.sweep == name).order_by(job.c.id)
    return list(conn.execute(found).scalars())


def _known(conn: Connection, name: str, kind: str, specs: Sequence[dict[str, Any]]) -> Sweep | None:
    """
    The array that this key has made before.

    Raises:
        SpecError: from another request.
    """
    query = select(job.c.id, job.c.kind, job.c.spec).where(text("sweep IS NOT NULL"), job.c.sweep == name)
    rows = conn.execute(query.order_by(job.c.id)).all()
    if not rows:
        return None
    if [(row.kind, row.spec) for row in rows] != [(kind, spec) for spec in specs]:
        raise SpecError(
            f"this submit key is that of sweep {name}, another request",
            hint="the same key must come with the same request; use another key",
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
    # What stands alone, which is nearly all, goes by two statements for all of them.
    tied = select(dependency.c.needs).where(dependency.c.needs.in_(wanted))
    tied_ids = set(conn.execute(tied).scalars())
    split = select(job.c.part_of).where(text("part_of IS NOT NULL"), job.c.part_of.in_(wanted))
    tied_ids |= set(conn.execute(split).scalars())
    alone = [row.id for row in rows if row.state == JobState.QUEUED and row.id not in tied_ids]
    cancel_queued(conn, alone)
    done = dict.fromkeys(alone, True)
    for row in reversed(rows):  # the newest first: what waits for others goes before them
        if row.id in done:
            continue
        now = conn.execute(select(job).where(job.c.id == row.id)).one()
        if JobState(now.state).terminal:  # with one that it waited for
            done[row.id] = True
            continue
        if now.cancel_requested_at is None:
            conn.execute(update(job).where(job.c.id == row.id).values(cancel_requested_at=utcnow()))
            record_event(conn, row.id, "cancel_requested")
        if now.state == JobState.QUEUED:
            leave(conn, now, JobState.CANCELLED, None, {}, None)
        done[row.id] = now.state == JobState.QUEUED
    return sorted(done.items(), reverse=True)
