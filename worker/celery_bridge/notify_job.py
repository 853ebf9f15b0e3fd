"""Wake the workers for a job that was just submitted or released, whole or in shards."""

from contextlib import suppress

from jobs.errors import DatabaseUnavailableError, QueueUnavailableError
from storage.db.queries import Queries
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.settings import Settings
from worker.celery_bridge.notify import notify

MAX_NOTIFIED = 16
"""Notifications for one job: each wakes one worker, and there may be as many workers as shards."""


def notify_job(
    settings: Settings, queries: Queries, store: JobStore, job: Job
) -> QueueUnavailableError | None:
    """Notify for a job, or for its shards; return what went wrong first. Workers poll all the same."""
    shards = queries.shards(job.id) if job.blockers else []
    failures = [_notified(settings, store, one) for one in shards[:MAX_NOTIFIED] or [job]]
    return next((one for one in failures if one is not None), None)


def _notified(settings: Settings, store: JobStore, job: Job) -> QueueUnavailableError | None:
    if job.state.terminal or job.held or job.blockers > 0:
        return None
    try:
        notify(settings, job.id, job.queue, store.database.installation)
    except QueueUnavailableError as exc:
        with suppress(DatabaseUnavailableError):  # then it is notified for a little later
            store.not_notified(job.id)
        return exc
    return None
