"""
A large generation is many rows: its parts, each a job of its own with its own lease, and the whole.

The whole waits for its parts as any job waits for others (the dependency table), and
is then claimed itself, to gather and publish. So a part that is lost is rescued like
any job, and two last finishers or a crash while publishing cannot strand the whole.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, text, update

from jobs.states import JobState
from storage.db.rows import state_of
from storage.db.tables import dependency, event, job, utcnow

PARTS = "part_of IS NOT NULL"
_PARTS_OF = select(job).where(job.c.part_of == bindparam("whole")).order_by(job.c.id)  # built once


@dataclass(frozen=True)
class Shards:
    """How far the parts of one job are."""

    number: int
    ended: int
    running: int
    done: int
    total: int
    rate: float
    workers: tuple[str, ...]

    @property
    def under_way(self) -> bool:
        return self.running > 0 or self.ended > 0


def insert_shards(
    conn: Connection,
    whole: int,
    submit_key: str,
    common: dict[str, Any],
    parts: Sequence[tuple[dict[str, Any], int]],
    *,
    needs: Sequence[int],
    blockers: int,
    lanes: int,
) -> None:
    """
    Insert a job's parts, in the transaction that inserts the job.

    Args:
        common: columns that the parts share with the whole.
        parts: (spec, pictures) of each.
        needs, blockers: the jobs that the whole waits for, and how many of them have not succeeded.
        lanes: parts that may run at once, each lane one after the other; 0: all of them.
    """
    rows = [
        {
            **common,
            "submit_key": hashlib.sha256(f"{submit_key}/{place}".encode()).hexdigest(),
            "spec": spec,
            "part_of": whole,
            "blockers": blockers + (lanes > 0 and place >= lanes),
            "progress": {"done": 0, "total": pictures, "unit": "pictures"},
        }
        for place, (spec, pictures) in enumerate(parts)
    ]
    # RETURNING may give the ids in any order; a key tells which is which.
    made = conn.execute(insert(job).values(created_at=utcnow()).returning(job.c.id, job.c.submit_key), rows)
    by_key = {row.submit_key: row.id for row in made}
    ids = [by_key[row["submit_key"]] for row in rows]
    links = [{"job_id": whole, "needs": one} for one in ids]
    links += [{"job_id": one, "needs": needed} for one in ids for needed in needs]
    if lanes > 0:
        links += [{"job_id": ids[i], "needs": ids[i - lanes]} for i in range(lanes, len(ids))]
    conn.execute(insert(dependency), links)
    conn.execute(
        insert(event).values(at=utcnow()),
        [{"job_id": one, "type": "submitted", "detail": {"part_of": whole}} for one in ids],
    )


def shards_of(conn: Connection, whole: int) -> list[Any]:
    """The rows of a job's parts, in the order of draws."""
    return list(conn.execute(_PARTS_OF, {"whole": whole}))


def hold_shards(conn: Connection, whole: int, *, held: bool) -> None:
    """Hold what has not begun, or let it go."""
    waiting = update(job).where(job.c.part_of == whole, job.c.state == JobState.QUEUED)
    conn.execute(waiting.values(held=int(held), rung_at=None))


def summaries(conn: Connection, wholes: Sequence[int]) -> dict[int, Shards]:
    """How far the parts of each of these jobs are, by one query."""
    if not wholes:
        return {}
    rows = defaultdict(list)
    query = select(job.c.part_of, job.c.state, job.c.progress, job.c.worker)
    for row in conn.execute(query.where(text(PARTS), job.c.part_of.in_(wholes))):
        rows[row.part_of].append(row)
    return {whole: _summary(parts) for whole, parts in rows.items()}


def _summary(rows: Sequence[Any]) -> Shards:
    done, total, rate = 0, 0, 0.0
    for row in rows:
        told = row.progress or {}
        pictures = int(told.get("total") or 0)
        total += pictures
        done += pictures if row.state == JobState.SUCCEEDED else int(told.get("done") or 0)
        if row.state == JobState.RUNNING:
            rate += float(told.get("rate") or 0.0)
    running = [row for row in rows if row.state == JobState.RUNNING]
    return Shards(
        number=len(rows),
        ended=sum(state_of(row.state).terminal for row in rows),
        running=len(running),
        done=done,
        total=total,
        rate=rate,
        workers=tuple(sorted({row.worker for row in running if row.worker})),
    )
