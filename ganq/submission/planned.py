"""Jobs that are not submitted yet, among those of the job table: for job files."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.errors import JobNotFoundError
from jobs.kinds import kind_named
from jobs.states import JobState
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Job

PLACEHOLDER = re.compile(r"-[0-9]{1,9}")


class WithPlanned(Queries):
    """Queries among which planned jobs are found, whose ids are negative."""

    planned: Mapping[str, Sequence[Job]]
    """By name; filled by the caller."""

    def get(self, job_id: int) -> Job:
        if job_id >= 0:
            return super().get(job_id)
        for rows in self.planned.values():
            for row in rows:
                if row.id == job_id:
                    return row
        raise JobNotFoundError(f"there is no job {job_id}")

    def find(self, reference: str) -> Job:
        if PLACEHOLDER.fullmatch(reference):
            return self.get(int(reference))
        return super().find(reference)

    def newest_model(self, *, succeeded: bool = False) -> Job:
        rows = {row.id: row for rows in self.planned.values() for row in rows}
        models = [row for row in rows.values() if kind_named(row.kind).makes_model]
        if models and not succeeded:
            return min(models, key=lambda row: row.id)
        return super().newest_model(succeeded=succeeded)

    def checkpoints(self, job_id: int) -> list[Checkpoint]:
        return [] if job_id < 0 else super().checkpoints(job_id)


class PlannedQueries(WithPlanned):
    """The job table with planned jobs."""

    def __init__(self, database: Database, planned: Mapping[str, Sequence[Job]]) -> None:
        super().__init__(database)
        self.planned = planned


def planned_job(
    job_id: int, name: str | None, spec: dict[str, Any], columns: Mapping[str, Any], sweep: str | None
) -> Job:
    """Return the row that a planned job will have when it is submitted."""
    values: dict[str, Any] = dict.fromkeys(Job.__dataclass_fields__)
    values |= {"attempt": 0, "hb_seq": 0, "crash_count": 0, "yields": 0, "ran_s": 0.0, "created_at": 0.0}
    values |= {"throttled": False, "position": 0.0}
    values |= {"blockers": 0, "kept": False, "state": JobState.QUEUED, "sweep": sweep}
    return Job(**{**values, **columns, "id": job_id, "name": name, "spec": spec})
