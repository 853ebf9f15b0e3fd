"""
The rules for what may be deleted from the volume. Nothing here reads or deletes files.

Files of an attempt are judged by the job table, never by their age: after the end of an attempt the fence
lets no row point to anything new in its folder. Only names that belong to no job are judged by their age.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jobs.states import JobState
from storage.results.files import REPORTS
from storage.results.formats import RESULT as PICTURES
from storage.volume.durable import TEMP_MARK

TRASH = ".trash-"
TRASHED = re.compile(rf"{re.escape(TRASH)}[0-9a-f]+")
TEMP = re.compile(rf".+{re.escape(TEMP_MARK)}(?:old-)?[0-9a-f]+")
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
PUBLISHED = re.compile(rf"{PICTURES.pattern}|{REPORTS.pattern}")
RESULTS = re.compile(rf"{PUBLISHED.pattern}|{CHECKPOINTS}|{SAMPLES}")
"""What `--jobs` deletes of an ended job; its log, metrics and spec are small, and are kept."""
ROOT_TEMPS = re.compile(r"\.(?:probe|doctor)-[0-9a-f]+")
JOB_TEMPS = re.compile(r"\.import-[0-9a-f]+(?:\.tmp-[0-9a-f]+)?")
DATASET_TEMPS = re.compile(r"\.unpack-.+|[0-9a-f]{64}\.tmp-(?:old-)?[0-9a-f]+")
JOB_LINK_TEMPS = re.compile(rf"\.{SAMPLES}-[0-9a-f]{{8}}")
LINK_TEMPS = re.compile(r"\..+-[0-9a-f]{8}")
LINK_TARGET = re.compile(r"(?:\.\./)?jobs/\d{6,}/a\d+")
"""Target of ganq's own links in latest/; other links belong to users."""


class Reason(StrEnum):
    """Why something may be deleted."""

    UNREGISTERED = "checkpoint without a row"
    UNPUBLISHED = "unpublished results"
    UNFINISHED = "unfinished file"
    TRASH = "left by an earlier gc"
    SHARD = "shard of a published job"
    NO_JOB = "folder without a job"
    LINK = "dangling link"
    DATASET = "unused data set"
    UPLOAD = "unused uploaded data set"
    RESULTS = "results of an old job"


@dataclass(frozen=True)
class Policy:
    """Minimum ages in seconds, by the database's or the volume's clock."""

    grace_s: float = 60.0
    """Since the end of an attempt; by then a worker that lost its lease has noticed."""
    temp_s: float = 3600.0
    """Since the last change of a temporary file that belongs to no attempt."""
    uploads_s: float = 86400.0
    """Since the last change of a file of an upload that was not completed; until then it can be resumed."""
    datasets_s: float | None = None
    """Since the last use of a decoded or uploaded data set; None: data sets are kept."""
    jobs_s: float | None = None
    """Since the end of a job whose results are deleted; None: results are kept."""
    named_models: bool = False
    """Whether results of trainings that have a name are deleted, too."""
    only: frozenset[int] | None = None
    """Delete the results of these jobs only, of any kind; None: of all that are old enough."""
    among: frozenset[int] | None = None
    """Delete the results of none but these of the old jobs; None: of all."""


@dataclass(frozen=True)
class JobFacts:
    """A job, by the job table."""

    id: int
    kind: str
    state: JobState
    attempt: int
    created_at: float
    ended_age_s: float | None = None
    part_of: int | None = None
    """Parent of a shard."""
    parent_ended_age_s: float | None = None
    parent_published: bool = False
    name: str | None = None
    kept: bool = False
    """Marked by `ganq keep`."""
    results_deleted: bool = False
    """An earlier gc has removed its results from the table."""
    attempts: Mapping[int, float | None] = field(default_factory=dict)
    """Number of each attempt → seconds since its end; None while it is open."""
    checkpoints: frozenset[str] = frozenset()
    """Paths of the registered checkpoints, relative to the volume."""


