"""Ring for a job that was just submitted. Best effort: the table is the truth, and workers poll it."""

from storage.settings import Settings


def ring(settings: Settings, job_id: int, queue: str) -> bool:
    """
    Tell the workers that a job waits.

    Returns:
        False if Redis is not there; an idle worker then finds the job by itself
        within settings.poll_seconds.
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from worker.app import make_app, send_bell

    app = make_app(settings, patient=False)
    try:
        send_bell(app, queue, job_id)
    except (OperationalError, RedisError, OSError, ValueError, LookupError):
        # ValueError, LookupError: kombu of an address that it cannot read. The job is accepted.
        return False
    finally:
        app.close()
    return True
