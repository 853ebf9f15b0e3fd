"""
Judge the workers of this machine, as `ganq health` does.

The database is not asked unless no supervisor is found here, and asking the supervisors costs no import of
its library.
"""

import socket
from collections.abc import Sequence
from typing import Any

from storage.settings import Settings
from worker.host.live_supervisors import Condition, Status, ask_supervisors

TABLE_S = 6.0
"""With the rest, less than the 10 s that a container's engine gives a check."""


def examine(settings: Settings, name: str | None = None) -> list[Condition]:
    """
    The workers of this machine and this GANQ_HOME, or the one of that name.

    Returns:
        Empty if there is no sign of any, here or in the job table.

    Raises:
        GanqError: none is found here, and the job table cannot be asked.
        TimeoutError: the same; it did not answer.
    """
    return ask_supervisors(settings.runtime, name) or ask_table(settings, name)


def ask_table(settings: Settings, name: str | None) -> list[Condition]:
    """Workers whose runtime folder is not to be seen from here, by when they last spoke."""
    from worker.doctor.check import within

    def ask() -> Sequence[Any]:
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
    for one in within(TABLE_S, ask):
        if (one.name != name) if name else (one.host != host):
            continue
        facts = {"pid": one.pid, "state": one.state, "job_id": one.job_id, "spoke_s": one.silent_s}
        status, why = Status.UNHEALTHY, "has stopped"
        if one.state != "stopped" and one.silent_s <= limit_s:
            status, why = Status.HEALTHY, f"is {one.state}, by the job table"
        elif one.state != "stopped":
            why = f"has been silent for {one.silent_s:.0f} s, by the job table"
        conditions.append(Condition(one.name, status, why, facts))
    running = [one for one in conditions if one.facts["state"] != "stopped"]
    return running if running else conditions
