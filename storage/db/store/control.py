"""Cancel, pause, hold and release jobs."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select, update

from jobs.errors import InvalidTransitionError, SpecError
from jobs.states import JobState, ending_text
from storage.db.rows import Job
from storage.db.store.inheritance import open_dependencies, raise_priority, restore_priority, set_own_priority
from storage.db.store.shards import hold_shards, pause_shards
from storage.db.store.transitions import (
    StoreMixin,
    get_job,
    locked_job,
    record_event,
    storable_text,
    transition,
)
from storage.db.store.waiting import fill_slots, throttle_again
from storage.db.tables import job, label, utcnow


class ControlMixin(StoreMixin):
    """Requests of a user for an existing job."""

    def request_cancel(self, job_id: int, *, by: str | None = None) -> Job:
        """
        Cancel a queued job, or request that the worker of a running job cancels it.

        Args:
            by: name of the user, for the job's history.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it has already ended, or is a shard.
        """

        tried = False

        def work(conn: Connection) -> Job:
            nonlocal tried
            row = locked_job(conn, job_id)
            if (
                tried and row.state == JobState.CANCELLED
            ):  # an earlier try has committed, and the answer was lost
                return Job.from_row(row)
            tried = True
            if row.part_of is not None:
                raise InvalidTransitionError(
                    f"job {job_id} is a shard of job {row.part_of} and is cancelled with it",
                    hint=f"ganq cancel {row.part_of}",
                )
            if JobState(row.state).terminal:
                raise InvalidTransitionError(
                    f"job {job_id} has already {ending_text(row.state)}",
                    hint=f"ganq status {job_id} shows it",
                )
            if row.cancel_requested_at is None:
                conn.execute(update(job).where(job.c.id == job_id).values(cancel_requested_at=utcnow()))
                record_event(conn, job_id, "cancel_requested", detail={"by": by} if by else None)
            if row.state == JobState.QUEUED:
                transition(conn, row, JobState.CANCELLED, None, {}, None)
            return get_job(conn, job_id)

        return self.database.write(work)

    def pause(self, job_id: int, *, by: str | None = None, reason: str | None = None) -> Job:
        """
        Hold a job that has not ended; the worker of a running one stops it with its work saved.

        The request is the column `held` of the running row: however the attempt ends, a job that is queued
        again is then held. Workers of ganq 0.2 do not read it while a job runs.

        Args:
            by, reason: name of the user and text for the job's history.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it has ended, or is a shard.
        """

        def work(conn: Connection) -> Job:
            row = locked_job(conn, job_id)
            if row.part_of is not None:
                raise InvalidTransitionError(
                    f"job {job_id} is a shard of job {row.part_of} and is paused with it",
                    hint=f"ganq pause {row.part_of}",
                )
            if JobState(row.state).terminal:
                raise InvalidTransitionError(
                    f"job {job_id} has already {ending_text(row.state)}", hint=f"ganq status {job_id}"
                )
            stops = pause_shards(conn, job_id) or (row.state == JobState.RUNNING and not row.held)
            detail = {name: text for name, text in (("by", by), ("reason", storable_text(reason))) if text}
            if not row.held:
                _set_held(conn, row, held=True)
            if stops:
                record_event(conn, job_id, "pause_requested", detail=detail or None)
            elif not row.held:
                record_event(conn, job_id, "held", detail=detail or None)
            return get_job(conn, job_id)

        return self.database.write(work)

    def hold(self, job_id: int, *, held: bool, by: str | None = None) -> Job:
        """
        Hold a queued job, so that it is not claimed, or release it, also one that pause() has held.

        Args:
            by: name of the user, for the job's history.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it is not queued.
        """

        tried = False

        def work(conn: Connection) -> Job:
            nonlocal tried
            row = locked_job(conn, job_id)
            if tried and row.state != JobState.QUEUED and not held and not row.held:
                return Job.from_row(row)  # an earlier try has committed, and the job was claimed since
            tried = True
            pausing = row.state == JobState.RUNNING and row.held and not held
            if row.state != JobState.QUEUED and not pausing:
                raise InvalidTransitionError(
                    f"job {job_id} is {row.state}, and only a queued job can be held or released",
                    hint=f"ganq pause {job_id} stops it with its work saved"
                    if row.state == JobState.RUNNING
                    else f"ganq retry {job_id} does it again",
                )
            if bool(row.held) != held:
                _set_held(conn, row, held=held)
                detail = {"by": by} if by else None
                record_event(conn, job_id, "held" if held else "hold_released", detail=detail)
            return get_job(conn, job_id)

        return self.database.write(work)

    def set_priority(self, job_id: int, priority: int) -> Job:
        """
        Change the own priority of a job that has not ended, and the priority that its dependencies inherit.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it has ended, or is a shard.
        """

        def work(conn: Connection) -> Job:
            row = locked_job(conn, job_id)
            if row.part_of is not None:
                raise InvalidTransitionError(
                    f"job {job_id} is a shard of job {row.part_of}, which has the priority",
                    hint=f"ganq status {row.part_of}",
                )
            if JobState(row.state).terminal:
                raise InvalidTransitionError(
                    f"job {job_id} has already {ending_text(row.state)}", hint=f"ganq status {job_id}"
                )
            if Job.from_row(row).own_priority != priority:
                set_own_priority(conn, row, priority)
                record_event(conn, job_id, "priority_changed", detail={"priority": priority})
            return get_job(conn, job_id)

        return self.database.write(work)

    def rename(self, job_id: int, name: str) -> Job:
        """
        Rename a job that has not ended.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it has ended, or is a shard.
        """

        def work(conn: Connection) -> Job:
            row = locked_job(conn, job_id)
            if row.part_of is not None:
                raise InvalidTransitionError(
                    f"job {job_id} is a shard of job {row.part_of}",
                    hint=f"ganq set {row.part_of} --name {name}",
                )
            if JobState(row.state).terminal:
                raise InvalidTransitionError(
                    f"job {job_id} has already {ending_text(row.state)}", hint=f"ganq status {job_id}"
                )
            if row.name != name:
                conn.execute(update(job).where(job.c.id == job_id).values(name=name))
                record_event(conn, job_id, "renamed", detail={"from": row.name, "to": name})
            return get_job(conn, job_id)

        return self.database.write(work)

    def set_note(self, job_id: int, note: str | None) -> Job:
        """
        Set or remove the note of a job in any state.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it is a shard.
        """

        def work(conn: Connection) -> Job:
            row = _no_shard(locked_job(conn, job_id))
            text = storable_text(note) or None
            if row.note != text:
                conn.execute(update(job).where(job.c.id == job_id).values(note=text))
                record_event(conn, job_id, "note_changed", detail={"note": text})
            return get_job(conn, job_id)

        return self.database.write(work)

    def set_labels(self, job_id: int, changes: Mapping[str, str | None]) -> Job:
        """
        Set labels of a job in any state; a value of None removes a label.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: it is a shard.
        """

        def work(conn: Connection) -> Job:
            _no_shard(locked_job(conn, job_id))
            mine = conn.execute(select(label.c.key, label.c.value).where(label.c.job_id == job_id)).all()
            known = {row.key: row.value for row in mine}
            changed = {key: value for key, value in changes.items() if known.get(key) != value}
            if changed:
                conn.execute(delete(label).where(label.c.job_id == job_id, label.c.key.in_(changed)))
                new = [{"job_id": job_id, "key": k, "value": v} for k, v in changed.items() if v is not None]
                if new:
                    conn.execute(insert(label), new)
                record_event(conn, job_id, "labels_changed", detail={"labels": changed})
            return get_job(conn, job_id)

        return self.database.write(work)

    def move_before(self, job_id: int, other_id: int) -> Job:
        """
        Move a queued job directly before another one of its user and queue.

        It gets the priority of the other job if its own is lower.

        Raises:
            JobNotFoundError: there is no such job.
            InvalidTransitionError: one of them is not queued, or is a shard.
            SpecError: they are of different users or queues, whose order other rules decide.
        """

        def work(conn: Connection) -> Job:
            rows = {one: _no_shard(locked_job(conn, one)) for one in sorted((job_id, other_id))}
            row, other = rows[job_id], rows[other_id]
            for one in (row, other):
                if one.state != JobState.QUEUED:
                    raise InvalidTransitionError(
                        f"job {one.id} is {one.state}, and only a queued job has a place in the queue",
                        hint="ganq status --state queued lists them",
                    )
            if (row.queue, row.user) != (other.queue, other.user):
                what = "queues" if row.queue != other.queue else "users, who take turns"
                raise SpecError(
                    f"jobs {job_id} and {other_id} are of different {what}",
                    hint=f"ganq set {job_id} --priority {other.priority + 1} puts it first",
                )
            if job_id == other_id or row.priority > other.priority:
                return Job.from_row(row)
            if row.priority < other.priority:
                set_own_priority(conn, row, other.priority)
            # Make room: all that come before the other job move up.
            peers = (job.c.queue == other.queue, job.c.priority == other.priority, job.c.user == other.user)
            before = or_(
                job.c.position < other.position,
                (job.c.position == other.position) & (job.c.id < other.id),
            )
            ahead = update(job).where(job.c.state.in_((JobState.QUEUED, JobState.RUNNING)), *peers, before)
            conn.execute(ahead.values(position=job.c.position - 2))
            place = {"position": other.position - 1, "rung_at": None}
            shards = job.c.part_of == job_id
            conn.execute(update(job).where(or_(job.c.id == job_id, shards)).values(place))
            record_event(conn, job_id, "moved", detail={"before": other_id})
            return get_job(conn, job_id)

        return self.database.write(work)

    def keep(self, job_id: int, *, kept: bool) -> Job:
        """
        Mark a job so that `ganq gc` and `ganq rm` leave its results, or take the mark away.

        Raises:
            JobNotFoundError: it is not there.
            InvalidTransitionError: it is a shard, whose images belong to its parent.
        """

        def work(conn: Connection) -> Job:
            row = locked_job(conn, job_id)
            if row.part_of is not None:
                raise InvalidTransitionError(
                    f"job {job_id} is a shard of job {row.part_of}", hint=f"ganq keep {row.part_of}"
                )
            if bool(row.kept) != kept:
                conn.execute(update(job).where(job.c.id == job_id).values(kept=int(kept)))
                record_event(conn, job_id, "kept" if kept else "not_kept")
            return get_job(conn, job_id)

        return self.database.write(work)


def _no_shard(row: Any) -> Any:
    if row.part_of is not None:
        raise InvalidTransitionError(
            f"job {row.id} is a shard of job {row.part_of}", hint=f"use job {row.part_of}"
        )
    return row


def _set_held(conn: Connection, row: Any, *, held: bool) -> None:
    """Set `held` of a job and its shards; nothing is inherited from a held job."""
    conn.execute(update(job).where(job.c.id == row.id).values(held=int(held), rung_at=None))
    hold_shards(conn, row.id, held=held)
    if row.max_running and row.sweep and row.state == JobState.QUEUED:
        if not held:
            throttle_again(conn, row)
        fill_slots(conn, row.sweep, row.max_running)
    needs = open_dependencies(conn, [row.id]) if row.blockers else []
    if held:
        restore_priority(conn, needs)
    else:
        raise_priority(conn, needs, row.priority)
