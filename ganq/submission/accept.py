"""
Commit jobs and notify the workers.

A job is accepted when its row is committed. Whatever fails after that is a notice.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from jobs.errors import SpecError
from jobs.kinds import SPEC_VERSION, kind_named
from jobs.labels import check_labels
from jobs.times import read_time
from storage.settings import NAME_HINT, WORKER_NAME_PATTERN

if TYPE_CHECKING:
    from jobs.specs import Spec
    from storage.db.rows import Job
    from storage.db.store.sweeps import Sweep
    from storage.db.store.waiting import Extras

MAX_NOTE = 4000


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What a job has beside its spec."""

    name: str | None = None
    priority: int | None = None
    no_preempt: bool = False
    queue: str = "default"
    after: tuple[str, ...] = ()
    user: str | None = None
    held: bool = False
    time_limit: float | None = None
    submit_key: str | None = None
    note: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    begin: Any = None
    """Text or datetime: see jobs.times.read_time()."""
    after_any: tuple[str, ...] = ()
    after_fail: tuple[str, ...] = ()
    max_running: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--queue", self.queue), ("--submit-key", self.submit_key)):
            if value is not None and not WORKER_NAME_PATTERN.fullmatch(value):
                raise SpecError(f"{option} {value[:70]!r} is not valid", hint=NAME_HINT)
        if self.name is not None:
            from jobs.specs import check_name

            check_name(self.name)
        check_labels(self.labels)
        if self.begin is not None:
            read_time(self.begin, time.time())
        if self.note is not None and len(self.note) > MAX_NOTE:
            raise SpecError(f"a note has at most {MAX_NOTE:,} characters")
        if self.max_running is not None and self.max_running < 1:
            raise SpecError("--max-running must be at least 1", hint="--hold lets none start")


@dataclass(frozen=True)
class UnresolvedRequest:
    """A request that a server resolves to a spec."""

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class AcceptedJob:
    """A committed job."""

    job: "Job"
    known: bool
    """It was accepted earlier, with the same submit key."""


@dataclass(frozen=True)
class AcceptedSweep:
    """A committed sweep."""

    sweep: "Sweep"
    name: str
    known: bool


def prerequisites(session: Session, request: SubmitOptions) -> list[int]:
    """
    Return the ids of the jobs of --after.

    Raises:
        JobNotFoundError: one of them does not exist.
    """
    for reference in (*request.after_any, *request.after_fail):
        session.queries.find(reference)
    return [session.queries.find(reference).id for reference in request.after]


def extras_of(session: Session, request: SubmitOptions) -> "Extras":
    """
    Return what few jobs have.

    Raises:
        JobNotFoundError: a job of --after-any or --after-fail does not exist.
    """
    from storage.db.store.waiting import Extras

    return Extras(
        note=request.note or None,
        labels=dict(request.labels),
        begin_at=None if request.begin is None else read_time(request.begin, session.queries.now()),
        after_any=tuple(session.queries.find(reference).id for reference in request.after_any),
        after_fail=tuple(session.queries.find(reference).id for reference in request.after_fail),
        max_running=request.max_running,
    )


def accept_job(
    session: Session, spec: "Spec | UnresolvedRequest", request: SubmitOptions, *, after: Sequence[int] = ()
) -> AcceptedJob:
    """
    Submit one job; the caller notifies the workers.

    Args:
        after: jobs that this one requires, in addition to those of --after.

    Raises:
        JobNotFoundError, SpecError: a job of --after does not exist or has failed.
        DatasetError: the workers may not read the data set, as far as this machine can tell.
    """
    if isinstance(spec, UnresolvedRequest):
        accepted: AcceptedJob = session.accept_job(spec, request, after)
        return accepted
    from worker.host.accounts import require_readable_data

    if request.max_running is not None:
        raise SpecError("--max-running limits the jobs of a sweep", hint="ganq limit limits those of a user")
    named = prerequisites(session, request)
    require_readable_data(session.queries, spec.to_json())
    known = session.queries.by_submit_key(request.submit_key) if request.submit_key else None
    job = session.store.submit(
        **common_columns(session, spec, request),
        will_notify=True,
        shards=[(shard.to_json(), shard.image_count) for shard in spec.split()],
        max_workers=getattr(spec, "max_workers", 0),
        spec=spec.to_json(),
        submit_key=request.submit_key or secrets.token_hex(16),
        name=request.name,
        after=[*dict.fromkeys([*after, *named])],
        extras=extras_of(session, request),
    )
    return AcceptedJob(job, known is not None)