@dataclass(frozen=True)
class AttemptSeen:
    """Names in an attempt's folder; links are not followed."""

    number: int
    names: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobSeen:
    """Names in a job's folder."""

    folder: str
    names: tuple[str, ...] = ()
    attempts: tuple[AttemptSeen, ...] = ()


Deletions = Iterator[tuple[str, Reason]]
"""(path relative to the volume, reason)."""


def leftovers(job: JobFacts, seen: JobSeen, policy: Policy) -> Deletions:
    """Yield what ended attempts have left and no row points to."""
    if all(age is not None and age >= policy.grace_s for age in job.attempts.values()):
        for name in seen.names:
            if (reason := _temporary(name)) is not None:
                yield f"{seen.folder}/{name}", reason
    if _is_spent_shard(job, policy):
        if job.parent_published:
            yield seen.folder, Reason.SHARD
            return
        for one in seen.attempts:
            for name in filter(RESULTS.fullmatch, one.names):
                yield f"{seen.folder}/a{one.number}/{name}", Reason.UNPUBLISHED
    if job.results_deleted:
        yield from _samples_link(seen)
    needed = _may_resume_unregistered(job, seen)
    for one in seen.attempts:
        age = _age(job, one.number)
        if age is not None and age >= policy.grace_s:
            yield from _of_attempt(job, one, f"{seen.folder}/a{one.number}", needed=needed)


def _age(job: JobFacts, attempt: int) -> float | None:
    """Return seconds since an attempt ended; None while it is open, or if the table has none of it."""
    # No worker has written an import, so the table has no attempt of it.
    return job.ended_age_s if job.kind == "import" else job.attempts.get(attempt)


def _is_spent_shard(job: JobFacts, policy: Policy) -> bool:
    """Return whether a shard was merged by its parent, or never will be."""
    over = all(age is not None and age >= policy.grace_s for age in job.attempts.values())
    age = job.parent_ended_age_s
    return over and job.state.terminal and age is not None and age >= policy.grace_s


def _may_resume_unregistered(job: JobFacts, seen: JobSeen) -> bool:
    """
    Return whether a job may resume from a checkpoint without a row, because all registered ones were deleted.

    That happens after a failover that lost the last commits.
    """
    there = {
        f"{seen.folder}/a{one.number}/{CHECKPOINTS}/{name}"
        for one in seen.attempts
        for name in one.checkpoints
    }
    return not job.state.terminal and bool(job.checkpoints) and not job.checkpoints & there


def _of_attempt(job: JobFacts, seen: AttemptSeen, folder: str, *, needed: bool) -> Deletions:
    """
    Yield what may be deleted of one ended attempt.

    Args:
        needed: keep checkpoints without a row.
    """
    published = job.state is JobState.SUCCEEDED and seen.number == job.attempt and not job.results_deleted
    for name in seen.names:
        if (reason := _temporary(name)) is not None:
            yield f"{folder}/{name}", reason
        elif job.results_deleted and RESULTS.fullmatch(name):
            yield f"{folder}/{name}", Reason.RESULTS
        elif PUBLISHED.fullmatch(name) and not published:
            yield f"{folder}/{name}", Reason.UNPUBLISHED
    if job.results_deleted:  # their folders are in the result already
        return
    for name in seen.checkpoints:
        path = f"{folder}/{CHECKPOINTS}/{name}"
        reason = _temporary(name)
        if reason is not None or (path not in job.checkpoints and not needed):
            yield path, reason or Reason.UNREGISTERED
    for name in seen.samples:
        if (reason := _temporary(name)) is not None:
            yield f"{folder}/{SAMPLES}/{name}", reason


def _temporary(name: str) -> Reason | None:
    if TRASHED.fullmatch(name):
        return Reason.TRASH
    return Reason.UNFINISHED if TEMP.fullmatch(name) or JOB_LINK_TEMPS.fullmatch(name) else None


