"""Print what may delay accepted jobs; ganq/submission/accept.py notifies the workers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from cli.session import Session
from cli.ui import output
from ganq.submission import accept
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


def notices_of(lines: Iterable[str]) -> None:
    """Print notices."""
    for line in lines:
        output.notice(line)


def notify_workers(session: Session, job: Job) -> None:
    """Wake workers for a job or its shards; print a notice if Redis or a worker is missing."""
    notices_of(accept.notify_workers(session, job))
