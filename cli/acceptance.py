"""
After a job was committed: ring for it, and say what may keep it waiting.

The job is accepted whatever happens here; so all that fails is a notice.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cli import output
from cli.session import Session
from jobs.errors import DatabaseUnavailableError
from storage.jobs import Job

BELLS = 16


@contextmanager
def all_the_same(what: str) -> Iterator[None]:
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
    from cli.words import served

    parts = session.queries.parts(job.id) if job.blockers else []
    # One bell wakes one worker: as many as there may be workers for it.
    rung = all(_rung(session, one) for one in parts[:BELLS] or [job])
    takers = served(job.queue, session.queries.workers())  # after the bell: a worker begins meanwhile
    # The embedded Redis comes with the first worker: without one there is nothing else to say.
    if not rung and (takers is not None or not session.settings.embedded_redis):
        output.notice(
            f"Redis does not answer: job {job.id} is accepted all the same,"
            f" and workers find it by polling within ~{session.settings.poll_seconds:.0f} s"
        )
    if takers is None:
        output.notice("no worker is running: start one with `ganq up` or `ganq worker`")
    elif not takers:
        output.notice(f"no running worker serves the queue {job.queue}: ganq worker --queues {job.queue}")


def _rung(session: Session, job: Job) -> bool:
    return job.state.terminal or job.held or job.blockers > 0 or _reach(session, job)


def _reach(session: Session, job: Job) -> bool:
    from worker.bell import ring as ring_bell

    if ring_bell(session.settings, job.id, job.queue):
        return True
    with suppress(DatabaseUnavailableError):  # then it is rung for a little later
        session.store.not_rung(job.id)
    return False