def results(job: JobFacts, seen: JobSeen, policy: Policy) -> Deletions:
    """Yield all results of a job that is old enough; the caller checks whether other jobs need them."""
    if policy.jobs_s is None or why_kept(job, policy) is not None:
        return
    for one in seen.attempts:
        age = _age(job, one.number)
        if age is not None and age >= policy.grace_s:
            for name in one.names:
                if RESULTS.fullmatch(name):
                    yield f"{seen.folder}/a{one.number}/{name}", Reason.RESULTS
    yield from _samples_link(seen)


def _samples_link(seen: JobSeen) -> Deletions:
    """Yield the link to the samples of all attempts, which goes with them."""
    if SAMPLES in seen.names:
        yield f"{seen.folder}/{SAMPLES}", Reason.RESULTS


def old_enough(job: JobFacts, age_s: float) -> bool:
    """Return whether a job, not a shard, has ended at least `age_s` seconds ago."""
    return (
        job.part_of is None
        and job.state.terminal
        and job.ended_age_s is not None
        and job.ended_age_s >= age_s
    )


def why_kept(job: JobFacts, policy: Policy) -> str | None:
    """
    Return why the results of a job stay, or None if they go.

    Imported weights cannot be made again, and a name means that a user wants to keep the model:
    those two go only by `ganq rm` or --named.
    """
    if not old_enough(job, policy.jobs_s or 0.0):
        return "it has not ended long enough ago"
    if policy.only is not None and job.id not in policy.only:
        return "it was not asked for"
    if policy.among is not None and job.id not in policy.among:
        return "it does not have these labels"
    if job.kept:
        return f"it is kept; ganq keep --undo {job.id} ends that"
    if policy.only is not None:
        return None
    if job.kind == "import":
        return f"imported weights cannot be made again; ganq rm {job.id} deletes them"
    if job.kind == "train" and job.name and not policy.named_models:
        return f"{job.name} is a named training; --named deletes those, too"
    return None


def why_spared(job: JobFacts, policy: Policy) -> str | None:
    """Return why `--jobs` leaves the results of a job that is old enough."""
    asked = policy.jobs_s is not None and policy.only is None and not job.results_deleted
    asked = asked and (policy.among is None or job.id in policy.among)
    return why_kept(job, policy) if asked and old_enough(job, policy.jobs_s or 0.0) else None


# --- data sets ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A job that reads a data set."""

    job_id: int
    fingerprint: str | None
    """None until it has decoded or opened the data set."""
    data: str
    size: int
    running_s: float | None = None
    """Seconds since the start of its open attempt, if it is running."""
    ended_age_s: float | None = None
    """Seconds since its end, if it has ended."""


@dataclass(frozen=True)
class Cache:
    """One decoded data set on the volume."""

    fingerprint: str
    source: str
    size: int
    age_s: float


def unused(cache: Cache, readers: Collection[Reader], age_s: float) -> bool:
    """Return whether no queued or running job needs a data set, and none that ended within age_s used it."""
    if cache.age_s < age_s:
        return False
    for one in readers:
        # A job that has not pinned its data set yet may be opening this one.
        opening = one.running_s is not None and one.fingerprint is None
        same = one.fingerprint == cache.fingerprint or (one.data, one.size) == (cache.source, cache.size)
        if opening or (same and (one.ended_age_s is None or one.ended_age_s < age_s)):
            return False
    return True


def abandoned(age_s: float, readers: Collection[Reader], there: Collection[str], policy: Policy) -> bool:
    """
    Return whether a temporary name among the data sets is in use by no job.

    Args:
        age_s: since its last change; an unpacked archive is read for hours without one.
        there: fingerprints of the decoded data sets.
    """
    decoding = [
        one.running_s
        for one in readers
        if one.running_s is not None and (one.fingerprint is None or one.fingerprint not in there)
    ]
    return age_s >= policy.temp_s and age_s > max(decoding, default=0.0) + policy.grace_s
