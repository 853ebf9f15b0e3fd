"""
What may be deleted from the volume, decided from facts alone: nothing here looks or deletes.

For what an attempt has written the table decides, never the age of a file: once an
attempt has ended, the fence lets no row point at anything new in its folder. Only names
that belong to nobody are judged by their age.
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
"""What `--jobs` deletes of an ended job; its log, metrics and spec are small, and stay."""
ROOT_TEMPS = re.compile(r"\.(?:probe|doctor)-[0-9a-f]+")
JOB_TEMPS = re.compile(r"\.import-[0-9a-f]+(?:\.tmp-[0-9a-f]+)?")
DATASET_TEMPS = re.compile(r"\.unpack-.+|[0-9a-f]{64}\.tmp-(?:old-)?[0-9a-f]+")
LINK_TEMPS = re.compile(r"\..+-[0-9a-f]{8}")
LINK_TARGET = re.compile(r"(?:\.\./)?jobs/\d{6,}/a\d+")
"""Where our own links in latest/ point; another link is somebody's."""


class Reason(StrEnum):
    """Why something may go."""

    UNREGISTERED = "checkpoint without a row"
    UNPUBLISHED = "pictures that were never published"
    UNFINISHED = "unfinished file"
    TRASH = "left by an earlier gc"
    PART = "part of a published whole"
    NO_JOB = "folder without a job"
    LINK = "link to nothing"
    DATASET = "data set not needed"
    RESULTS = "results of an old job"


@dataclass(frozen=True)
class Policy:
    """How old something must be. Ages are seconds by the database's or the volume's own clock."""

    grace_s: float = 60.0
    """Since the end of an attempt: a worker that lost its job has then been told so."""
    temp_s: float = 3600.0
    """Since the last change of a temporary name that no attempt owns."""
    datasets_s: float | None = None
    """Since the last use of a decoded data set; None: they stay."""
    jobs_s: float | None = None
    """Since the end of a job whose results go; None: they stay."""


@dataclass(frozen=True)
class JobFacts:
    """What the table says of one job."""

    id: int
    kind: str
    state: JobState
    attempt: int
    created_at: float
    ended_age_s: float | None = None
    part_of: int | None = None
    """The job whose pictures this one has made a share of."""
    whole_ended_age_s: float | None = None
    whole_published: bool = False
    given_up: bool = False
    """An earlier gc has taken its results out of the table."""
    attempts: Mapping[int, float | None] = field(default_factory=dict)
    """Number of an attempt → seconds since its end; None while it is open."""
    checkpoints: frozenset[str] = frozenset()
    """Paths of the registered ones, relative to the volume."""


@dataclass(frozen=True)
class AttemptSeen:
    """What lies in one attempt's folder: names, never links' targets."""

    number: int
    names: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobSeen:
    """What lies in one job's folder."""

    folder: str
    names: tuple[str, ...] = ()
    attempts: tuple[AttemptSeen, ...] = ()


Found = Iterator[tuple[str, Reason]]
"""(path relative to the volume, reason)."""


def leftovers(job: JobFacts, seen: JobSeen, policy: Policy) -> Found:
    """What a job's ended attempts have left behind and no row points to."""
    if all(age is not None and age >= policy.grace_s for age in job.attempts.values()):
        for name in seen.names:
            if (reason := _temporary(name)) is not None:
                yield f"{seen.folder}/{name}", reason
    if _spent_part(job, policy):
        if job.whole_published:
            yield seen.folder, Reason.PART
            return
        for one in seen.attempts:
            for name in filter(RESULTS.fullmatch, one.names):
                yield f"{seen.folder}/a{one.number}/{name}", Reason.UNPUBLISHED
    needed = _may_be_taken_up(job, seen)
    for one in seen.attempts:
        age = job.attempts.get(one.number)  # None: open, or the table knows of no such attempt
        if age is not None and age >= policy.grace_s:
            yield from _of_attempt(job, one, f"{seen.folder}/a{one.number}", needed=needed)


def _spent_part(job: JobFacts, policy: Policy) -> bool:
    """Whether a part has been gathered by its whole, or never will be."""
    over = all(age is not None and age >= policy.grace_s for age in job.attempts.values())
    age = job.whole_ended_age_s
    return over and job.state.terminal and age is not None and age >= policy.grace_s


def _may_be_taken_up(job: JobFacts, seen: JobSeen) -> bool:
    """
    Whether a job may go on from a checkpoint without a row: all that its rows point to are gone.

    So it is after a failover that lost the last commits.
    """
    there = {
        f"{seen.folder}/a{one.number}/{CHECKPOINTS}/{name}"
        for one in seen.attempts
        for name in one.checkpoints
    }
    return not job.state.terminal and bool(job.checkpoints) and not job.checkpoints & there


def _of_attempt(job: JobFacts, seen: AttemptSeen, folder: str, *, needed: bool) -> Found:
    """
    Args:
        needed: checkpoints without a row are, too.
    """
    published = job.state is JobState.SUCCEEDED and seen.number == job.attempt and not job.given_up
    for name in seen.names:
        if (reason := _temporary(name)) is not None:
            yield f"{folder}/{name}", reason
        elif job.given_up and RESULTS.fullmatch(name):
            yield f"{folder}/{name}", Reason.RESULTS
        elif PUBLISHED.fullmatch(name) and not published:
            yield f"{folder}/{name}", Reason.UNPUBLISHED
    if job.given_up:  # the folders of these have been named as a whole
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
    return Reason.UNFINISHED if TEMP.fullmatch(name) else None


def results(job: JobFacts, seen: JobSeen, policy: Policy) -> Found:
    """All that an old job has made, if it may be given up; whether others need it is asked elsewhere."""
    if policy.jobs_s is None or not old_enough(job, policy.jobs_s):
        return
    for one in seen.attempts:
        age = job.attempts.get(one.number)
        if age is not None and age >= policy.grace_s:
            for name in one.names:
                if RESULTS.fullmatch(name):
                    yield f"{seen.folder}/a{one.number}/{name}", Reason.RESULTS


def old_enough(job: JobFacts, age_s: float) -> bool:
    """Whether a job's results may be asked for; an import is a model that nothing here could make again."""
    return (
        job.kind != "import"
        and job.part_of is None
        and job.state.terminal
        and job.ended_age_s is not None
        and job.ended_age_s >= age_s
    )


# --- data sets ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A job that reads pictures."""

    job_id: int
    fingerprint: str | None
    """None until it has decoded them, or found them decoded."""
    data: str
    size: int
    running_s: float | None = None
    """Seconds since the start of its open attempt, if it runs."""
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
    """Whether no job that waits or runs needs a data set, nor one that ended less than age_s ago."""
    if cache.age_s < age_s:
        return False
    for one in readers:
        # One that has not said yet what it reads may be opening just this.
        opening = one.running_s is not None and one.fingerprint is None
        same = one.fingerprint == cache.fingerprint or (one.data, one.size) == (cache.source, cache.size)
        if opening or (same and (one.ended_age_s is None or one.ended_age_s < age_s)):
            return False
    return True


def abandoned(age_s: float, readers: Collection[Reader], there: Collection[str], policy: Policy) -> bool:
    """
    Whether a temporary name among the data sets belongs to nobody.

    Args:
        age_s: since its last change. An unpacked archive is read for hours without one.
        there: fingerprints of the data sets that are decoded.
    """
    decoding = [
        one.running_s
        for one in readers
        if one.running_s is not None and (one.fingerprint is None or one.fingerprint not in there)
    ]
    return age_s >= policy.temp_s and age_s > max(decoding, default=0.0) + policy.grace_s
