"""Submit ended jobs again, with the jobs that ended because of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ganq.session import Session
from ganq.submission.accept import notify_workers

if TYPE_CHECKING:
    from storage.db.rows import Job


@dataclass(frozen=True)
class Resubmitted:
    """A job that was submitted again."""

    old: "Job"
    new: "Job"
    notices: list[str]


def resubmit(session: Session, job: "Job", *, with_waiting: bool) -> Iterator[Resubmitted]:
    """
    Submit copies of ended jobs and notify the workers; see storage/db/resubmit.py.

    Args:
        with_waiting: also of the jobs that waited on this one and ended with it.

    Raises:
        InvalidTransitionError: a job has not ended, or no worker runs its kind.
    """
    if session.remote:
        yield from session.resubmit(job, with_waiting=with_waiting)
        return
    from storage.db import resubmit as resubmission

    replacements: dict[int, int] = {}
    for old in [job, *(session.queries.ended_with(job.id) if with_waiting else ())]:
        new = resubmission.resubmit(
            session.queries, session.store, old, user=session.settings.user, instead=replacements
        )
        replacements[old.id] = new.id
        yield Resubmitted(old, new, notify_workers(session, new))