def accept_sweep(
    session: Session,
    specs: "Sequence[Spec] | UnresolvedRequest",
    request: SubmitOptions,
    changes: Sequence[dict[str, Any]],
    *,
    after: Sequence[int] = (),
) -> AcceptedSweep:
    """
    Submit all jobs of a sweep in one transaction; the caller notifies the workers.

    Args:
        changes: the fields that differ, for each spec.
        after: jobs that all of them require.

    Raises:
        JobNotFoundError, SpecError: a job of --after does not exist or has failed; a job would be split.
    """
    if isinstance(specs, UnresolvedRequest):
        accepted: AcceptedSweep = session.accept_sweep(specs, request, changes, after)
        return accepted
    from ganq.submission.sweep import job_names
    from storage.db.store.sweeps import sweep_id
    from worker.celery_bridge.notify import MAX_NOTIFIED
    from worker.host.accounts import require_readable_data

    if any(spec.split() for spec in specs):
        raise SpecError(
            "a sweep cannot contain jobs that are split into shards", hint="raise --shard-size above --count"
        )
    submit_key = request.submit_key or secrets.token_hex(16)
    base = request.name or sweep_id(submit_key)
    known = request.submit_key is not None and any(
        session.queries.counts(sweep=sweep_id(submit_key)).values()
    )
    for each in {str(spec.to_json().get("data") or ""): spec for spec in specs}.values():
        require_readable_data(session.queries, each.to_json())
    sweep = session.store.submit_sweep(
        [spec.to_json() for spec in specs],
        **common_columns(session, specs[0], request),
        names=job_names(base, changes),
        submit_key=submit_key,
        after=[*dict.fromkeys([*after, *prerequisites(session, request)])],
        will_notify=MAX_NOTIFIED,
        extras=extras_of(session, request),
    )
    return AcceptedSweep(sweep, base, known)


def common_columns(session: Session, spec: "Spec", request: SubmitOptions) -> dict[str, Any]:
    """Return the columns that a job and the jobs of a sweep take from the options."""
    kind = kind_named(spec.kind)
    return {
        "kind": kind.name,
        "spec_version": SPEC_VERSION,
        "user": request.user or session.settings.user,
        "queue": request.queue,
        "priority": kind.priority if request.priority is None else request.priority,
        "preemptible": kind.preemptible and not request.no_preempt,
        "held": request.held,
        "time_limit_s": request.time_limit,
    }


def job_with_same_name(session: Session, job: "Job") -> "Job | None":
    """Return the job to which the name of a new job referred until now: a name refers to its newest job."""
    from storage.db.queries import Filter

    for other in session.queries.page(Filter(before_id=job.id, name=job.name), limit=20):
        if other.name == job.name:
            return other
    return None


def notify_workers(session: Session, job: "Job") -> list[str]:
    """Wake workers for a job or its shards; return notices if Redis or a worker is missing."""
    if session.remote:  # the server has done it
        return session.take_notices()
    from storage.status.job_text import served as queue_served
    from worker.celery_bridge.notify import notify_job

    notices = []
    error = notify_job(session.settings, session.queries, session.store, job)
    served = queue_served(job.queue, session.queries.workers())  # after notifying: a worker starts meanwhile
    # The embedded Redis starts with the first worker: without a worker its absence needs no notice.
    if error is not None and (served is not None or not session.settings.embedded_redis):
        notices.append(
            f"{error.message}: job {job.id} is accepted;"
            f" workers poll the job table and find it within {session.settings.poll_seconds:.0f} s"
        )
    if served is None:
        notices.append("no worker is running: start one with `ganq up` or `ganq worker`")
    elif not served:
        notices.append(f"no running worker serves the queue {job.queue}: ganq worker --queues {job.queue}")
    return notices


def notify_for_many(session: Session, job_ids: Sequence[int]) -> list[str]:
    """Wake workers for the first jobs of many; return notices like notify_workers()."""
    if session.remote:
        return session.take_notices()
    from worker.celery_bridge.notify import MAX_NOTIFIED, try_notify

    first, *others = sorted(session.queries.get_many(job_ids[:MAX_NOTIFIED]), key=lambda job: job.id)
    notices = notify_workers(session, first)
    for job in others:
        try_notify(session.settings, job.id, job.queue, session.database.installation)
    return notices
