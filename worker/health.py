"""
The health check of this machine's workers, as `ganq health` reports it.

The database is used only if no supervisor is found here; until then its library is not imported.
"""

import socket
from collections.abc import Sequence
from typing import Any

from storage.settings import Settings
from worker.host.live_supervisors import Condition, Status, ask_supervisors, with_old_keys

TABLE_S = 6.0
"""With the rest, less than the 10 s that a container engine gives a health check."""


def examine(settings: Settings, name: str | None = None) -> list[Condition]:
    """
    Return the condition of the workers of this machine and this GANQ_HOME, or of the one of that name.

    Returns:
        Empty if there is none, here or in the job table.

    Raises:
        GanqError: none is found here, and the job table cannot be read.
        TimeoutError: the same; the job table did not answer.
    """
    return ask_supervisors(settings.runtime, name) or ask_table(settings, name)


def ask_table(settings: Settings, name: str | None) -> list[Condition]:
    """Return the condition of workers whose runtime folder is not visible, by their last heartbeat."""
    from worker.doctor.check import within

    def read_workers() -> Sequence[Any]:
        from storage.db.queries import Queries
        from storage.db.schema import open_database

        database = open_database(settings)
        try:
            return Queries(database).workers()
        finally:
            database.dispose()

    host = socket.gethostname()
    limit_s = 3 * settings.heartbeat_seconds + settings.lease_seconds
    conditions = []
    for one in within(TABLE_S, read_workers):
        if (one.name != name) if name else (one.host != host):
            continue
        facts = {"pid": one.pid, "state": one.state, "job_id": one.job_id, "report_s": one.silent_s}
        status, why = Status.UNHEALTHY, "has stopped"
        if one.state != "stopped" and one.silent_s <= limit_s:
            status, why = Status.HEALTHY, f"is {one.state}, by the job table"
        elif one.state != "stopped":
            why = f"has been unresponsive for {one.silent_s:.0f} s, by the job table"
        conditions.append(Condition(one.name, status, why, with_old_keys(facts)))
    running = [one for one in conditions if one.facts["state"] != "stopped"]
    return running if running else conditions
