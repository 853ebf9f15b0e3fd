"""Notify the workers of committed jobs, and report what may delay them."""

from collections.abc import Iterator
from contextlib import contextmanager

from cli.session import Session
from cli.ui import output
from storage.db.rows import Job


@contextmanager
def report_unwritten(what: str) -> Iterator[None]:
    """Report that `what` is accepted if stdout cannot be written, for example on a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        output.notice(f"{what} is accepted, but the output could not be written")
        raise


def notify_workers(session: Session, job: Job) -> None:
    """Wake workers for a job or its shards; print a notice if Redis or a worker is missing."""
    from storage.status.job_text import served as queue_served
    from worker.celery_bridge.notify_job import notify_job

    error = notify_job(session.settings, session.queries, session.store, job)
    served = queue_served(job.queue, session.queries.workers())  # after notifying: a worker starts meanwhile
    # The embedded Redis starts with the first worker: without a worker its absence needs no notice.
    if error is not None and (served is not None or not session.settings.embedded_redis):
        output.notice(
            f"{error.message}: job {job.id} is accepted;"
            f" workers poll the job table and find it within {session.settings.poll_seconds:.0f} s"
        )
    if served is None:
        output.notice("no worker is running: start one with `ganq up` or `ganq worker`")
    elif not served:
        output.notice(f"no running worker serves the queue {job.queue}: ganq worker --queues {job.queue}")
