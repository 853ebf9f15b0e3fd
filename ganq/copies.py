"""Copy results to a folder: on request, and where the worker has another Unix account than the submitter."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ganq.session import Session
from jobs.errors import NotFoundError, SpecError, StorageError, VolumeError
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


def download(session: Session, job: "Job", out: Path | None, only: str | None = None) -> Path:
    """
    Copy the images of a job to a folder, completely or not at all.

    Args:
        out: the folder; None: the --out of the submission.
        only: 'images', 'grids' or 'best', from a server; None: all.

    Returns:
        The folder, or with 'best' the file.

    Raises:
        NotFoundError: the job has no images.
        SpecError: there is no folder, or `only` is given without a server.
        StorageError: it cannot be copied.
    """
    target = out or (job.spec.get("out") if job.kind == "generate" else None)
    if only is not None and not session.remote:
        raise SpecError("--only is for downloads from a server (GANQ_API_URL)", hint=f"ganq open {job.id}")
    if job.kind != "generate":
        raise NotFoundError(
            f"job {job.id} is of kind {job.kind} and has no images", hint=f"ganq open {job.id}"
        )
    if target is None:
        raise SpecError(f"job {job.id} was submitted without --out", hint="give a folder: --out DIR")
    if job.part_of is not None:
        raise NotFoundError(
            f"job {job.id} is a shard of job {job.part_of}, which has the images",
            hint=f"ganq download {job.part_of}",
        )
    if job.state is not JobState.SUCCEEDED:
        raise NotFoundError(
            f"job {job.id} ({job.state}) has no result"
            + ("" if job.state.terminal else " yet: ganq wait copies it when it has succeeded"),
            hint=f"ganq status {job.id} shows its state",
        )
    target = Path(target).expanduser().absolute()
    if session.remote:
        return session.download(job, target, only)
    from storage.results.reader import copy_out, names_of_result

    folder = session.volume_of(job).attempt(job.id, job.attempt)
    if "deleted_at" in (job.result or {}) or not names_of_result(folder):
        raise NotFoundError(
            f"the images of job {job.id} were deleted", hint=f"ganq retry {job.id} generates them again"
        )
    if failed := copy_out(folder, str(target)).get("out_error"):
        raise StorageError(failed, hint="give another folder: --out DIR")
    return target
