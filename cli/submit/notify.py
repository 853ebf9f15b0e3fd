"""
After a job was committed: ring for it, and say what may keep it waiting.

The job is accepted whatever happens here; so all that fails is a notice.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from cli.session import Session
from cli.ui import output
from storage.db.rows import Job


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Where the answer cannot be written, as on a full disk: say that what was accepted stands."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        output.notice(f"{what} is accepted; only this answer could not be written")
        raise


def ring(session: Session, job: Job) -> None:
    """Wake the workers, or say that they will find the job by themselves, or that there are none."""
    from storage.status.job_text import served
    from worker.celery_bridge.notify_job import notify_job

    failed = notify_job(session.settings, session.queries, session.store, job)
    takers = served(job.queue, session.queries.workers())  # after the bell: a worker begins meanwhile
    # The embedded Redis comes with the first worker: without one there is nothing else to say.
    if failed is not None and (takers is not None or not session.settings.embedded_redis):
        output.notice(
            f"{failed.message}: job {job.id} is accepted all the same,"
            f" and workers find it by polling within ~{session.settings.poll_seconds:.0f} s"
        )
    if takers is None:
        output.notice("no worker is running: start one with `ganq up` or `ganq worker`")
    elif not takers:
        output.notice(f"no running worker serves the queue {job.queue}: ganq worker --queues {job.queue}")
