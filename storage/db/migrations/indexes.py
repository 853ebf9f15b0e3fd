"""
The indexes that have a condition. Importing this adds them to the tables.

Only the migrations and their tests do: for an index with a condition SQLAlchemy loads the
dialects of both databases, a tenth of what every command takes to start.
"""

from typing import Any

from sqlalchemy import Index, Table, text

from storage.db.tables import (
    BEGINS,
    CLAIMABLE,
    DELAYED,
    HELD,
    PENDING,
    PREEMPTED,
    RETRIES,
    RUNNING,
    THROTTLED,
    UNRESOLVED,
    attempt,
    delivery,
    end_dependency,
    job,
)


def _index(name: str, table: Table, *columns: Any, where: str, unique: bool = False) -> None:
    found = [table.c[one] if isinstance(one, str) else one for one in columns]
    Index(name, *found, unique=unique, sqlite_where=text(where), postgresql_where=text(where))


_index("ix_job_claimable", job, "queue", job.c.priority.desc(), "user", "position", "id", where=CLAIMABLE)
_index("ix_job_begins", job, "begin_at", where=BEGINS)
_index("ix_job_throttled", job, "sweep", "id", where=THROTTLED)
_index("ix_end_dependency_unresolved", end_dependency, "needs", where=UNRESOLVED)
_index("ix_job_yielded", job, "yielded_at", where=PREEMPTED)
_index("ix_job_ripening", job, "not_before", where=DELAYED)
_index("ix_job_running", job, job.c.id % 64, where=RUNNING)
_index("ix_job_held", job, "id", where=HELD)
_index("ix_job_retry_of", job, "retry_of", where=RETRIES)
_index("ix_job_part_of", job, "part_of", where="part_of IS NOT NULL")
_index("ix_job_sweep", job, "sweep", where="sweep IS NOT NULL")
_index("uq_attempt_open", attempt, "job_id", unique=True, where="ended_at IS NULL")
_index("ix_delivery_pending", delivery, "webhook_id", "job_id", "event_id", where=PENDING)
