"""Have workers return their jobs and exit."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ganq.session import Session
from jobs.errors import DatabaseUnavailableError, NotFoundError

if TYPE_CHECKING:
    from storage.db.rows import WorkerRow

POLL_S = 0.5


def choose(session: Session, names: Sequence[str] = (), host: str | None = None) -> "list[WorkerRow]":
    """
    Return the workers of these names, or of this host, that have not stopped; without either, all.

    Raises:
        NotFoundError: there is no worker of one of these names.
    """
    known = {row.name: row for row in session.queries.workers()}
    for name in names:
        if name not in known:
            raise NotFoundError(f"there is no worker {name[:128]!r}", hint="ganq workers lists them")
    return [
        row
        for row in known.values()
        if row.state != "stopped" and (row.name in names if names else host in (None, row.host))
    ]


def request_drain(session: Session, workers: "Sequence[WorkerRow]") -> None:
    """Record the request in the rows of workers; each sees it with its next heartbeat."""
    session.request_drain([row.name for row in workers])


def wait_until_stopped(
    session: Session, workers: "Sequence[WorkerRow]", timeout: float | None = None
) -> list[str]:
    """
    Wait until workers have exited, or another process has taken their name.

    Args:
        timeout: in seconds.

    Returns:
        The names of those that have not.
    """
    started = time.monotonic()
    before = {row.name: row.started_at for row in workers}
    left = list(before)
    while left:
        with suppress(DatabaseUnavailableError):
            left = [
                row.name
                for row in session.queries.workers()
                if row.state != "stopped" and before.get(row.name) == row.started_at
            ]
        if not left or (timeout is not None and time.monotonic() - started >= timeout):
            break
        time.sleep(POLL_S)
    return left
