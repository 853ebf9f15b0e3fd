"""Copy results to --out, where the worker has another Unix account than the submitter."""

import os
from typing import TYPE_CHECKING

from ganq.session import Session
from jobs.errors import VolumeError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.db.rows import Job


def copy_pending(session: Session, job: "Job") -> str | None:
    """
    Copy a result to --out, if this account submitted the job and its worker had another.

    Returns:
        Why it was not copied; None if it was, or if nothing is to be copied.
    """
    out = (job.result or {}).get("out_pending")
    if not out or job.state is not JobState.SUCCEEDED:
        return None
    if session.remote or session.queries.submitter_uid(job.id) != os.geteuid():
        return None
    from storage.results.reader import copy_out

    try:
        folder = session.volume_of(job).attempt(job.id, job.attempt)
    except VolumeError as exc:
        return f"job {job.id} is not copied to {out}: {exc.message}"
    failed = copy_out(folder, out).get("out_error")
    return f"job {job.id} is not copied: {failed}" if failed else None
